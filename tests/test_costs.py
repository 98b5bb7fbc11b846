"""Counts of flops and bytes, against what torch counts as it runs, and against formulas worked out by hand."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from crispedit.costs import (
    answer_flops,
    block_costs,
    cached_bytes,
    coordinate_flops,
    cross_flops,
    factor_bytes,
    recorded_bytes,
    recording_flops,
    step_flops,
    texts_flops,
    weight_bytes,
)
from crispedit.factors import FactorSums, estimate_factors
from crispedit.models import edit_matrices
from crispedit.rows import EditRow
from crispedit.subspace import Subspace
from crispedit.texts import pad
from families import FAMILIES, tiny_model

ROWS = [EditRow(tuple(range(5, 21)), 10)] * 3
"""Three rows of 16 tokens, 6 of them of the target."""


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
    ids = torch.tensor([row.ids for row in ROWS])
    losses = []
    forward = counted(lambda: losses.append(model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()))
    backward = counted(lambda: torch.autograd.grad(losses[0], weights))
    found = step_flops(model, matrices, ROWS, replay=False)
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
    assert found.total - sums == run


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_answers_cost_what_torch_counts(name):
    model = eager(name)
    ids = torch.arange(5, 17)[None]
    settings = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    found = counted(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **settings))
    assert answer_flops(model, [12], 7) == found


def test_a_replayed_step_by_hand():
    """A Llama of 4 blocks, hidden 32, inner 48, 4 heads of 8 with 2 of keys; layers 1 and 2 are edited."""
    model = tiny_model("llama")
    vocabulary = model.config.vocab_size
    tokens, targets, squares = 48, 18, 3 * 16**2
    attention_maps = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32)
    mlp, down = 2 * 3 * 32 * 48, 2 * 32 * 48
    scores = 2 * 4 * 32 * squares  # of two blocks
    above = 2 * attention_maps * tokens + mlp * (tokens + targets)
    head = 2 * 32 * vocabulary * targets
    found = step_flops(model, edit_matrices(model, [1, 2]), ROWS, replay=True, rule_flops=5)
    assert found.forward == down * tokens + above + scores + head
    assert found.backward == above + 2 * scores + head + 2 * down * tokens
    assert found.update == 5
    assert found.total == found.forward + found.backward + 5
    last = step_flops(model, edit_matrices(model, [3]), ROWS, replay=True)
    assert (last.forward, last.backward) == (down * targets + head, down * targets + head)


def test_what_is_recorded_by_hand():
    model = tiny_model("llama")
    matrices = edit_matrices(model, [1, 2])
    whole = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    assert recording_flops(model, matrices, ROWS) == 48 * (2 * whole - 2 * 32 * 48) + 2 * 4 * 32 * 3 * 16**2
    assert recorded_bytes(model, matrices, ROWS, torch.bfloat16) == 48 * (48 + 32) * 2
    assert cached_bytes(model, torch.float32) == 2 * 16 * 4 * 4  # keys and values, two heads of 8, four blocks


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
    """LLaMA-3-8B: 8.03 billion parameters; design, section 6: 4.3 TFLOP a projection, 7.5 for 500 tokens forward."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    matrices = edit_matrices(model, range(19, 24))
    assert weight_bytes(model, torch.bfloat16) == pytest.approx(16.06e9, rel=1e-3)
    assert coordinate_flops(matrices[0].shape) == pytest.approx(4.3e12, rel=0.01)  # two digits are given
    rows = [EditRow(tuple(range(20)), 15)] * 25
    full, replayed = (step_flops(model, matrices, rows, replay=replay) for replay in (False, True))
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


def test_a_projection_off_a_cross_is_the_subspace_s():
    from crispedit.spectrum import Spectrum

    values = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spectrum = Spectrum.of(torch.diag(values), torch.diag(values[:8]))
    subspace = Subspace.of(spectrum, 0.5, "cross")
    r, c = subspace.threshold.cross
    assert cross_flops((8, 12), r, c) == 2 * subspace.flops  # the gradient, and the change
