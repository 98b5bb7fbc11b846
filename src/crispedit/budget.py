"""A damage budget: the loop spends at most ε nats per token of capability drift, and no γ is chosen.

    minimise  edit loss   subject to   measured drift ≤ ε

by a trust region in the metric of the capability curvature. In the Kronecker eigenbasis that metric is diagonal,
D = λ + μ (under ``auto`` inputs that the texts do not have may count as well,
:meth:`crispedit.priced.PricedCoordinates.count_unseen`), and a change Z of all matrices is predicted to cost ½ Σ D Z²
nats per token. Nothing is left out: every direction has its price. A step goes where the edit loss falls fastest for
what it costs (:mod:`crispedit.natural`), and what then lies outside the ball ½ Σ D Z² ≤ ρ is scaled back onto it, which
is the projection in this metric. How large the ball may be is measured: the prediction takes tokens and matrices for
independent and is too low by a factor of about ten, so drift is measured after every epoch, and ρ is ε over measured /
predicted. Where the ball is far too small, the edit loss is one by which some edits come first
(:mod:`crispedit.triage`).

The problem is that of CrispEdit (arXiv 2602.15823, section 2), which leaves trust regions to future work; what else was
tried is in docs/decisions.md.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from .drift_meter import DriftMeter
from .edits import spread
from .errors import ConfigError
from .models import EditMatrix
from .natural import NaturalDescent
from .ownership import sum_of_all
from .priced import PricedRule
from .rows import EditRow
from .training import RuledMatrices, edit_loss
from .triage import preference, weights

AIM = 0.95
"""The share of the budget that is aimed at: what is measured goes up and down by a few percent from epoch to epoch."""
STEP, STEPS = 0.1, 200
"""The length of the first step, in terms of the ball's radius, in a run of so many steps or fewer; it falls linearly to
zero. Of n steps it is √(STEPS / n) times that: where batches do not agree, steps add up like a walk. In a ball that is
smaller than needed there is a way to go along its surface, and steps stay as long (docs/decisions.md, "A thousand
edits")."""
REACH = 5.0
"""What edits need at least, in terms of :attr:`Need.linear`: measured on the bundled model, 1 to 1,000 edits. Within a
larger ball steps are as long as in one half way between that and the ball, on a logarithmic scale."""
LOOKED_AT = 64
"""Rows from which that is estimated, at most."""
DAMPING = 1e-4
"""μ, in terms of τ at γ 0.9: along directions that cost nothing a step has no length."""
RATIO = 10.0
"""Measured over predicted drift, before it is known; measured on the bundled model."""
LEARN = 2.0
"""That ratio changes at most by this factor from epoch to epoch."""
WITHIN = 0.99
"""The share of the budget that is kept when too much was spent and is taken back."""
DEFAULT, MOST = 0.02, 0.06
"""What ``auto`` stands for, shares of the base model's loss on the texts: the first, or what the edits need if that is
more, but never more than the second; see docs/decisions.md."""
UNSEEN = 0.05
"""What inputs that the texts do not have count under ``auto``, for every :data:`DEFAULT` that is allowed beyond the
first: there what the texts do not show begins to be lost (docs/decisions.md, "The default budget")."""
TRIES = 12
"""Measurements at most while that is done; each learns how far off the prediction is."""


@dataclass(frozen=True)
class Budget:
    """What an edit may cost.

    Args:
        amount: Nats per token; or
        share: of the base model's loss on the texts.
        auto: Whether it is more where the edits need more, up to :data:`MOST`.
    """

    amount: float | None = None
    share: float | None = None
    auto: bool = False

    @classmethod
    def parse(cls, given: "str | float | Budget") -> "Budget":
        """Reads a budget: nats per token, a percentage of the base model's loss such as ``1%``, or ``auto``.

        Args:
            given: The number, or what the user wrote.

        Returns:
            The budget.

        Raises:
            ConfigError: It is neither, or not above 0, or a share above 100%.
        """
        if isinstance(given, Budget):
            return given
        text = str(given).strip()
        if text == "auto":
            return cls(share=DEFAULT, auto=True)
        try:
            value = float(text.removesuffix("%").replace("_", "?"))  # Python reads 1_0 as ten
        except ValueError:
            value = math.nan
        if not 0 < value <= (100 if text.endswith("%") else sys.float_info.max):
            raise ConfigError(
                f"budget is '{given}'; it must be nats per token above 0, such as 0.01, or a share of the base "
                "model's loss up to 100%, such as 1%; auto is 2% or what the edits need, at most 6%"
            )
        return cls(share=value / 100) if text.endswith("%") else cls(amount=value)

    def nats(self, loss_base: float, needed: float = 0.0) -> float:
        """ε, nats per token.

        Args:
            loss_base: Of the base model on the texts.
            needed: :attr:`Need.nats` of the edits.

        Raises:
            ConfigError: It is more than that loss: it would bound nothing that is worth having.
        """
        if self.amount is not None:
            if self.amount > loss_base:
                meant = f"; {self.amount:g}% of it would be --budget {self.amount:g}%" if self.amount <= 100 else ""
                raise ConfigError(
                    f"a budget of {self.amount:g} nats per token is more than the base model's whole loss on the texts "
                    f"({loss_base:.3g}){meant}"
                )
            return self.amount
        least = (self.share or 0.0) * loss_base
        return max(least, min(MOST * loss_base, needed)) if self.auto else least

    def unseen(self, nats: float, loss_base: float) -> float:
        """The share of inputs that the texts do not have in what a change is taken to cost.

        Args:
            nats: ε.
            loss_base: Of the base model on the texts.

        Returns:
            0, save under ``auto`` where edits need more than :data:`DEFAULT`; then :data:`UNSEEN` for each more.
        """
        return UNSEEN * max(0.0, nats / (DEFAULT * loss_base) - 1) if self.auto else 0.0

    def __str__(self) -> str:
        if self.auto:
            return "auto"
        return f"{self.amount:g}" if self.amount is not None else f"{100 * (self.share or 0.0):g}%"


@dataclass(frozen=True)
class Need:
    """What edits are estimated to need, before any is made; without arguments, nothing is known of it.

    Args:
        linear: The drift that they would take if their loss went on to fall as it does at first, as the curvature
            predicts it, nats per token.
        loss: The mean over the edits of the loss of a whole target, nats.
    """

    linear: float = math.inf
    loss: float = math.inf

    @property
    def predicted(self) -> float:
        """Drift in which they can be made, as the curvature predicts it; nats per token."""
        return REACH * self.linear

    @property
    def nats(self) -> float:
        """The budget in which they can be made, before it is known how far off the prediction is; nats per token."""
        return self.predicted * RATIO / AIM

    def share(self, allowed: float) -> float:
        """How much of it a predicted drift of so many nats per token is; 1 where nothing is needed."""
        return allowed / self.predicted if self.predicted > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What an epoch left.

    Args:
        drift: Measured on a sample of the texts, or on all; nats per token.
        predicted: By the curvature, unseen inputs as far as they count.
        allowed: The most that could be predicted so, ρ.
    """

    drift: float
    predicted: float
    allowed: float


class Budgeted(RuledMatrices):
    """Matrices that are trained inside a ball of predicted drift, and the ball.

    Args:
        matrices: What is edited, inside :func:`crispedit.precision.float32_masters`.
        rules: One per matrix, damped; their own price is 0.
        budget: ε, nats per token.
        meter: Of drift.
        steps: At most.
        ratio: Measured over predicted drift, before it is known.
        need: Of the edits, where the texts alone count. It tells how long steps are where the ball is larger than that,
            and which edits come first where it is far smaller.
    """

    def __init__(
        self,
        matrices: Sequence[EditMatrix],
        rules: Sequence[PricedRule],
        budget: float,
        meter: DriftMeter,
        steps: int,
        ratio: float = RATIO,
        need: Need = Need(),
    ) -> None:
        super().__init__(matrices, rules)
        self.priced = cast(Sequence[PricedRule], self.rules)
        self.budget, self.meter, self.steps, self.need = budget, meter, steps, need
        self.first = self.ratio = ratio
        self.spent: list[Spent] = []

    @property
    def allowed(self) -> float:
        """ρ: the most drift that may be predicted, nats per token."""
        return AIM * self.budget / self.ratio

    @property
    def preference(self) -> float:
        """q: above 0 where not all edits can be made (:mod:`crispedit.triage`).

        Where the prediction turns out to be better than on the bundled model there is room for more. Where it is worse,
        that is of what is spent on the few edits that are made, and says nothing about all.
        """
        return preference(self.need.share(AIM * self.budget / min(self.ratio, RATIO)), self.need.loss)

    @property
    def weigh(self) -> Callable[[Tensor], Tensor] | None:
        """Edits that are nearer weigh more where not all can be made."""
        q = self.preference
        return partial(weights, preference=q, loss=self.need.loss) if q > 0 else None

    def optimizer(self, lr: float) -> NaturalDescent:
        """Steepest descent in the metric; a step is ``lr`` times the ball's radius, or less if that will do."""
        metrics = [rule.metric for rule in self.priced]
        radius = math.sqrt(2 * math.sqrt(self.allowed * min(self.allowed, self.need.predicted)))
        share = min(1.0, self.need.share(self.allowed))
        walk = min(1.0, STEPS / self.steps) ** (0.5 * share**2)
        return NaturalDescent(self.parameters, metrics, lr * walk * radius, self.steps)

    def reset(self) -> None:
        """The rules' parameters, and the ball, as they were."""
        super().reset()
        self.ratio, self.spent = self.first, []

    def predicted(self) -> float:
        """½ Σ λ Z², nats per token."""
        return float(self._sum([rule.predicted() for rule in self.priced]))

    def charged(self) -> float:
        """½ Σ (D − μ) Z², nats per token: of what the ball bounds, all but the damping."""
        return float(self._sum([rule.charged() for rule in self.priced]))

    def _sum(self, of_rules: Sequence[Tensor]) -> Tensor:
        """Scalars, one per rule, of all rules of all processes together."""
        device = self.parameters[0].device
        return sum_of_all(torch.stack([one.to(device) for one in of_rules]).sum())

    def apply(self) -> None:
        """Scales back onto the ball what is outside it, and writes W₀ + ΔW."""
        cost = self._sum([rule.cost() for rule in self.priced])
        self._scale((self.allowed / cost).sqrt().clamp(max=1))
        super().apply()

    def _scale(self, factor: Tensor | float) -> None:
        for parameter in self.parameters:
            parameter.mul_(factor.to(parameter.device) if isinstance(factor, Tensor) else factor)

    def go_to(self, parameters: Sequence[Tensor]) -> None:
        """Gives the rules other parameters, and the model what they stand for."""
        for parameter, other in zip(self.parameters, parameters, strict=True):
            parameter.copy_(other)
        super().apply()

    def after_epoch(self, low: bool) -> bool:
        """Measures, and learns how far off the prediction is.

        Args:
            low: Whether the edit loss is low enough.

        Returns:
            Whether it is, within the budget.
        """
        drift, predicted = self.meter.estimate(), self.charged()
        self.spent.append(Spent(drift=drift, predicted=predicted, allowed=self.allowed))
        if predicted > 0:
            self.ratio = min(LEARN * self.ratio, max(self.ratio / LEARN, drift / predicted))
        return low and drift <= self.budget

    def keep_within(self) -> dict[str, Any]:
        """Takes back what is above the budget: all changes are scaled down until drift, measured, is within it.

        Returns:
            For the record: ``preference`` (q, :mod:`crispedit.triage`), ``course`` (the fields of :class:`Spent` by
            epoch), ``taken_back`` (the share of the change), and ``drift``, ``predicted`` drift (on such texts) and
            their ``ratio`` at the end.
        """
        drift, kept = self.meter.measure()[0], 1.0
        for _ in range(TRIES):
            if drift <= self.budget:
                break
            factor = math.sqrt(WITHIN * self.budget / drift)  # drift is about quadratic in the change
            kept *= factor
            self._scale(factor)
            super().apply()
            drift = self.meter.measure()[0]
        predicted = self.predicted()
        return {
            "drift": drift,
            "preference": self.preference,
            "course": [asdict(one) for one in self.spent],
            "taken_back": 1 - kept,
            "predicted": predicted,
            "ratio": drift / predicted if predicted > 0 else None,
        }


def estimate_need(
    model: Any, matrices: Sequence[EditMatrix], rules: Sequence[PricedRule], rows: Sequence[EditRow]
) -> Need:
    """The drift that edits would take if their loss L went on to fall as it does at first: ½ L² / Σ g² / D.

    Of all steps as long as s in the metric, the steepest one lowers the loss by s |g|, |g|² = Σ g² / D. Of many edits
    some are looked at; those of different things have gradients that are about orthogonal, so that n times as many
    take n times the drift.

    Args:
        model: The causal LM.
        matrices: What is edited and requires gradients, inside :func:`crispedit.rotation.rotated` where rules want it.
        rules: One per matrix, damped.
        rows: The edits' rows.

    Returns:
        That, as the curvature predicts it, and the loss.
    """
    some = spread(rows, LOOKED_AT)
    tokens, total, gradients = sum(row.num_targets for row in some), 0.0, []
    wanted = [matrix.parameter for matrix in matrices]
    for first in range(0, len(some), 8):
        batch = some[first : first + 8]
        loss = edit_loss(model, batch) * (sum(row.num_targets for row in batch) / tokens)
        total += float(loss.detach())
        gradients.append(torch.autograd.grad(loss, wanted))
    of_own = torch.zeros((), device=matrices[0].parameter.device)
    for matrix, rule, parts in zip(matrices, rules, zip(*gradients, strict=True), strict=True):
        of_own += (rule.gradient(matrix.as_weight(sum(parts))).square() / rule.metric).sum().to(of_own.device)
    square = float(sum_of_all(of_own))
    return Need(
        linear=len(rows) / len(some) * 0.5 * total**2 / square if square > 0 else math.inf,
        loss=total * tokens / len(some),
    )
