"""A damage budget: steps in the metric of damage, the ball that they stay in, and how it follows what is measured."""

import itertools
import json
import math

import pytest
import torch

from builders import curvature_of
from crispedit import budget as budget_module
from crispedit import cli, evaluate_job, rule_choice
from crispedit.budget import (
    AIM,
    DAMPING,
    LEARN,
    RATIO,
    REACH,
    STEP,
    STEPS,
    UNSEEN,
    Budget,
    Budgeted,
    Need,
    estimate_need,
)
from crispedit.capability import logits_of, measure_drift
from crispedit.certificate import measured, texts_hash
from crispedit.console_edit import print_certificate
from crispedit.curvature import Curvature
from crispedit.editing import edit
from crispedit.editors import configured
from crispedit.editors.crispedit import Config
from crispedit.errors import ConfigError
from crispedit.factors import Factors
from crispedit.inputs import capability_texts, read_edits
from crispedit.models import edit_matrices, frozen, load_model
from crispedit.natural import NaturalDescent
from crispedit.priced import PricedCoordinates, PricedLeading, priced_rule
from crispedit.rows import EditRow
from crispedit.spectrum import Spectrum
from crispedit.subspace import Subspace
from crispedit.texts import text_batches
from crispedit.triage import ENOUGH, preference, weights
from reference import random_factor, random_rows, relative, tiny_llama

D_OUT, D_IN = 10, 14


def factors(shape=(D_OUT, D_IN), seed=0) -> Factors:
    of_A, of_G = (torch.arange(1, n + 1, dtype=torch.float64) ** -1.0 for n in shape[::-1])
    return Factors(A=random_factor(of_A, seed).float(), G=random_factor(of_G, seed + 1).float(), num_tokens=40)


def subspace(form="auto", shape=(D_OUT, D_IN), seed=0) -> Subspace:
    given = factors(shape, seed)
    return Subspace.of(Spectrum.of(given.A, given.G), 0.5, form)


# ---------------------------------------------------------------- what a budget is


@pytest.mark.parametrize(
    ("given", "nats", "said"),
    [(0.01, 0.01, "0.01"), ("0.01", 0.01, "0.01"), ("1%", 0.02, "1%"), (" 0.5%", 0.01, "0.5%"), ("auto", 0.04, "auto")],
)
def test_a_budget_is_nats_or_a_share_of_the_base_models_loss(given, nats, said):
    budget = Budget.parse(given)
    assert budget.nats(loss_base=2.0) == pytest.approx(nats)
    assert str(budget) == said
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(("needed", "nats"), [(0.0, 0.04), (0.03, 0.04), (0.1, 0.1), (0.3, 0.12), (math.inf, 0.12)])
def test_auto_is_what_edits_need_between_two_and_six_hundredths(needed, nats):
    """Of a loss of 2; measured drift is ten times what is predicted, and 0.95 of a budget is aimed at."""
    need = Need(linear=needed / (RATIO * REACH) * AIM)
    assert need.nats == pytest.approx(needed)
    assert Budget.parse("auto").nats(2.0, need.nats) == pytest.approx(nats)
    assert Budget.parse("2%").nats(2.0, need.nats) == pytest.approx(0.04)
    assert Budget.parse("0.01").nats(2.0, need.nats) == 0.01


def test_unseen_inputs_count_where_auto_spends_more_than_two_hundredths():
    auto, loss = Budget.parse("auto"), 0.8
    assert [auto.unseen(share * loss, loss) for share in (0.02, 0.03, 0.06)] == pytest.approx(
        [0, UNSEEN / 2, 2 * UNSEEN]
    )
    assert Budget.parse("6%").unseen(0.06 * loss, loss) == Budget.parse("0.05").unseen(0.05, loss) == 0


@pytest.mark.parametrize("given", ["", "x", "0", "-1%", "nan", "inf", 0.0, "1%%", "1_0%", "500%"])
def test_what_is_no_budget_is_refused(given):
    with pytest.raises(ConfigError, match=r"it must be nats per token above 0, such as 0\.01, or a share"):
        Budget.parse(given)


