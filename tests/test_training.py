"""The edit loop: where the update lies, what carries loss, when it stops, and that nothing else changes."""

import copy
import math
import random

import pytest
import torch

from crispedit.errors import ConfigError, NumericsError
from crispedit.estimation import estimate_factors
from crispedit.models import edit_matrices, frozen
from crispedit.precision import float32_masters, mixed_precision
from crispedit.rows import EditRow
from crispedit.spectrum import Spectrum
from crispedit.subspace import Subspace
from crispedit.texts import pad
from crispedit.training import (
    LIMIT,
    LOWEST,
    START,
    STEPS_PER_EPOCH,
    batches,
    edit_loss,
    fine_tune,
    progress_ratio,
    rows_per_step,
    too_slow,
)
from crispedit.updates import Coordinates, Unconstrained
from reference import project_by_equation_6, random_rows, relative, tiny_gpt2, tiny_llama

ENERGY = 0.8
BUILDERS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def edit_rows(count: int = 6, seed: int = 5) -> list[EditRow]:
    """Rows of unequal length, each with 2 to 4 target tokens."""
    ids = random_rows([5 + i % 4 for i in range(count)], seed)
    return [EditRow(tuple(row), len(row) - 2 - i % 3) for i, row in enumerate(ids)]


def factors_of(model, layers=(0, 1)):
    texts = random_rows([12, 9, 16, 11, 14, 10])
    return estimate_factors(model, edit_matrices(model, layers), [pad(texts, 0)], fisher="empirical")


def coordinates_of(factors, energy: float = ENERGY) -> list[Coordinates]:
    return [Coordinates(Subspace.of(Spectrum.of(f.A, f.G), energy)) for f in factors.values()]


def run(model, rules, *, layers=(0, 1), rows=None, lr=3e-3, epochs=25, batch_size=3, **options):
    """``fine_tune`` as the driver calls it; returns the trace and ΔW of every matrix."""
    matrices = edit_matrices(model, layers)
    with frozen(model), float32_masters(matrices):
        before = [matrix.weight.clone() for matrix in matrices]
        options = {"lr": lr, "epochs": epochs, "batch_size": batch_size, **options}
        trace = fine_tune(model, matrices, rules, rows or edit_rows(), **options)
        return trace, [matrix.weight - old for matrix, old in zip(matrices, before, strict=True)]


def unconstrained(model, layers=(0, 1)) -> list[Unconstrained]:
    return [Unconstrained(matrix.shape, torch.device("cpu")) for matrix in edit_matrices(model, layers)]


# ---------------------------------------------------------------- the applied update lies in the subspace


@pytest.mark.parametrize("family", BUILDERS)
def test_after_fifty_steps_the_update_is_in_the_low_curvature_subspace(family):
    """The invariant of the design, ‖P(Δ) − Δ‖ ≤ 1e-5 ‖Δ‖, of the trained update and of the weights' own difference.

    The second is the harder one: W₀ + Δ is rounded to float32, 3e-8 of ‖W₀‖, whatever the size of Δ.
    """
    model = BUILDERS[family]()
    factors = factors_of(model)
    rules = coordinates_of(factors)
    trace, deltas = run(model, rules, stop_loss=0.0)
    assert trace.steps == 50
    for rule, of_matrix, applied in zip(rules, factors.values(), deltas, strict=True):
        for delta in (rule.delta(), applied):
            assert delta.norm() > 0.1
            assert rule.subspace.share_outside(delta) <= 1e-5
            assert relative(project_by_equation_6(of_matrix.A, of_matrix.G, ENERGY, delta), delta) <= 1e-5


