"""CrispEdit, batch: fine-tuning in the low-curvature subspace of the capability loss.

    A = E[a aᵀ] = U_A diag(α) U_Aᵀ,   G = E[g gᵀ] = U_G diag(β) U_Gᵀ
    W = W₀ + U_G (M ⊙ Z) U_Aᵀ,   M zero at the pairs of largest β_i α_j, which hold γ of their sum

Adam trains the coordinates Z, so that the applied update never leaves the subspace; what is too wide for that goes by
another rule that does not leave it either. With ``energy`` 0 there is no subspace to keep to, and this is plain
fine-tuning: Adam on W itself. (CrispEdit, arXiv 2602.15823, Algorithm 1.) With a ``budget`` nothing is left out, and
every direction has its price, such that measured drift stays within the budget (:mod:`crispedit.budget`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from .. import distributed
from ..budget import DAMPING, RATIO, STEP, Budget, Budgeted, Need, estimate_need
from ..curvature import Curvature
from ..drift_meter import DriftMeter
from ..errors import ConfigError
from ..models import EditMatrix
from ..ownership import owned
from ..priced import PRICE, PricedRule, priced_rule
from ..rotation import rotated
from ..rule_choice import metric_form, rule_elsewhere, update_rule
from ..spectra import Constraint
from ..subspace import Subspace
from ..training import rows_per_step
from ..updates import ROTATION, Elsewhere, Update, UpdateRule
from ._gradient import PUBLISHED, RuledConfig, train_in, train_rules, unconstrained
from .base import EditProblem, Presets, Round

Made = TypeVar("Made", bound=UpdateRule)

REPLACED = ("energy", "constraint", "update", "rotation", "price", "lr", "first_lr")
"""Settings that a budget takes the place of."""


class SubspaceConfig(RuledConfig):
    """Settings of the loop, and of the subspace.

    Args:
        energy: γ, the share of the curvature that the excluded directions hold; 0 is plain fine-tuning.
        constraint: Which directions are left out; see :meth:`crispedit.curvature.Curvature.subspace`.
        update: How a gradient becomes a change of the weights; see :mod:`crispedit.updates`. ``auto`` is the best
            rule that is known to cost little, by counting (:func:`crispedit.rule_choice.chosen_update`).
        rotation: What the bases of update ``leading`` may cost; see :func:`crispedit.updates.leading_counts`.
        price: Of update ``priced``; see :class:`crispedit.priced.PricedCoordinates`.
    """

    presets: ClassVar[Presets] = {"published": {**PUBLISHED, "constraint": "staircase", "update": "projected-gradient"}}
    in_rounds: ClassVar[dict[str, Any]] = {**RuledConfig.in_rounds, "update": "priced"}

    energy: Annotated[float, Field(ge=0, lt=1)] = 0.9
    constraint: Constraint | Literal["auto"] = "auto"
    update: Update | Literal["auto"] = "auto"
    rotation: Annotated[float, Field(ge=0)] = ROTATION
    price: Annotated[float, Field(ge=0)] = PRICE

    def needs_curvature(self) -> bool:
        """Unless nothing is left out."""
        return self.energy > 0

    def subspace(self, curvature: Curvature, name: str) -> Subspace | None:
        """The low-curvature subspace; none is kept to where every direction has its price."""
        if self.energy == 0 or self.update == "priced":
            return None
        return curvature.subspace(name, self.energy, self.constraint)

    def rules(self, curvature: Curvature, matrices: Sequence[EditMatrix]) -> list[UpdateRule]:
        """The update rules of matrices under a curvature."""
        return _made(
            matrices,
            lambda name: curvature.subspace(name, self.energy, self.constraint),
            lambda found: update_rule(self.update, found, self.rotation, self.price),
            lambda matrix, found: rule_elsewhere(matrix, self.update, found, self.rotation),
        )


class Config(SubspaceConfig):
    """Settings of CrispEdit: those of the loop, and of the subspace or the budget.

    Args:
        budget: The most drift on the held-out texts, in nats per token or as a percentage of the base model's loss on
            them (``1%``; ``auto`` is 2%, or what the edits need, at most 6%, and from 2% on inputs that the texts do
            not have count as well), in place of ``energy``; see :mod:`crispedit.budget`.
        frontier: How many budgets are edited within, one after the other, from ``budget`` down, each half of the one
            before; what was learned there is where the next begins. What is kept is the first.
    """

    budget: float | str | None = None
    frontier: Annotated[int, Field(ge=1, le=20)] = 1

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.budget is not None:
            Budget.parse(self.budget)
            # neither what is the default, nor what it is in rounds, was anybody's choice
            defaults = {name: field.default for name, field in type(self).model_fields.items()}
            others = [n for n in REPLACED if getattr(self, n) not in (defaults[n], self.in_rounds.get(n))]
            if others:
                raise ConfigError(f"budget takes the place of {', '.join(others)}: give one or the other")
        elif self.frontier > 1:
            raise ConfigError("a frontier is of budgets: give --budget, the largest of them")
        return self

    def asks_after_rounds(self) -> bool:
        """Where a frontier is wanted."""
        return self.frontier > 1

    def subspace(self, curvature: Curvature, name: str) -> Subspace | None:
        """The low-curvature subspace; none is kept to where every direction has its price."""
        return super().subspace(curvature, name) if self.budget is None else None

    def budget_rules(self, curvature: Curvature, matrices: Sequence[EditMatrix]) -> list[PricedRule]:
        """The rules of matrices that are trained within a budget."""
        return _made(
            matrices,
            lambda name: metric_subspace(curvature, name, self.energy),
            lambda found: priced_rule(found, 0.0, math.inf, DAMPING),
            lambda matrix, found: rule_elsewhere(matrix, "priced", found, math.inf),
        )


def metric_subspace(curvature: Curvature, name: str, energy: float) -> Subspace:
    """A matrix with all that is known of its curvature: what its metric is made of.

    Where a direction has no price of its own, but the mean of many, those that cost nothing are not used, and those
    that cost much are: all eigenpairs of dense factors are found, however wide they are (docs/decisions.md).

    Args:
        curvature: Of the capability loss.
        name: Of the matrix.
        energy: γ, in terms of which the metric is damped.

    Returns:
        The subspace: a staircase, or a cross, in whose bases the matrix is seen, where that is the cheaper way to turn.
    """
    if curvature.factors[name].dense is None:
        return curvature.subspace(name, energy, "cross")
    spectrum = curvature.spectrum(name)
    return Subspace.of(spectrum, energy, metric_form(spectrum.shape))


def _made(
    matrices: Sequence[EditMatrix],
    subspace_of: Callable[[str], Subspace],
    rule: Callable[[Subspace], Made],
    elsewhere: Callable[[EditMatrix, Subspace], Elsewhere],
) -> list[Made | Elsewhere]:
    """A rule for every matrix that this process trains, made of its subspace where the matrix is; for others the bases.

    Subspaces are asked for by all processes, which solve their eigenproblems together.
    """
    found: list[Made | Elsewhere] = []
    for matrix, own in zip(matrices, owned(matrices), strict=True):
        subspace = subspace_of(matrix.name)
        found.append(rule(subspace.to(matrix.parameter.device)) if own else elsewhere(matrix, subspace))
    return found


def edit(problem: EditProblem, config: Config) -> Iterator[Round]:
    """Edits in one round.

    Args:
        problem: What is to be edited.
        config: Settings.

    Yields:
        One round.

    Raises:
        ConfigError: ``energy`` is above 0 and the problem has no curvature.
    """
    if config.budget is not None:
        yield from _within_budgets(problem, config)
        return
    if config.energy == 0:
        rules = unconstrained(problem)
    elif problem.curvature is None:
        raise ConfigError("an energy above 0 needs a curvature: give --curvature or --texts")
    else:
        rules = config.rules(problem.curvature, problem.matrices)
    every = range(len(problem.edits))
    yield Round(num_edits=len(every), trace=train_rules(problem, config, rules, every))


def _within_budgets(problem: EditProblem, config: Config) -> Iterator[Round]:
    """A round per budget, the largest first; it spends at most that much."""
    assert config.budget is not None
    assert problem.curvature is not None
    if not problem.held_out:
        raise ConfigError("a budget is measured on held-out texts, and this curvature has none: give --texts")
    rules = config.budget_rules(problem.curvature, problem.matrices)
    every = range(len(problem.edits))
    steps = config.epochs * -(-len(every) // rows_per_step(len(every), config.batch_size))
    budget = Budget.parse(config.budget)
    meter = DriftMeter(problem.model, problem.matrices, problem.held_out, problem.progress)
    with rotated(problem.matrices, [rule.frame for rule in rules]):
        estimated = estimate_need(problem.model, problem.matrices, rules, problem.rows)
    loss_base = meter.measure()[1]
    most, *known = distributed.from_main(  # the same bits decide everywhere
        lambda: [budget.nats(loss_base, estimated.nats), estimated.linear, estimated.loss]
    )
    need = Need(*known)
    ratio, largest = RATIO, [rule.parameter for rule in rules]
    for halvings in range(config.frontier):
        nats = most / 2**halvings
        unseen = budget.unseen(nats, loss_base)
        for rule in rules:
            rule.count_unseen(unseen)
        with rotated(problem.matrices, [rule.frame for rule in rules]):
            trainee = Budgeted(problem.matrices, rules, nats, meter, steps, ratio, need)
            trace = train_in(problem, config, trainee, every, lr=STEP)
            found = trainee.keep_within()
        ratio = trainee.ratio
        if halvings == 0:
            largest = [parameter.clone() for parameter in trainee.parameters]
            needed = need.nats if need.nats < math.inf else None
            certified = {"said": str(budget), "budget": nats, "needed": needed, "unseen": unseen, **found}
        details = {"budget": nats, "unseen": unseen, "preference": found["preference"], "drift": found["drift"]}
        yield Round(num_edits=len(every), trace=trace, details=details, budget=certified)
    if config.frontier > 1:  # what is kept is the edit within the whole budget
        with rotated(problem.matrices, [rule.frame for rule in rules]):
            Budgeted(problem.matrices, rules, most, meter, steps).go_to(largest)