def test_a_budget_above_the_whole_loss_is_refused_with_what_may_be_meant():
    assert Budget.parse(0.8).nats(0.82) == 0.8
    with pytest.raises(
        ConfigError, match=r"of 5 nats per token is more than .* \(0\.82\); 5% of it would be --budget 5%"
    ):
        Budget.parse("5").nats(0.82)
    with pytest.raises(ConfigError, match=r"whole loss on the texts \(0\.82\)$"):
        Budget.parse("150").nats(0.82)


def test_a_budget_and_a_threshold_do_not_go_together():
    assert configured("crispedit", {"budget": "1%"})[1].budget == "1%"
    configured("crispedit", Config(budget=0.1).model_dump())  # as in a record
    configured("crispedit", {"budget": 0.1, **Config.in_rounds})  # as in a session
    with pytest.raises(ConfigError, match="budget takes the place of energy, price: give one or the other"):
        configured("crispedit", {"budget": 0.1, "energy": 0.5, "price": 1})
    with pytest.raises(ConfigError, match="budget takes the place of"):
        configured("crispedit", {"budget": 0.1, "lr": 1e-3})
    with pytest.raises(ConfigError, match="budget is '1 cent'"):
        configured("crispedit", {"budget": "1 cent"})
    with pytest.raises(ConfigError, match="no setting 'budget'"):
        configured("crispedit-seq", {"budget": 0.1})


# ---------------------------------------------------------------- the price of curvature


def test_the_price_is_a_proximal_step():
    """Z / (1 + s λ/τ) minimises ½ ‖Z − Z₀‖² + s/2 Σ λ/τ Z²: its gradient there is zero."""
    price = 3.0
    rule = PricedCoordinates(subspace(), price)
    start = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(0))
    rule.parameter.copy_(start)
    rule.stepped()
    Z = rule.parameter.clone().requires_grad_()
    loss = 0.5 * (Z - start).square().sum() + price / 2 * (rule.metric / rule.threshold * Z.square()).sum()
    (gradient,) = torch.autograd.grad(loss, Z)
    assert float(gradient.abs().max()) < 1e-6  # a few roundings of numbers around 1


def test_damping_costs_the_same_in_every_direction_and_predicts_nothing():
    plain, damped = (PricedCoordinates(subspace(), 0.0, damping=damping) for damping in (0.0, 0.5))
    assert relative(damped.metric, plain.metric + 0.5 * plain.threshold) < 1e-6
    for rule in (plain, damped):
        rule.parameter.normal_(generator=torch.Generator().manual_seed(1))
    isotropic = 0.25 * plain.threshold * float(plain.parameter.square().sum())
    assert float(damped.cost()) == pytest.approx(float(plain.cost()) + isotropic, rel=1e-6)
    assert float(damped.predicted()) == pytest.approx(
        float(plain.predicted()), rel=1e-4
    )  # a difference of float32 sums


def test_what_is_predicted_is_the_quadratic_form_of_the_factors():
    given = factors()
    rule = PricedCoordinates(subspace(), 0.0)
    rule.parameter.normal_(generator=torch.Generator().manual_seed(1))
    change = rule.delta().double()
    expected = 0.5 * float((change * (given.G.double() @ change @ given.A.double())).sum())
    assert float(rule.predicted()) == pytest.approx(expected, rel=1e-5)  # float32 bases
    assert float(rule.predicted()) == pytest.approx(
        curvature_of({"W": given}).predicted_drift({"W": rule.delta()}), rel=1e-5
    )