def test_adam_on_a_projected_gradient_leaves_the_subspace():
    """Why coordinates are trained: Adam rescales element by element, which does not commute with P."""
    model = tiny_llama()
    subspace = Subspace.of(Spectrum.of(*(getattr(factors_of(model, [0]).popitem()[1], key) for key in "AG")), ENERGY)
    (matrix,) = edit_matrices(model, [0])
    before = matrix.weight.clone()
    optimizer = torch.optim.Adam([matrix.parameter], lr=3e-3)
    for _ in range(50):
        (gradient,) = torch.autograd.grad(edit_loss(model, edit_rows()), [matrix.parameter])
        matrix.parameter.grad = subspace.project(gradient)
        assert subspace.share_outside(matrix.parameter.grad) <= 1e-5
        optimizer.step()
    assert subspace.share_outside(matrix.weight - before) > 0.1


def test_the_gradient_in_coordinates_is_that_of_autograd():
    rule = coordinates_of(factors_of(tiny_llama(), [0]))[0]
    weight_gradient = torch.randn(rule.subspace.mask.shape)
    Z = torch.zeros_like(rule.parameter, requires_grad=True)
    (expected,) = torch.autograd.grad((weight_gradient * rule.subspace.from_coordinates(Z)).sum(), Z)
    assert relative(rule.gradient(weight_gradient), expected) < 1e-6
    assert bool((rule.gradient(weight_gradient)[rule.subspace.mask == 0] == 0).all())


@pytest.mark.parametrize("family", BUILDERS)
def test_without_constraint_the_loop_is_plain_adam(family):
    """The parameter is ΔW, not W, so the two differ by the rounding of W₀ + ΔW, which Adam's first steps enlarge.

    GPT-2 has its weights transposed: torch's fused Adam would take a gradient's memory for that of another order.
    """
    model, plain = BUILDERS[family](), BUILDERS[family]()
    _, deltas = run(model, unconstrained(model), epochs=10, batch_size=6, stop_loss=0.0)
    matrices = edit_matrices(plain, (0, 1))
    before = [matrix.weight.clone() for matrix in matrices]
    optimizer = torch.optim.Adam([matrix.parameter for matrix in matrices], lr=3e-3)
    for _ in range(10):
        optimizer.zero_grad()
        edit_loss(plain, edit_rows()).backward()
        optimizer.step()
    for matrix, old, delta in zip(matrices, before, deltas, strict=True):
        assert relative(delta, matrix.weight - old) < 1e-3


@pytest.mark.parametrize("alike", [False, True])
def test_batches_are_in_seeded_order_and_of_like_length_where_that_is_asked_for(alike):
    """20 rows of five lengths in batches of 4; all rows are in them once."""
    lengths = [3 + i % 5 for i in range(20)]
    one, same, other = (batches(lengths, 4, random.Random(seed), alike=alike) for seed in (0, 0, 1))
    assert one == same != other
    assert sorted(index for batch in one for index in batch) == list(range(20))
    assert all(len({lengths[index] for index in batch}) == 1 for batch in one) == alike
    assert [lengths[batch[0]] for batch in one] != sorted(lengths[batch[0]] for batch in one)
    rng = random.Random(0)
    assert batches(lengths, 4, rng, alike=alike) != batches(lengths, 4, rng, alike=alike), "every epoch has another"
    assert sorted(map(len, batches(lengths, 6, rng, alike=alike))) == [2, 6, 6, 6]


def test_a_second_run_goes_on_from_the_rules_where_they_are():
    model = tiny_llama()
    rules = coordinates_of(factors_of(model))
    _, first = run(model, rules, epochs=3, stop_loss=0.0)
    _, second = run(model, rules, epochs=3, stop_loss=0.0, rows=edit_rows(seed=6))
    for rule, one, two in zip(rules, first, second, strict=True):
        assert relative(one + two, rule.delta()) < 1e-5
        assert two.norm() > 0.01


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("family", BUILDERS)
def test_the_loss_is_the_mean_over_target_tokens(family):
    model, rows = BUILDERS[family](), edit_rows()
    losses = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0]
        losses += [-logits[t - 1].log_softmax(-1)[row.ids[t]] for t in range(row.prompt_length, len(row.ids))]
    assert len(losses) == 18
    expected = torch.stack(losses).mean().item()
    # 1e-5: another order of sums in float32, and attention over padding
    assert edit_loss(model, rows).item() == pytest.approx(expected, rel=1e-5)
    assert edit_loss(model, rows[::-1]).item() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- stopping and skipping


