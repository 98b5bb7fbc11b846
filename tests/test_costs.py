"""Counts of flops and bytes, against what torch counts as it runs, and against formulas worked out by hand."""

import dataclasses

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from crispedit.costs import (
    answer_flops,
    block_costs,
    cached_bytes,
    factor_bytes,
    head_flops,
    recorded_bytes,
    recording_flops,
    step_flops,
    texts_flops,
    weight_bytes,
)
from crispedit.estimation import estimate_factors
from crispedit.factors import FactorSums
from crispedit.forward import BatchSize, batch_size, collate, collate_packed, pair_cost
from crispedit.models import edit_matrices
from crispedit.replay import row_logits
from crispedit.rows import EditRow
from crispedit.texts import pad
from families import FAMILIES, tiny_model

WHOLE = BatchSize(tokens=48, sequences=3, length=16, positions=48, labels=48)
"""Three rows of 16 tokens, all of them predicted."""
ROWS = [
    EditRow((5, 6, 7, 8, 9, 10), 3),
    EditRow((5, 6, 7, 18, 19, 20, 21, 22), 5),
    EditRow((5, 6, 7, 8, 9, 30), 3),  # 10 and 30 are predicted at one position, 8 and 9 at two that are shared
    EditRow((40, 41, 42), 2),
]


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def eager(name, **changes):
    """A tiny model whose attention is made of matrix products, which the counter sees on a CPU."""
    model = tiny_model(name, **changes).requires_grad_(False)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layers", [[1, 2], [3]])
def test_a_full_step_costs_what_torch_counts(name, layers):
    """Equal, not close: torch counts matrix products only, as we do."""
    model = eager(name)
    matrices = edit_matrices(model, layers)
    weights = [matrix.parameter.requires_grad_() for matrix in matrices]
    ids = torch.arange(5, 21).expand(3, -1)
    losses = []
    forward = counted(lambda: losses.append(model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()))
    backward = counted(lambda: torch.autograd.grad(losses[0], weights))
    found = step_flops(model, matrices, [WHOLE], replay=False)
    assert (found.forward, found.backward) == (forward, backward)


@pytest.mark.parametrize("kind", ["dense", "sketch"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pass_over_texts_costs_what_torch_counts(name, kind):
    model = eager(name)
    matrices = edit_matrices(model, [1, 2])
    lengths = [12, 12, 12]
    batches = [pad([list(range(5, 5 + length)) for length in lengths])]
    found = texts_flops(model, matrices, lengths, kind=kind)
    predicting, ranks = 3 * 11, {"dense": (32, 48), "sketch": (16, 24)}[kind]
    # two sums in two matrices; a sketch multiplies twice. torch does not count addmm_, which is the last product
    sums = 2 * predicting * 2 * sum(size * rank for size, rank in zip((32, 48), ranks, strict=True))
    assert found.update == sums * (1 if kind == "dense" else 2)
    run = counted(lambda: estimate_factors(model, matrices, batches, kind=kind))
    assert found.total - sums + 2 * head_flops(model) == run  # the two that say whether the head is all there is


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_answers_cost_what_torch_counts(name):
    model = eager(name)
    ids = torch.arange(5, 17)[None]
    settings = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    found = counted(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **settings))
    assert answer_flops(model, [12], 7) == found


@pytest.mark.parametrize("rows", [ROWS, [EditRow(tuple(range(5, 21)), 10)] * 3, ROWS[3:]])
def test_the_size_of_a_batch_is_that_of_the_batch(rows):
    cost = pair_cost(tiny_model("llama"))
    for packed in (False, True):
        batch = collate_packed(rows, cost) if packed else collate(rows)
        sequences, length = batch.ids.shape
        assert batch_size(rows, cost if packed else None) == BatchSize(
            tokens=len(batch.real),
            sequences=sequences,
            length=length,
            positions=len(batch.positions),
            labels=len(batch.labels),
        )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layers", [[1, 2], [2, 3], [3]])
def test_a_replayed_step_costs_what_torch_counts(name, layers):
    """Equal again: rows that share tokens, packed, from the input of the first edited matrix on."""
    model = eager(name)
    matrices = edit_matrices(model, layers)
    logits = row_logits(model, matrices, ROWS)
    assert logits.start == "matrix"
    weights = [matrix.parameter.requires_grad_() for matrix in matrices]
    size = batch_size(ROWS, pair_cost(model) if logits.packed else None)
    found = step_flops(model, matrices, [size], replay=True, rule_flops=5)
    losses = []
    forward = counted(lambda: losses.append(logits([0, 1, 2, 3])[0].logsumexp(-1).sum()))
    backward = counted(lambda: torch.autograd.grad(losses[0], weights))
    assert (found.forward, found.backward) == (forward, backward)
    assert found.total == forward + backward + 5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recording_costs_what_torch_counts(name):
    """Of everything up to the end of the first edited block, in one batch of all rows."""
    model = eager(name)
    matrices = edit_matrices(model, [1, 2])
    size = batch_size(ROWS, pair_cost(model))
    logits = row_logits(model, matrices, ROWS)
    assert counted(lambda: logits.record(matrices[0])) == recording_flops(model, matrices, [size])
    assert logits.num_bytes == recorded_bytes(model, matrices, size.tokens, torch.float32)


def test_what_is_kept_of_an_answer_by_hand():
    assert cached_bytes(tiny_model("llama"), torch.float32) == 2 * 16 * 4 * 4  # keys, values: 2 heads of 8; 4 blocks


def test_a_block_without_an_mlp_of_its_own():
    """OPT keeps both maps of its MLP in the block itself."""
    config = transformers.OPTConfig(
        hidden_size=32, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, word_embed_proj_dim=32
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    (first, _) = block_costs(model)
    assert first.mlp == 2 * 2 * 32 * 128
    assert first.linear == first.mlp + 2 * 4 * 32 * 32


def test_the_paper_s_model_on_no_device():
    """LLaMA-3-8B: 8.03 billion parameters; design, section 6: 7.5 TFLOP for 500 tokens forward."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    matrices = edit_matrices(model, range(19, 24))
    assert weight_bytes(model, torch.bfloat16) == pytest.approx(16.06e9, rel=1e-3)
    every = BatchSize(tokens=500, sequences=25, length=20, positions=500, labels=500)
    targets = dataclasses.replace(every, positions=125, labels=125)
    full, replayed = (step_flops(model, matrices, [b], replay=r) for b, r in ((every, False), (targets, True)))
    assert full.forward == pytest.approx(7.5e12, rel=0.01)
    assert replayed.forward < 12 / 32 * full.forward  # 12 blocks are above the first edited one
    assert replayed.backward < full.backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_autograd_keeps(name, dtype):
    """Within a factor of 1.8 either way: norms and activation functions keep more in some families than in others."""
    model = tiny_model(name, dtype=dtype).requires_grad_(False)
    fixed = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too, or its address is used again
        return tensor

    inputs = torch.randn(2, 16, 32, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(inputs_embeds=inputs, use_cache=False)
    found = 32 * sum(block.kept_bytes(dtype) for block in block_costs(model))
    assert 1 / 1.8 < found / sum(size for size, _ in kept.values()) < 1.8


@pytest.mark.parametrize("kind", ["dense", "sketch"])
def test_factor_bytes_are_those_of_the_sums(kind):
    shapes = [(24, 40), (10, 3)]
    sums = [FactorSums(shape, torch.device("cpu"), kind) for shape in shapes]
    assert factor_bytes(shapes, kind) == sum(s.A.total.nbytes + s.G.total.nbytes for s in sums)