@pytest.mark.parametrize("form", ["auto", "cross"])
def test_unseen_inputs_lie_in_all_directions_alike(form):
    """By the definition: A + a (tr A / d_in) I in the place of A, as dense matrices."""
    given, share = factors(), 0.3
    rule = priced_rule(subspace(form), 0.0, rotation=math.inf, damping=0.5)
    before = rule.metric.clone()
    rule.count_unseen(0.0)
    assert torch.equal(rule.metric, before)
    rule.count_unseen(2 * share)
    rule.count_unseen(share)
    rule.parameter.normal_(generator=torch.Generator().manual_seed(1))
    change = changes_of(rule)
    A = given.A.double()
    A += share * A.trace() / D_IN * torch.eye(D_IN)
    expected = 0.5 * float((change * (given.G.double() @ change @ A)).sum())
    assert float(rule.charged()) == pytest.approx(expected, rel=1e-4)  # float32 bases, a difference of float32 sums
    damping = 0.5 * rule.damping * float(rule.parameter.double().square().sum())
    assert float(rule.cost()) == pytest.approx(expected + damping, rel=1e-4)


def changes_of(rule) -> torch.Tensor:
    """ΔW in float64, whatever bases the rule sees it in."""
    return (rule.delta() if rule.frame is None else rule.frame.matrix(rule.delta())).double()


def test_gradients_in_coordinates_are_those_of_autograd():
    rule = PricedCoordinates(subspace(), 0.0)
    target = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(2))
    Z = rule.parameter.requires_grad_()
    rule.parameter = Z
    loss = (rule.delta() - target).pow(3).sum()
    (expected,) = torch.autograd.grad(loss, Z)
    with torch.no_grad():
        found = rule.gradient(3 * (rule.delta() - target).square())
    assert relative(found, expected) < 1e-5


def test_leading_coordinates_know_the_top_and_the_trace():
    given = subspace("cross")
    rule = PricedLeading(given, 0.0, rotation=0.0)
    spectrum, (r, c) = given.spectrum, given.threshold.cross
    exact = torch.outer(spectrum.beta[:r], spectrum.alpha[:c]).float()
    assert relative(rule.metric[:r, :c], exact) < 1e-6
    assert float(rule.metric.sum()) == pytest.approx(spectrum.traces[0] * spectrum.traces[1], rel=1e-5)
    gradient = torch.ones(D_OUT, D_IN)
    assert torch.equal(rule.gradient(gradient.clone()), gradient)  # nothing is left out


# ---------------------------------------------------------------- steps in a metric


def metric_problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 4), (2, 5))
    metrics = [torch.rand(shape, generator=generator) * 10 ** torch.arange(-3.0, shape[1] - 3) for shape in shapes]
    return [torch.zeros(shape) for shape in shapes], metrics, generator


def length(steps, metrics) -> float:
    return math.sqrt(sum(float((metric * step.square()).sum()) for step, metric in zip(steps, metrics, strict=True)))


def test_the_first_step_is_the_steepest_of_its_length():
    """Among all steps of that length in the metric none lowers a linear loss more; Cauchy and Schwarz."""
    parameters, metrics, generator = metric_problem()
    optimizer = NaturalDescent(parameters, metrics, lr=0.3, steps=10)
    gradients = [torch.randn(metric.shape, generator=generator) for metric in metrics]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    assert length(parameters, metrics) == pytest.approx(0.3, rel=1e-5)  # float32

    def fall(steps) -> float:
        return -sum(float((gradient * step).sum()) for gradient, step in zip(gradients, steps, strict=True))

    norm = math.sqrt(sum(float((g.square() / d).sum()) for g, d in zip(gradients, metrics, strict=True)))
    assert fall(parameters) == pytest.approx(0.3 * norm, rel=1e-5)
    for _ in range(50):
        other = [
            step + 0.1 * torch.randn(step.shape, generator=generator) / d.sqrt()
            for step, d in zip(parameters, metrics, strict=True)
        ]
        scale = 0.3 / length(other, metrics)
        assert fall([scale * step for step in other]) < fall(parameters)