@pytest.mark.parametrize("energy", [None, 0.0, ENERGY])
def test_the_loss_falls_below_the_bound_and_the_loop_stops(energy):
    """Without constraint, in coordinates with nothing masked, and in the low-curvature subspace."""
    model = tiny_llama()
    rules = unconstrained(model) if energy is None else coordinates_of(factors_of(model), energy)
    trace, _ = run(model, rules, lr=1e-2, epochs=200)
    assert trace.stopped_early
    assert len(trace.epoch_losses) < 200
    assert trace.epoch_losses[0] > 3
    assert trace.epoch_losses[-1] < 0.01 <= min(trace.epoch_losses[:-1])
    assert edit_loss(model, edit_rows()).item() < 0.01


def test_batches_below_the_bound_are_skipped():
    model, rows = tiny_llama(), edit_rows(2)
    run(model, unconstrained(model), rows=rows[:1], lr=1e-2, epochs=100)
    known, new = (edit_loss(model, [row]).item() for row in rows)
    assert known < 0.01 < new
    trace, _ = run(model, unconstrained(model), rows=rows, lr=1e-6, epochs=1, batch_size=1)
    assert trace.steps == 1
    assert trace.epoch_losses == [pytest.approx((known + new) / 2, rel=1e-2)]
    assert not trace.stopped_early


def test_rows_that_the_model_knows_already_change_nothing():
    model = tiny_llama()
    trace, deltas = run(model, unconstrained(model), stop_loss=100.0)
    assert (trace.steps, len(trace.epoch_losses), trace.stopped_early) == (0, 1, True)
    assert all(delta.norm() == 0 for delta in deltas)


def test_a_tiny_learning_rate_changes_almost_nothing():
    """Adam moves a number by at most about its rate per step."""
    model = tiny_llama()
    trace, deltas = run(model, unconstrained(model), lr=1e-9, epochs=2, batch_size=6)
    assert trace.steps == 2
    assert trace.epoch_losses[1] == pytest.approx(trace.epoch_losses[0], rel=1e-5)
    assert all(delta.abs().max() < 1e-7 for delta in deltas)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (7, 1), (8, 1), (16, 2), (255, 31), (256, 32), (3000, 32)])
