"""Edit rows as batches, and logits where they carry loss, against the plain model row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crispedit.forward import RowBatch, collate, collate_packed, pair_cost, target_logits, whole_logits
from crispedit.rows import EditRow
from crispedit.texts import PADDING
from families import AWKWARD, FAMILIES, tiny_model
from reference import relative, tiny_llama

ROWS = [
    EditRow((1, 10, 11, 12, 13, 2), 4),
    EditRow((1, 10, 11, 14, 2), 3),
    EditRow((1, 10, 11, 12, 13, 15, 16, 2), 4),
    EditRow((1, 20, 2), 2),
    EditRow((1, 10, 11, 12, 13, 2), 4),  # twice the same
    EditRow((10, 11), 1),
]
"""With beginnings in common, targets that begin alike, and one row twice."""


def by_rows(model, rows) -> torch.Tensor:
    """The logits at all targets, one row at a time by the plain model: the definition."""
    found = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0]
        found.append(logits[row.prompt_length - 1 : len(row.ids) - 1])
    return torch.cat(found)


def test_a_padded_batch_by_hand():
    """The last token is not fed; padding is under the mask; targets are predicted from the token before them."""
    batch = collate([EditRow((1, 10, 11, 12, 2), 3), EditRow((1, 10, 2), 2), EditRow((10, 11), 1)])
    p = PADDING
    assert batch.ids.tolist() == [[1, 10, 11, 12], [1, 10, p, p], [10, p, p, p]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert batch.position_ids is None
    assert batch.real.tolist() == [0, 1, 2, 3, 4, 5, 8]
    assert batch.sources == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0)]
    assert batch.tokens_of == [[0, 1, 2, 3], [4, 5], [6]]
    assert batch.positions.tolist() == [2, 3, 5, 8]
    assert batch.labels.tolist() == [12, 2, 2, 11]
    assert batch.predicted_at.tolist() == [0, 1, 2, 3]
    assert {t.dtype for t in (batch.ids, batch.mask, batch.real, batch.positions, batch.labels)} == {torch.int64}


def test_a_packed_batch_by_hand():
    """1-10-11 is shared; the third row begins at its own root and is second in order; padding reads itself."""
    batch = collate_packed([EditRow((1, 10, 11, 12), 2), EditRow((1, 10, 13, 2), 2), EditRow((1, 10, 11, 9), 3)], 0.0)
    assert batch.ids.tolist() == [[1, 10, 11, 13, *4 * [PADDING]]]
    assert batch.real.tolist() == [0, 1, 2, 3]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 0, 0, 0, 0]]
    assert batch.mask[0, 0, :4, :4].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert not batch.mask[0, 0, :4, 4:].any()
    assert batch.mask[0, 0, 4:].int().tolist() == torch.eye(8).int()[4:].tolist()
    assert batch.positions.tolist() == [1, 2, 3]
    assert batch.labels.tolist() == [11, 12, 13, 2, 9]
    assert batch.predicted_at.tolist() == [0, 1, 0, 2, 1]


def read(batch: RowBatch, slot: int) -> list[int]:
    """The tokens that a place of a packed batch reads, in order of their positions."""
    sequence, place = divmod(slot, batch.ids.shape[1])
    seen = batch.mask[sequence, 0, place].nonzero().flatten()
    at = batch.position_ids[sequence, seen]
    assert sorted(at.tolist()) == list(range(len(seen)))
    return batch.ids[sequence, seen[at.argsort()]].tolist()


rows_strategy = st.lists(
    st.lists(st.integers(1, 4), min_size=2, max_size=7).flatmap(
        lambda ids: st.builds(EditRow, st.just(tuple(ids)), st.integers(1, len(ids) - 1))
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=100)
@given(rows_strategy, st.sampled_from([0.0, 0.1, 10.0]))
def test_in_a_pack_every_token_reads_its_own_row_up_to_itself(rows, cost):
    batch = collate_packed(rows, cost)
    assert batch.labels.tolist() == [token for row in rows for token in row.ids[row.prompt_length :]]
    expected = [row.ids[:end] for row in rows for end in range(row.prompt_length, len(row.ids))]
    slots = batch.positions[batch.predicted_at].tolist()
    assert [tuple(read(batch, slot)) for slot in slots] == expected
    for row, tokens in zip(rows, batch.tokens_of, strict=True):
        places = batch.real[tokens].tolist()
        assert [batch.ids.flatten()[place].item() for place in places] == list(row.ids[:-1])
    for slot, (row, place) in zip(batch.real.tolist(), batch.sources, strict=True):
        assert read(batch, slot) == list(rows[row].ids[: place + 1])
    assert batch.mask.diagonal(dim1=-2, dim2=-1).all()  # padding too: a softmax over nothing is no number


def test_packing_shares_what_rows_have_in_common_and_splits_where_pairs_are_dear():
    many = [EditRow((1, 2, 3, first, second, 4), 5) for first in range(10, 18) for second in range(20, 24)]
    shared = 3 + 8 + 32  # the beginning, eight fourth tokens, a fifth of every row
    one = collate_packed(many, 0.0)
    assert len(one.sources) == shared
    assert one.ids.shape == (1, 48)  # a multiple of 8
    split = collate_packed(many, 1.0)
    assert split.ids.shape[0] == 8
    assert len(split.sources) == 8 * 3 + 8 + 32


def test_a_pair_costs_what_the_formula_says():
    """4 × width over 2 flops per parameter: a block of width 32 with 2 of 4 key heads, and 48 inside its MLP."""
    parameters = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert pair_cost(tiny_llama()) == pytest.approx(4 * 32 / (2 * parameters))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", [*FAMILIES, *AWKWARD])
def test_the_logits_at_targets_are_those_of_the_plain_model(name, packed):
    """1e-5: float32, other orders of sums. No row is longer than a family's window, 16."""
    model = tiny_model(name)
    batch = collate_packed(ROWS, pair_cost(model)) if packed else collate(ROWS)
    with torch.no_grad():
        truth = by_rows(model, ROWS)
        assert relative(whole_logits(model, batch), truth) < 1e-5
        assert relative(target_logits(model, batch), truth) < 1e-5
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_kinds_of_attention_take_the_mask_of_a_pack(attention):
    model = tiny_model("llama", attn_implementation=attention)
    assert model.config._attn_implementation == attention
    with torch.no_grad():
        for multiple in (1, 8):
            found = target_logits(model, collate_packed(ROWS, 0.0), multiple=multiple)
            assert relative(found, by_rows(model, ROWS)) < 1e-5


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "olmo2"])
def test_gradients_are_those_of_the_plain_model(name, packed):
    """Of every parameter: shared tokens add up what their rows send back; a position predicted twice counts twice."""
    model = tiny_model(name)
    weights = torch.randn(sum(len(row.ids) - row.prompt_length for row in ROWS), 1)
    batch = collate_packed(ROWS, 0.0) if packed else collate(ROWS)
    parameters = list(model.parameters())
    expected = torch.autograd.grad((by_rows(model, ROWS).log_softmax(-1) * weights).sum(), parameters)
    logits = target_logits(model, batch, multiple=8)  # what is there again must not count again
    found = torch.autograd.grad((logits.log_softmax(-1) * weights).sum(), parameters)
    total = torch.cat([g.flatten() for g in expected]).norm()
    for one, truth in zip(found, expected, strict=True):
        assert (one - truth).norm() <= 1e-5 * total  # float32; some gradients are zero but for rounding


def test_the_head_and_the_last_mlp_see_targets_only():
    model, seen = tiny_llama(), {}
    for name in ("lm_head", "model.layers.0.mlp", "model.layers.1.mlp"):
        module = model.get_submodule(name)
        module.forward = lambda hidden, name=name, own=module.forward: (seen.update({name: hidden.shape}), own(hidden))[
            1
        ]
    batch = collate(ROWS)
    for multiple, positions in ((1, 12), (8, 16)):
        target_logits(model, batch, multiple=multiple)
        assert seen["model.layers.0.mlp"] == (6, 7, 32)
        assert seen["model.layers.1.mlp"] == seen["lm_head"] == (1, positions, 32)


def test_hooks_are_gone_when_a_model_raises(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(model.model.norm, "forward", lambda hidden: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        target_logits(model, collate(ROWS))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