def test_steps_are_those_of_the_formula_in_float64():
    parameters, metrics, generator = metric_problem(1)
    optimizer = NaturalDescent(parameters, metrics, lr=0.3, steps=6)
    expected = [parameter.double() for parameter in parameters]
    means, square = [torch.zeros_like(one) for one in expected], 0.0
    for number in range(1, 9):  # the last two have no length
        gradients = [torch.randn(metric.shape, generator=generator) for metric in metrics]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        square = 0.95 * square + 0.05 * sum(
            float((g.double() ** 2 / d).sum()) for g, d in zip(gradients, metrics, strict=True)
        )
        rate = 0.3 * max(0, 1 - (number - 1) / 6) / math.sqrt(square / (1 - 0.95**number))
        for index, gradient in enumerate(gradients):
            means[index] = 0.9 * means[index] + 0.1 * gradient.double()
            expected[index] -= rate * means[index] / (1 - 0.9**number) / metrics[index].double()
        for found, wanted in zip(parameters, expected, strict=True):
            assert relative(found.double(), wanted) < 1e-5  # float32


# ---------------------------------------------------------------- what edits need


def some_rows(count: int) -> list[EditRow]:
    ids = random_rows([6 + i % 4 for i in range(count)], 5)
    return [EditRow(tuple(row), len(row) - 1 - i % 3) for i, row in enumerate(ids)]


def needed(rows: list[EditRow]) -> tuple[Need, Need]:
    """What is found, and the same by the definition: the whole loss, its gradient, every direction."""
    model = tiny_llama()
    matrices = edit_matrices(model, None)
    rules = [PricedCoordinates(subspace("auto", m.shape, m.layer), 0.0, DAMPING) for m in matrices]
    wanted = [matrix.parameter.requires_grad_() for matrix in matrices]
    losses = []
    for row in rows:
        logs = model(torch.tensor([row.ids])).logits[0, :-1].double().log_softmax(-1)
        losses += [-logs[place - 1, row.ids[place]] for place in range(row.prompt_length, len(row.ids))]
    loss = torch.stack(losses).mean()
    square = 0.0
    for matrix, gradient, rule in zip(matrices, torch.autograd.grad(loss, wanted), rules, strict=True):
        left, right = rule.spectrum.output_basis.double(), rule.spectrum.input_basis.double()
        turned = left.T @ matrix.as_weight(gradient).double() @ right
        square += float((turned.square() / rule.metric.double()).sum())
    expected = Need(linear=0.5 * loss.item() ** 2 / square, loss=sum(losses).item() / len(rows))
    return estimate_need(model, matrices, rules, rows), expected


def test_what_edits_need_if_their_loss_is_linear_by_the_definition():
    found, expected = needed(some_rows(11))
    assert found.linear == pytest.approx(expected.linear, rel=1e-4)  # gradients in float32
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)  # float32


def test_of_many_edits_some_are_looked_at(monkeypatch):
    monkeypatch.setattr(budget_module, "LOOKED_AT", 4)
    rows = some_rows(12)
    found, _ = needed(rows)
    of_some, _ = needed([rows[0], rows[3], rows[6], rows[9]])
    assert found.linear == pytest.approx(3 * of_some.linear, rel=1e-6)
    assert found.loss == pytest.approx(of_some.loss, rel=1e-6)


def test_steps_grow_more_slowly_than_a_ball_that_is_larger_than_needed():
    with torch.no_grad():
        lengths = {}
        for budget in (0.5, 1.0, 100.0):
            tiny = Tiny(budget=budget, linear=1.0 * AIM / RATIO / REACH)  # a budget of 1 is just enough
            lengths[budget] = tiny.budgeted.optimizer(STEP).param_groups[0]["lr"]
        assert lengths[1.0] == pytest.approx(STEP * math.sqrt(2 * AIM / RATIO))
        assert lengths[0.5] == pytest.approx(lengths[1.0] / math.sqrt(2))
        assert lengths[100.0] == pytest.approx(100**0.25 * lengths[1.0])  # half way to 10 times