def test_few_edits_get_small_batches(rows, size):
    assert rows_per_step(rows, 32) == size
    assert size == 1 or -(-rows // size) >= STEPS_PER_EPOCH


# ---------------------------------------------------------------- the search for a learning rate

# a tenth of the first loss by epoch 10 of 25: after three epochs, seven are left
SLOW = {
    "a tenth is reached already": ([3.0, 1.0, 0.3], False),
    "just fast enough": ([3.0, 3.0 * 10 ** (-1 / 9 + 1e-3), 3.0 * 10 ** (-2 / 9 - 1e-3)], False),
    "just too slow": ([3.0, 3.0 * 10 ** (-1 / 9), 3.0 * 10 ** (-2 / 9 + 1e-3)], True),
    "at rest": ([3.0, 3.0, 3.0], True),
    "rising": ([3.0, 3.1, 3.2], True),
    "at nothing": ([3.0, 0.1, 0.0], False),
}


@pytest.mark.parametrize("case", SLOW)
def test_too_slow_is_what_will_not_arrive(case):
    losses, expected = SLOW[case]
    assert too_slow(losses, epochs=25) is expected


# ZsRE on the bundled model, and 100 edits on a weak one, as in docs/decisions.md
RATIOS = {
    "twice as far": ([4.0, 2.0], [4.0, 1.0], 2),
    "as far": ([4.0, 2.0], [4.0, 2.0], 1),
    "half as far": ([4.0, 1.0], [4.0, 2.0], 0.5),
    "at rest, and the other falls": ([4.0, 4.0], [4.0, 3.9], math.inf),
    "both at rest": ([4.0, 4.0], [4.0, 4.0], 0),
    "both at nothing": ([0.0, 0.0], [0.0, 0.0], 0),
    "a hard set, 2 to 4 / d_in": ([8.32, 6.74, 5.98], [7.87, 5.88, 5.11], 1.48),
    "a hard set, 4 to 8 / d_in": ([7.87, 5.88, 5.11], [7.29, 5.18, 4.47], 1.31),
    "a weak model, 2 to 4 / d_in": ([1.47, 1.15, 1.04], [1.56, 1.16, 1.03], 1.03),
}


@pytest.mark.parametrize("case", RATIOS)
def test_trials_are_compared_by_how_far_the_logarithm_of_the_loss_fell(case):
    losses, others, expected = RATIOS[case]
    assert progress_ratio(losses, others) == pytest.approx(expected, rel=0.01)


def search(monkeypatch, speed, epochs=25, stop_loss=0.0):
    """``fine_tune`` with the loss of a made-up model: ``speed(rate × d_in)`` is by how much its logarithm falls."""
    model, state = tiny_llama(), {}

    def loss_of(loop, chosen):
        loss = state["loss"] * (1 + 0 * model.model.layers[0].mlp.down_proj.weight.sum())
        return loss, loss

    class Adam(torch.optim.Adam):
        def __init__(self, parameters, lr, fused):
            super().__init__(parameters, lr, fused=fused)
            state["loss"] = 8.0

        def step(self):
            super().step()
            state["loss"] *= math.exp(-speed(self.param_groups[0]["lr"] * 48))

    monkeypatch.setattr("crispedit.training._Loop.loss", loss_of)
    monkeypatch.setattr("crispedit.training.torch.optim.Adam", Adam)
    trace, _ = run(model, unconstrained(model, [0]), layers=[0], lr="auto", epochs=epochs, batch_size=6,
                   stop_loss=stop_loss)  # fmt: skip
    return trace, [round(48 * trial.learning_rate, 6) for trial in trace.trials]


def test_a_rate_that_arrives_is_kept_and_its_trial_goes_on(monkeypatch):
    trace, tried = search(monkeypatch, lambda rate: 0.3)
    assert tried == [START]
    assert trace.rates == [START / 48] * 25
    assert trace.steps == 25
    assert trace.epoch_losses == pytest.approx([8 * math.exp(-0.3 * epoch) for epoch in range(25)])


def test_a_rate_that_is_too_slow_is_doubled_while_that_pays(monkeypatch):
    trace, tried = search(monkeypatch, lambda rate: 0.05 * rate)
    assert tried == [START, 2 * START, 4 * START]
    assert trace.rates == [4 * START / 48] * 25
    assert trace.trials[-1].epoch_losses == trace.epoch_losses[:3]


def test_a_rate_that_neither_twice_nor_half_the_rate_helps_is_kept(monkeypatch):
    trace, tried = search(monkeypatch, lambda rate: 0.05 * rate**0.1)
    assert tried == [START, 2 * START, START / 2]
    assert trace.rates == [START / 48] * 25
    assert trace.trials[0].epoch_losses == trace.epoch_losses[:3]


def test_a_rate_is_halved_while_the_loss_falls_as_far(monkeypatch):
    trace, tried = search(monkeypatch, lambda rate: min(0.05 / rate, 0.06))
    assert tried == [START, 2 * START, START / 2, START / 4, START / 8]
    assert trace.rates == [START / 8 / 48] * 25
    assert START / 8 == LOWEST


def test_the_rate_has_a_limit(monkeypatch):
    trace, tried = search(monkeypatch, lambda rate: 0.001 * rate**2)
    assert tried == [START * 2**i for i in range(4)]
    assert trace.rates == [LIMIT / 48] * 25


def test_a_trial_that_is_not_finite_is_no_error(monkeypatch):
    trace, tried = search(monkeypatch, lambda rate: 0.001 * rate if rate < 3 else -math.inf)
    assert tried == [START, 2 * START, START / 2]
    assert trace.rates == [START / 48] * 25


def test_the_rate_is_halved_when_the_loss_rises(monkeypatch):
    speeds = iter([0.5, 0.5, 0.5, 0.5, -0.04, -0.1, 0.1, *[0.1] * 18])
    trace, _ = search(monkeypatch, lambda rate: next(speeds))
    assert [round(48 * rate, 6) for rate in trace.rates] == [START] * 7 + [START / 2] * 18


@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_there_is_no_search_in_few_epochs(monkeypatch, epochs):
    trace, tried = search(monkeypatch, lambda rate: 0.0, epochs=epochs)
    assert (tried, trace.rates) == ([], [START / 48] * epochs)


def test_an_edit_that_is_done_within_the_trial_stops_there(monkeypatch):
    trace, tried = search(monkeypatch, lambda rate: 9.0, stop_loss=0.01)
    assert (tried, trace.stopped_early, len(trace.epoch_losses)) == ([START], True, 2)


def test_a_trial_that_is_not_taken_leaves_nothing_behind(monkeypatch):
    """The run after a search is, bit for bit, that of the rate it found, given by hand."""
    monkeypatch.setattr("crispedit.training.too_slow", lambda losses, epochs: True)
    monkeypatch.setattr("crispedit.training.progress_ratio", lambda losses, others: 0.0)
    found, given = tiny_llama(), tiny_llama()
    options = {"epochs": 8, "seed": 3, "stop_loss": 0.0}
    trace, one = run(found, unconstrained(found), lr="auto", **options)
    same, other = run(given, unconstrained(given), lr=START / 48, **options)
    assert len(trace.trials) == 3
    assert trace.epoch_losses == same.epoch_losses
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_real_search_arrives_in_time():
    model = tiny_llama()
    trace, _ = run(model, coordinates_of(factors_of(model)), lr="auto")
    assert trace.stopped_early
    assert len(trace.rates) == len(trace.epoch_losses) < 25


def test_progress_is_told_after_every_step():
    told, model = [], tiny_llama()
    run(model, unconstrained(model), epochs=2, batch_size=4, progress=lambda *step: told.append(step))
    assert told == [("recording", 6, 6), *(("edit", done, 4) for done in (1, 2, 3, 4))]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_before_any_step(bad):
    model = tiny_llama()
    model.model.norm.weight.data[0] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericsError, match=r"the edit loss is nan in epoch 1, step 1; lower --lr \(0.003\)"):
        run(model, unconstrained(model))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- what else changes


