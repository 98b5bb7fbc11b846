"""Logits a few tokens at a time are the model's own, of every family, and so is what is made of them.

In float32 a product of fewer rows may be summed in another order: relative differences of 1e-6.
"""

import copy

import pytest
import torch

from crispedit import pieces
from crispedit.capability import logits_of, measure_drift
from crispedit.estimation import estimate_factors
from crispedit.models import edit_matrices
from crispedit.pieces import HiddenStates, hidden_states
from crispedit.texts import pad
from families import FAMILIES, tiny_model
from reference import random_rows, relative, tiny_gpt2, tiny_llama

LENGTHS = [2, 5, 9, 3, 9, 12]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_pieces_of_every_family_are_the_models_logits(name, monkeypatch):
    model, batch = tiny_model(name), pad(random_rows(LENGTHS), 0)
    whole = model(input_ids=batch.ids, attention_mask=batch.mask).logits[batch.mask.bool()]
    monkeypatch.setitem(pieces.AT_ONCE, "cpu", 3 * whole.shape[-1])
    hidden = hidden_states(model, batch).at(batch.mask.bool())
    assert hidden.vocabulary == whole.shape[-1]
    found = [hidden.logits(piece) for piece in hidden.pieces()]
    assert {len(part) for part in found} <= {3, len(whole) % 3}
    assert relative(torch.cat(found), whole) < 1e-6
    # a soft cap comes after the head
    assert (hidden.states.shape[-1] == whole.shape[-1]) == (name == "gemma2")


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_what_a_model_makes_of_its_heads_output_is_seen(scale):
    model, batch = tiny_llama(), pad(random_rows(LENGTHS), 0)
    own = model.forward

    def scaled(**given):
        result = own(**given)
        result.logits = scale * result.logits
        return result

    model.forward = scaled
    model.requires_grad_(False)
    for _ in range(2):  # what was seen is remembered
        hidden = hidden_states(model, batch)
        assert hidden.states.shape[-1] == (32 if scale == 1 else hidden.vocabulary)
        expected = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        assert relative(hidden.head(hidden.states), expected) < 1e-6


def test_a_model_without_a_head_of_its_own_gives_its_logits(monkeypatch):
    model, batch = tiny_llama(), pad(random_rows(LENGTHS), 0)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    hidden = hidden_states(model, batch)
    assert torch.equal(hidden.states, model(input_ids=batch.ids, attention_mask=batch.mask).logits)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_factors_are_those_of_all_logits_at_once(build, fisher, monkeypatch):
    """Labels too: every token has a number of its own. And no more logits are there at once than may be."""
    model, batches = build(), [pad(random_rows(LENGTHS), 0)]
    matrices, seen = edit_matrices(model, [0, 1]), []
    whole = estimate_factors(model, matrices, batches, fisher=fisher)
    monkeypatch.setitem(pieces.AT_ONCE, "cpu", 5 * model.config.vocab_size)
    handle = model.get_output_embeddings().register_forward_hook(lambda _, __, output: seen.append(output.shape[:-1]))
    in_pieces = estimate_factors(model, matrices, batches, fisher=fisher)
    handle.remove()
    assert max(shape.numel() for shape in seen) == 5
    for name, factors in whole.items():
        assert relative(in_pieces[name].A, factors.A) < 1e-6
        assert relative(in_pieces[name].G, factors.G) < 1e-5


def test_drift_is_that_of_all_logits_at_once(monkeypatch):
    base, batches = tiny_llama(), [pad(random_rows(LENGTHS), 0)]
    edited = copy.deepcopy(base)
    (matrix,) = edit_matrices(edited, [1])
    matrix.parameter.data += 0.1 * torch.randn(matrix.parameter.shape, generator=torch.Generator().manual_seed(0))
    whole = measure_drift(logits_of(base), logits_of(edited), batches)
    monkeypatch.setitem(pieces.AT_ONCE, "cpu", 5 * base.config.vocab_size)
    in_pieces = measure_drift(logits_of(base), logits_of(edited), batches)
    assert whole.drift > 1e-3
    for name in ("drift", "loss", "loss_base"):
        assert getattr(in_pieces, name) == pytest.approx(getattr(whole, name), rel=1e-5)


def test_a_batch_without_a_next_token_has_no_drift_and_no_gradient():
    model, batches = tiny_llama(), [pad([[3], [4]], 0), pad(random_rows(LENGTHS), 0)]
    alone = measure_drift(logits_of(model), logits_of(model), batches[1:])
    assert measure_drift(logits_of(model), logits_of(model), batches) == alone
    matrices = edit_matrices(model, [0])
    both, one = (estimate_factors(model, matrices, some)[matrices[0].name] for some in (batches, batches[1:]))
    assert both.num_tokens == one.num_tokens
    assert torch.equal(both.G, one.G)


def test_at_least_one_position_is_computed():
    states = HiddenStates.of_logits(torch.zeros(3, 2 * max(pieces.AT_ONCE.values())).to("meta"))
    assert [len(states.states[piece]) for piece in states.pieces()] == [1, 1, 1]