def test_of_many_steps_each_is_shorter():
    """By the root of their number: n steps that do not agree lead √n of them away. Of few it is a share of the ball."""

    def lengths(budget: float, needed: float) -> list[float]:
        tiny, found = Tiny(budget, linear=needed * AIM / RATIO / REACH), []
        for steps in (10, STEPS, 4 * STEPS, 100 * STEPS):
            tiny.budgeted.steps = steps
            found.append(tiny.budgeted.optimizer(STEP).param_groups[0]["lr"])
        return found

    whole = STEP * math.sqrt(2 * AIM / RATIO)
    assert lengths(1.0, needed=1.0) == pytest.approx([whole, whole, whole / 2, whole / 10])
    half = 100 ** (-0.5 / 4)  # a ball half as large as needed
    assert lengths(1.0, needed=2.0)[-1] == pytest.approx(half * whole)
    assert lengths(1.0, needed=math.inf) == pytest.approx([whole] * 4)


def test_edits_whose_loss_is_exactly_zero_take_no_step():
    assert Tiny(1.0, linear=0.0).budgeted.optimizer(STEP).param_groups[0]["lr"] == 0


# ---------------------------------------------------------------- how the ball follows what is measured


class Tiny:
    """Two matrices of a tiny model, their rules, and a drift that is so many times what is predicted."""

    def __init__(self, budget: float, times: float = 10.0, linear: float = math.inf) -> None:
        self.matrices = edit_matrices(tiny_llama(), None)
        self.rules = [PricedCoordinates(subspace("auto", m.shape, m.layer), 0.0, DAMPING) for m in self.matrices]
        self.times, self.measurements = times, 0
        self.budgeted = Budgeted(self.matrices, self.rules, budget, self, steps=10, need=Need(linear))

    def measure(self) -> tuple[float, float]:
        self.measurements += 1
        return self.times * float(sum(rule.predicted() for rule in self.rules)), 2.0

    def estimate(self) -> float:
        return self.measure()[0]

    def move(self, size: float = 0.1) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        for rule in self.rules:
            rule.parameter.normal_(generator=generator).mul_(size)
        return [rule.parameter.clone() for rule in self.rules]

    def cost(self) -> float:
        return sum(float(rule.cost()) for rule in self.rules)

    def is_written(self, originals) -> bool:
        return all(
            relative(m.weight, w + rule.delta()) < 1e-6
            for m, rule, w in zip(self.matrices, self.rules, originals, strict=True)
        )


def test_what_is_outside_the_ball_is_projected_onto_it():
    """In the metric nothing in the ball is nearer."""
    with torch.no_grad():
        tiny = Tiny(budget=1.0)
        originals = [matrix.weight.clone() for matrix in tiny.matrices]
        outside = tiny.move(10.0)
        assert tiny.cost() > tiny.budgeted.allowed
        tiny.budgeted.apply()
        assert tiny.cost() == pytest.approx(tiny.budgeted.allowed, rel=1e-5)  # float32
        assert tiny.is_written(originals)
        projected, metrics = [rule.parameter.clone() for rule in tiny.rules], [rule.metric for rule in tiny.rules]
        nearest = length([a - b for a, b in zip(outside, projected, strict=True)], metrics)
        generator = torch.Generator().manual_seed(2)
        for _ in range(50):
            other = [p + torch.randn(p.shape, generator=generator) * p.abs() for p in projected]
            scale = math.sqrt(2 * tiny.budgeted.allowed) / length(other, metrics)
            assert length([a - scale * b for a, b in zip(outside, other, strict=True)], metrics) > nearest


def test_what_is_inside_stays_as_it_is():
    with torch.no_grad():
        tiny = Tiny(budget=1e6)
        inside = tiny.move()
        tiny.budgeted.apply()
        assert all(torch.equal(rule.parameter, one) for rule, one in zip(tiny.rules, inside, strict=True))