def test_the_same_seed_gives_the_same_weights_bit_for_bit_and_another_does_not():
    results = []
    for seed in (1, 1, 2):
        model = tiny_llama()
        results.append(run(model, coordinates_of(factors_of(model)), epochs=4, batch_size=2, seed=seed))
    (trace, one), (same_trace, same), (_, other) = results
    assert trace == same_trace
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", BUILDERS)
def test_nothing_but_the_matrices_changes(family, dtype):
    model = BUILDERS[family](dtype)
    before = copy.deepcopy(model.state_dict())
    run(model, unconstrained(model, [1]), layers=[1], epochs=3)
    (matrix,) = edit_matrices(model, [1])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {matrix.name}
    assert {name: value.dtype for name, value in model.state_dict().items()} == {n: v.dtype for n, v in before.items()}
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------- float32 masters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", BUILDERS)
def test_masters_are_float32_within_and_as_they_were_afterwards(family, dtype):
    model, rows = BUILDERS[family](dtype), torch.tensor(random_rows([7, 7]))
    matrices = edit_matrices(model, [0, 1])
    model.requires_grad_(False)
    matrices[1].parameter.requires_grad_(True)
    before, logits = copy.deepcopy(model.state_dict()), model(input_ids=rows).logits
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with float32_masters(matrices):
        for matrix in matrices:
            assert matrix.parameter.dtype == matrix.weight.dtype == torch.float32
            assert matrix.parameter.requires_grad
        within = model(input_ids=rows).logits
        assert within.dtype == dtype
        # the same numbers, summed in float32 instead of in pieces of the low precision
        assert relative(within.detach(), logits.detach()) <= 4 * torch.finfo(dtype).eps
        gradients = torch.autograd.grad(within.float().square().mean(), [matrix.parameter for matrix in matrices])
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert [m.parameter.requires_grad for m in matrices] == [False, True]
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(model(input_ids=rows).logits, logits)


