"""Edits that cannot all be made: what they weigh, by the definition, and that some are made for it."""

import math

import pytest
import torch

from crispedit import ranks
from crispedit.budget import AIM, DAMPING, RATIO, REACH, STEP, Budgeted, Need
from crispedit.drift_meter import DriftMeter
from crispedit.estimation import estimate_factors
from crispedit.models import edit_matrices, frozen
from crispedit.precision import float32_masters
from crispedit.priced import PricedCoordinates
from crispedit.progress import no_progress
from crispedit.replay import row_logits
from crispedit.rows import EditRow
from crispedit.spectrum import Spectrum
from crispedit.subspace import Subspace
from crispedit.texts import pad, row_batches
from crispedit.training import RuledMatrices, _Loop, loss_by_row, mean_loss, train
from crispedit.triage import ENOUGH, FURTHEST, MOST, SLOPE, preference, weights
from crispedit.updates import Unconstrained
from reference import random_rows, relative, tiny_llama

ROWS = [EditRow((1, 5, 9, 11), 3), EditRow((1, 7, 8, 9, 10, 12, 2), 2), EditRow((3, 4, 2, 6, 9), 3)]
Q = 0.2
BUDGET = 0.4
"""Nats per token, of a model whose matrices are random: an edit changes what it says everywhere."""


def test_what_is_minimised_follows_from_what_is_lacking():
    assert preference(ENOUGH, 10.0) == preference(1e9, 10.0) == 0
    assert preference(ENOUGH / math.e, 10.0) == pytest.approx(SLOPE / 10)
    assert preference(ENOUGH / math.sqrt(math.e), 5.0) == pytest.approx(SLOPE / 10)
    assert preference(ENOUGH / 1e6, 5.0) == pytest.approx(MOST / 5)
    for share, loss in ((0.0, 10.0), (0.01, math.inf), (0.01, 0.0), (0.01, math.nan)):
        assert preference(share, loss) == 0  # one of them is not known, or there is nothing to do


def test_an_edit_that_is_out_of_reach_still_weighs_something():
    """exp(−60) is 9e-27. An edit as far off as all are on average weighs 1."""
    found = weights(torch.tensor([3.0, 1e9, 3 + math.log(2) / 0.5]), 0.5, 3.0)
    assert found.tolist() == pytest.approx([1.0, math.exp(-FURTHEST), 0.5], rel=1e-6)
    assert found[1] > 0


def whole_losses(model) -> torch.Tensor:
    """−log p of every row's target, one row at a time, float64."""
    found = []
    for row in ROWS:
        logs = model(input_ids=torch.tensor([row.ids])).logits[0, :-1].double().log_softmax(-1)
        found.append(-sum(logs[place - 1, row.ids[place]] for place in range(row.prompt_length, len(row.ids))))
    return torch.stack(found)


class Preferring(RuledMatrices):
    """Matrices that are trained by the definition."""

    @property
    def weigh(self):
        return lambda losses: weights(losses, Q, 2.0)


def a_loop(model, trainee, reduction="token") -> _Loop:
    return _Loop(
        logits=row_logits(model, trainee.matrices, ROWS), mixed=False, alike=False, trainee=trainee, width=1,
        batch_size=3, seed=0, stop_loss=0, reduction=reduction, progress=no_progress,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_the_gradient_is_that_of_the_definition(reduction):
    """Of Σ c (1 − exp(−q L)) / q, by autograd, times exp(q L̄), L̄ = 2; and the loss is that which is always reported.
    c makes of L the mean over tokens, or over edits of means."""
    model = tiny_llama()
    with frozen(model):
        matrices = edit_matrices(model, [1])
        trainee = Preferring(matrices, [Unconstrained(matrices[0].shape, torch.device("cpu"))])
        wanted = matrices[0].parameter.requires_grad_()
        L = whole_losses(model)
        counts = torch.tensor([row.num_targets for row in ROWS])
        c = 1 / counts / len(ROWS) if reduction == "sample" else torch.full((3,), 1 / int(counts.sum()))
        (expected,) = torch.autograd.grad((c * (1 - torch.exp(-Q * L)) / Q).sum(), wanted, retain_graph=True)
        loss, objective = a_loop(model, trainee, reduction).loss([0, 1, 2])
        assert float(loss.detach()) == pytest.approx(float((c * L).sum().detach()), rel=1e-5)  # float32
        (found,) = torch.autograd.grad(objective, wanted)
        assert relative(found, math.exp(2 * Q) * expected) < 1e-5  # float32
        (unweighted,) = torch.autograd.grad((c * L).sum(), wanted)
        assert relative(found, unweighted) > 0.1


def test_processes_share_a_batch(monkeypatch):
    """Their parts, worked out here one after the other, add up to the whole; a process without a row adds nothing."""
    model = tiny_llama()
    with frozen(model):
        matrices = edit_matrices(model, [1])
        trainee = Preferring(matrices, [Unconstrained(matrices[0].shape, torch.device("cpu"))])
        wanted, loop = matrices[0].parameter.requires_grad_(), a_loop(model, trainee)
        loss, objective = loop.loss([0, 1, 2])
        (expected,) = torch.autograd.grad(objective, wanted)
        monkeypatch.setattr(ranks, "size", lambda: 4)
        parts = []
        for rank in range(4):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            parts.append(loop.loss([0, 1, 2]))
        assert float(sum(part for part, _ in parts).detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
        assert float(parts[3][0]) == 0
        found = sum(torch.autograd.grad(part, wanted)[0] for _, part in parts)
        assert relative(found, expected) < 1e-5  # float32


def test_losses_by_row_are_sums_over_targets():
    logits, labels = torch.randn(6, 9), torch.randint(9, (6,))
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    found = loss_by_row(logits, labels, [1, 3, 2])
    assert found.tolist() == pytest.approx([float(each[0]), float(each[1:4].sum()), float(each[4:].sum())], rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_within_a_budget_that_is_far_too_small_some_edits_are_made(batch_size):
    """As many as there is room for, where the mean loss makes one; both spend as much."""
    made, losses = {}, {}
    for needed in (100 * BUDGET, math.inf):
        model = tiny_llama()
        matrices = edit_matrices(model, [0, 1])
        texts = [pad(random_rows([12, 9, 16, 11, 14, 10]), 0)]
        factors = estimate_factors(model, matrices, texts, fisher="empirical").values()
        rules = [PricedCoordinates(Subspace.of(Spectrum.of(f.A, f.G), 0.8), 0.0, DAMPING) for f in factors]
        rows = [EditRow(tuple(ids), len(ids) - 2) for ids in random_rows([5 + i % 4 for i in range(16)], 5)]
        before = [mean_loss(model, [row]) * row.num_targets for row in rows]
        need = Need(linear=needed * AIM / RATIO / REACH, loss=sum(before) / len(rows))
        with frozen(model), float32_masters(matrices):
            meter = DriftMeter(model, matrices, row_batches(model, random_rows([8] * 12, 11), batch_tokens=30))
            trainee = Budgeted(matrices, rules, BUDGET, meter, steps=480 // batch_size, need=need)
            assert (trainee.weigh is None) == (needed == math.inf)
            train(model, matrices, trainee, rows, lr=STEP, epochs=30, batch_size=batch_size)
            found = trainee.keep_within()
        assert 0.7 * BUDGET < found["drift"] <= BUDGET
        after = [mean_loss(model, [row]) * row.num_targets for row in rows]
        made[needed] = sum(loss < math.log(2) for loss in after)
        losses[needed] = sum(after)
    with_preference, without = made
    assert made[with_preference] >= made[without] + 3
    assert losses[with_preference] > losses[without]