def test_the_ball_follows_the_measured_drift_within_bounds():
    with torch.no_grad():
        tiny = Tiny(budget=1.0)
        tiny.move()
        ratio = RATIO
        for times in (15.0, 100.0, 100.0, 1.0, 28.0):
            tiny.times = times
            ratio = min(LEARN * ratio, max(ratio / LEARN, times))
            assert not tiny.budgeted.after_epoch(low=False)
            assert tiny.budgeted.ratio == pytest.approx(ratio)
            assert tiny.budgeted.allowed == pytest.approx(AIM * 1.0 / ratio)
        assert [one.drift for one in tiny.budgeted.spent] == pytest.approx(
            [t * tiny.budgeted.predicted() for t in (15, 100, 100, 1, 28)]
        )
        tiny.budgeted.reset()
        assert (tiny.budgeted.ratio, tiny.budgeted.spent) == (RATIO, [])


def test_a_low_loss_ends_the_edit_within_the_budget_only():
    with torch.no_grad():
        tiny = Tiny(budget=1.0)
        tiny.move()
        for share, over in ((0.99, True), (1.01, False)):
            tiny.budgeted.budget = tiny.measure()[0] / share
            assert tiny.budgeted.after_epoch(low=True) == over


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_what_is_too_much_is_taken_back(power):
    """Where drift is what is predicted, and where it grows more slowly, as between models that are far apart."""
    with torch.no_grad():
        tiny = Tiny(budget=1.0)
        originals = [matrix.weight.clone() for matrix in tiny.matrices]
        learned = tiny.move()
        tiny.measure = lambda: (10 * float(sum(rule.predicted() for rule in tiny.rules)) ** power, 2.0)
        tiny.budgeted.budget = budget = tiny.measure()[0] / 20
        found = tiny.budgeted.keep_within()
        assert 0.5 * budget < tiny.measure()[0] <= budget
        for rule, before in zip(tiny.rules, learned, strict=True):
            assert relative(rule.parameter, (1 - found["taken_back"]) * before) < 1e-5  # float32
        assert tiny.is_written(originals)
        assert found["ratio"] == pytest.approx(tiny.measure()[0] / found["predicted"])


def test_what_is_within_is_left_as_it_is():
    with torch.no_grad():
        tiny = Tiny(budget=1e6)
        learned, tiny.measurements = tiny.move(), 0
        assert tiny.budgeted.keep_within()["taken_back"] == 0
        assert tiny.measurements == 1
        assert all(torch.equal(rule.parameter, one) for rule, one in zip(tiny.rules, learned, strict=True))


# ---------------------------------------------------------------- edits within a budget


@pytest.fixture(scope="module")
def given():
    """Eight facts of the bundled world, and the curvature of a layer."""
    bundled = load_model("bundled")
    texts = capability_texts("bundled", None, 40, 0)
    curvature = Curvature.estimate(bundled.model, bundled.tokenizer, texts, layers=[3])
    return read_edits("bundled:eval", limit=8), curvature


def edited(given, budget, epochs=6, **settings):
    edits, curvature = given
    bundled = load_model("bundled")
    return edit(bundled.model, bundled.tokenizer, edits, curvature=curvature, budget=budget, epochs=epochs, **settings)


def test_edits_stay_within_their_budget_and_get_better_with_it(given):
    results = [edited(given, budget) for budget in (0.0002, 0.002, 0.02)]
    for result, budget in zip(results, (0.0002, 0.002, 0.02), strict=True):
        certificate = result.metrics["budget"]
        assert certificate["budget"] == budget
        assert certificate["met"]
        assert certificate["drift"] <= budget
        assert certificate["low"] < certificate["drift"] < certificate["high"]
        assert certificate["drift"] == result.metrics["capability"]["drift"]
    losses = [result.metrics["edit_loss"]["after"] for result in results]
    assert all(more < less for less, more in itertools.pairwise(losses))