def test_masters_add_up_changes_that_the_low_precision_would_lose():
    model = tiny_llama(torch.bfloat16)
    (matrix,) = edit_matrices(model, [0])
    before = matrix.weight.clone()
    with float32_masters([matrix]):
        for _ in range(100):
            matrix.weight.mul_(1 + 1e-4)  # a fortieth of a bfloat16 step
    assert matrix.parameter.dtype == torch.bfloat16
    assert relative(matrix.weight, before) == pytest.approx(0.01, rel=0.1)


def test_masters_are_put_away_when_the_block_raises():
    model = tiny_gpt2(torch.bfloat16)
    matrices = edit_matrices(model, [0, 1])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), float32_masters(matrices):
        raise KeyboardInterrupt
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", BUILDERS)
def test_a_bfloat16_model_is_edited_through_its_masters(family):
    model = BUILDERS[family](torch.bfloat16)
    factors = factors_of(model)
    rules = coordinates_of(factors)
    trace, deltas = run(model, rules, lr=1e-2, epochs=60, stop_loss=0.05)
    assert trace.stopped_early
    assert all(rule.subspace.share_outside(delta) <= 1e-5 for rule, delta in zip(rules, deltas, strict=True))
    # after rounding to bfloat16: the loss is still low, though no longer that of the masters
    assert edit_loss(model, edit_rows()).item() < 0.5


# ---------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", BUILDERS)
def test_mixed_precision_gives_the_same_edit(family, dtype):
    """The loss arrives as in float32, and the change points the same way (cosine; bfloat16 has 3 digits).

    The update stays in the subspace all the same: it is made and added up in float32.
    """
    found = {}
    for precision in ("float32", "bfloat16"):
        model = BUILDERS[family](dtype)
        rules = coordinates_of(factors_of(BUILDERS[family]()))
        trace, deltas = run(model, rules, lr=1e-2, precision=precision, stop_loss=0.05, epochs=60)
        assert trace.stopped_early
        assert trace.forward["precision"] == ("bfloat16" if precision == "bfloat16" else str(dtype)[6:])
        assert all(rule.subspace.share_outside(rule.delta()) <= 1e-5 for rule in rules)
        found[precision] = deltas
    for one, other in zip(*found.values(), strict=True):
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.9


@pytest.mark.parametrize(
    ("precision", "dtype", "has", "mixed"),
    [
        ("auto", torch.float32, None, False),
        ("auto", torch.float32, "amx_tile", True),
        ("auto", torch.float32, "avx512_bf16", True),
        ("auto", torch.bfloat16, "amx_tile", True),
        ("auto", torch.float16, "amx_tile", False),
        ("float32", torch.float32, "amx_tile", False),
        ("bfloat16", torch.float32, None, True),
    ],
)
def test_mixed_precision_is_used_where_the_hardware_has_it(monkeypatch, precision, dtype, has, mixed):
    if has:
        monkeypatch.setattr(torch.cpu, f"_is_{has}_supported", lambda: True)
    assert mixed_precision(precision, dtype, torch.device("cpu")) is mixed


def test_another_precision_is_refused():
    with pytest.raises(ConfigError, match="precision is 'float8'; it must be one of auto, float32, bfloat16"):
        mixed_precision("float8", torch.float32, torch.device("cpu"))