def test_the_certificate_is_measured(given):
    """Against the model itself, loaded anew beside its base."""
    result = edited(given, "0.1%")
    certificate = result.metrics["budget"]
    held_out = given[1].held_out
    base, batches = load_model("bundled"), text_batches(result.model, result.tokenizer, held_out)
    with frozen(base.model), frozen(result.model):
        drift = measure_drift(logits_of(base.model), logits_of(result.model), batches)
    assert certificate["budget"] == pytest.approx(0.001 * drift.loss_base, rel=1e-6)
    assert certificate["drift"] == pytest.approx(drift.drift, rel=1e-4)  # float32 sums of small differences
    assert certificate["texts_sha256"] == texts_hash(held_out)
    # the stored change against the one in float32
    assert certificate["predicted"] == pytest.approx(given[1].predicted_drift(result.delta), rel=1e-2)


def test_every_direction_has_its_own_price_however_wide_the_matrix(given, monkeypatch):
    """In the bases that tokens are turned into the metric is that of the whole eigenbasis: β_i α_j, sorted alike."""
    _, curvature = given
    base = load_model("bundled")
    matrices, config = edit_matrices(base.model, curvature.layers), Config(budget=1.0)
    (narrow,) = config.budget_rules(curvature, matrices)
    monkeypatch.setattr(rule_choice, "TOKENS", 10)
    (wide,) = config.budget_rules(curvature, matrices)
    assert isinstance(wide, PricedLeading)
    assert isinstance(narrow, PricedCoordinates)
    assert torch.allclose(wide.metric - wide.damping, narrow.metric - narrow.damping, rtol=1e-3, atol=1e-9)
    change = torch.randn(matrices[0].shape) * 1e-3
    assert wide.frame is not None
    assert torch.allclose(wide.frame.coordinates(change).abs(), narrow.gradient(change).abs(), atol=1e-7)


def test_drift_is_measured_in_turned_bases_too(given, monkeypatch):
    """As for wide matrices: they are trained, and measured, in bases of their leading directions."""
    monkeypatch.setattr(rule_choice, "TOKENS", 10)
    (matrix,) = edit_matrices(load_model("bundled").model, given[1].layers)
    assert isinstance(*Config(budget=1.0).budget_rules(given[1], [matrix]), PricedLeading)
    certificate = edited(given, 0.002).metrics["budget"]
    assert certificate["met"]
    # what was measured last in the loop is what is measured at the end, of float16 weights
    assert certificate["drift"] == pytest.approx(certificate["ratio"] * certificate["predicted"], rel=1e-2)


def test_auto_counts_unseen_inputs_and_says_how_much(given, monkeypatch):
    """Edits that need more than two hundredths, as eight do if REACH is large: what texts do not show is kept."""
    monkeypatch.setattr(budget_module, "REACH", 1e9)
    results = [edited(given, budget, epochs=2) for budget in ("auto", "6%")]
    assert [result.metrics["budget"]["unseen"] for result in results] == pytest.approx([2 * UNSEEN, 0])
    (name,) = given[1].factors
    factors, elsewhere = given[1].factors[name], []
    for result in results:
        change, predicted = result.delta[name], result.metrics["budget"]["predicted"]
        elsewhere.append(float((change * (factors.G @ change)).sum()) / predicted)
        # of the texts alone; it is the stored change that is compared
        assert predicted == pytest.approx(given[1].predicted_drift(result.delta), rel=1e-2)
    assert elsewhere[0] < 0.8 * elsewhere[1]


def test_budgets_of_a_frontier_count_unseen_inputs_by_their_own_size(given, monkeypatch):
    monkeypatch.setattr(budget_module, "REACH", 1e9)
    rounds = edited(given, "auto", epochs=1, frontier=3).metrics["rounds"]
    assert [each["unseen"] for each in rounds] == pytest.approx([2 * UNSEEN, UNSEEN / 2, 0])


def test_where_not_all_edits_can_be_made_it_is_recorded_and_said(given, capsys):
    tight, loose = (edited(given, budget, epochs=2).metrics for budget in (0.00002, 0.02))
    assert tight["budget"]["preference"] == tight["rounds"][0]["preference"] > 0
    assert loose["budget"]["preference"] == loose["rounds"][0]["preference"] == 0
    assert tight["budget"]["needed"] == loose["budget"]["needed"] > 0.00002 / ENOUGH
    for metrics, said in ((tight, True), (loose, False)):
        print_certificate(metrics["budget"])
        assert ("those come first that take the least" in capsys.readouterr().out) == said


@pytest.mark.parametrize(("ratio", "share"), [(RATIO, 0.1), (2 * RATIO, 0.1), (RATIO / 2, 0.2)])
def test_a_prediction_that_is_better_than_thought_leaves_room_for_more(ratio, share):
    with torch.no_grad():
        tiny = Tiny(budget=1.0, linear=10 * AIM / RATIO / REACH)
        tiny.budgeted.need = Need(tiny.budgeted.need.linear, loss=8.0)
        tiny.budgeted.ratio = ratio
        assert tiny.budgeted.preference == pytest.approx(preference(share, 8.0))
        weigh, losses = tiny.budgeted.weigh, torch.tensor([2.0, 9.0])
        assert torch.equal(weigh(losses), weights(losses, tiny.budgeted.preference, 8.0))
        tiny.budgeted.budget = 5.0
        assert tiny.budgeted.weigh is None


def test_a_budget_needs_texts(given):
    edits, curvature = given
    bundled = load_model("bundled")
    alone = curvature_of(dict(curvature.factors), held_out=(), layers=curvature.layers,
        model_fingerprint=curvature.model_fingerprint, tokenizer=curvature.tokenizer)  # fmt: skip
    with pytest.raises(ConfigError, match="a budget is measured on held-out texts, and this curvature has none"):
        edit(bundled.model, bundled.tokenizer, edits, curvature=alone, budget=0.01)


def test_the_interval_is_over_texts():
    from crispedit.capability import TextSums

    drift = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    sums = TextSums(drift=drift, loss_base=drift, loss=drift, tokens=torch.full((4,), 10.0, dtype=torch.float64))
    found = measured(0.5, sums, "hash")
    assert found["drift"] == pytest.approx(0.3)
    assert found["low"] >= 0.1  # no resample is below its smallest text
    assert found["high"] <= 0.6
    assert (found["met"], found["texts"], found["texts_sha256"]) == (True, 4, "hash")
    assert not measured(0.29, sums, "hash")["met"]


@pytest.mark.slow
def test_evaluate_checks_the_certificate_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate_job, "has_tasks", lambda model: False)  # hundreds of items, which say nothing here
    settings = ["--limit", "6", "--samples", "40", "--layers", "3", "--epochs", "4"]
    assert cli._run(["edit", "bundled", "bundled:eval", *settings, "--budget", "0.5%", "--out", "edited"]) == 0
    said = capsys.readouterr().out
    assert "nats/token (0.5%): drift 0.0" in said
    assert "times too little" in said
    record = json.loads((tmp_path / "edited" / "crispedit.json").read_text())
    evaluate = ["evaluate", "edited", "bundled:eval", "--limit", "6", "--base", "bundled"]
    assert cli._run([*evaluate, "--json", "found.json", "--report", "found.md"]) == 0
    for printed in (capsys.readouterr().out, (tmp_path / "found.md").read_text()):
        assert "Damage budget: Met: drift of 0.0" in printed
        assert "The base is not what was edited" not in printed
    found = json.loads((tmp_path / "found.json").read_text())["capability"]["budget"]
    assert found["met"]
    assert found["same_base"]
    assert found["budget"] == record["metrics"]["budget"]["budget"]
    assert found["recorded"]["drift"] == record["metrics"]["budget"]["drift"]
    assert cli._run([*evaluate[:-1], "edited"]) == 0
    assert "The base is not what was edited: its weights are others" in capsys.readouterr().out
    assert cli._run(["edit", "--rerun", "edited/crispedit.json", "--out", "again"]) == 0
    again = json.loads((tmp_path / "again" / "crispedit.json").read_text())
    assert again["metrics"]["budget"]["drift"] == record["metrics"]["budget"]["drift"]
