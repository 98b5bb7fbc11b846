"""A damage budget: the loop spends at most ε nats per token of capability drift, and no γ is chosen.

    minimise  edit loss   subject to   measured drift ≤ ε

is solved by its Lagrangian. Every step of Adam is followed by a proximal step on s/2 Σ (λ_ij/τ) Z_ij², the drift that
the curvature predicts, in the Kronecker eigenbasis: Z ← Z / (1 + s λ/τ). Nothing is left out; every direction has its
price (:class:`crispedit.updates.PricedCoordinates`). The price s is the multiplier, and is looked for while the edits
are learned: after every epoch drift is *measured*, and s rises where it is above what is aimed at and falls where it is
below. So the prediction is only asked which directions are dear, not how much they cost: it is off by a factor of about
ten, since K-FAC takes tokens and matrices for independent, and the factor is learned. At the end, what is still too
much is taken back along the same prices.

The problem is that of CrispEdit (arXiv 2602.15823, section 2); what solves it here, and what else was tried, is in
docs/decisions.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .errors import ConfigError
from .models import EditMatrix
from .training import RuledMatrices
from .updates import PricedRule

AIM = 0.9
"""The share of the budget that is aimed at: measured drift goes up and down by a few percent from epoch to epoch."""
TIGHTEN, RELAX = 4.0, 0.25
"""The price changes at most by these factors from epoch to epoch."""
WITHIN = 0.99
"""The share of the budget that is kept when too much was spent and is taken back."""
TRIES = 12
"""Measurements at most while that is done; each learns how far off the prediction is."""
RATIO = 8.0
"""What drift is at the first measurement, in terms of the prediction; measured on the bundled model."""

Measure = Callable[[Mapping[str, Tensor]], tuple[float, float]]
"""Measures the model as it is, on held-out texts: drift from the base and the base's loss, nats per token. It is given
what the matrices are in the base, by name, in the bases in which they are seen at the moment."""


@dataclass(frozen=True)
class Budget:
    """What an edit may cost.

    Args:
        amount: Nats per token; or
        share: of the base model's loss on the texts.
    """

    amount: float | None = None
    share: float | None = None

    @classmethod
    def parse(cls, given: "str | float | Budget") -> "Budget":
        """Reads a budget: a number of nats per token, or a percentage of the base model's loss such as ``1%``.

        Args:
            given: The number, or what the user wrote.

        Returns:
            The budget.

        Raises:
            ConfigError: It is neither, or not above 0.
        """
        if isinstance(given, Budget):
            return given
        text = str(given).strip()
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ConfigError(
                f"budget is '{given}'; it must be nats per token above 0, such as 0.01, or a share of the base "
                "model's loss, such as 1%"
            )
        return cls(share=value / 100) if text.endswith("%") else cls(amount=value)

    def nats(self, loss_base: float) -> float:
        """ε, nats per token, of a base model with this loss on the texts."""
        return self.amount if self.amount is not None else (self.share or 0.0) * loss_base

    def __str__(self) -> str:
        return f"{self.amount:g}" if self.amount is not None else f"{100 * (self.share or 0.0):g}%"


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What an epoch left.

    Args:
        drift: Measured, nats per token.
        predicted: By the curvature.
        price: s, during the epoch.
    """

    drift: float
    predicted: float
    price: float


class Budgeted(RuledMatrices):
    """Matrices through rules that put a price on curvature, and the price.

    Args:
        matrices: What is edited, inside :func:`crispedit.precision.float32_masters`.
        rules: One per matrix.
        budget: ε, nats per token.
        measure: See :data:`Measure`.
        reach: How far a coordinate comes in the run if nothing holds it, about: sets the first price.
    """

    def __init__(
        self,
        matrices: Sequence[EditMatrix],
        rules: Sequence[PricedRule],
        budget: float,
        measure: Measure,
        reach: float,
    ) -> None:
        super().__init__(matrices, rules)
        self.priced, self.budget = rules, budget
        base = {matrix.name: original for matrix, original in zip(matrices, self._originals, strict=True)}
        self.drift: Callable[[], float] = lambda: measure(base)[0]
        self.first = _first_price(rules, budget / RATIO, reach)
        self.spent: list[Spent] = []
        self._ask(self.first)

    @property
    def price(self) -> float:
        """s, of all matrices."""
        return self.priced[0].price

    def _ask(self, price: float) -> None:
        for rule in self.priced:
            rule.price = price

    def reset(self) -> None:
        """The rules' parameters, and the price, as they were."""
        super().reset()
        self.spent = []
        self._ask(self.first)

    def predicted(self) -> float:
        """½ Σ λ Z², nats per token."""
        return sum(rule.predicted() for rule in self.priced)

    def after_epoch(self, low: bool) -> bool:
        """Measures, and adapts the price.

        Args:
            low: Whether the edit loss is low enough.

        Returns:
            Whether it is, within the budget.
        """
        drift = self.drift()
        self.spent.append(Spent(drift=drift, predicted=self.predicted(), price=self.price))
        self._ask(self.price * min(TIGHTEN, max(RELAX, drift / (AIM * self.budget))))
        return low and drift <= self.budget

    def keep_within(self) -> dict[str, Any]:
        """Takes back what is above the budget, the dearest first.

        Every coordinate is divided by 1 + ν λ/τ, with the smallest ν for which the drift, measured, is within the
        budget: of all changes of that predicted drift it is the nearest to what was learned.

        Returns:
            For the record: ``course`` (the fields of :class:`Spent` by epoch), ``taken_back`` (ν), and ``predicted``
            and ``ratio`` (measured over predicted drift) at the end.
        """
        learned = [rule.parameter.clone() for rule in self.priced]
        self._ask(0.0)  # from now on nothing is taken by the way
        drift, back = self.drift(), 0.0
        for _ in range(TRIES):
            if drift <= self.budget:
                break
            ratio = drift / max(self.predicted(), 1e-30)
            back = self._just_enough(learned, WITHIN * self.budget / ratio)
            self._divide(learned, back)
            self.apply()
            drift = self.drift()
        predicted = self.predicted()
        return {
            "course": [asdict(one) for one in self.spent],
            "taken_back": back,
            "predicted": predicted,
            "ratio": drift / predicted if predicted > 0 else None,
        }

    def _divide(self, learned: Sequence[Tensor], back: float) -> None:
        for rule, parameter in zip(self.priced, learned, strict=True):
            rule.parameter.copy_(parameter)
            rule.take(back)

    def _just_enough(self, learned: Sequence[Tensor], wanted: float) -> float:
        """The ν that brings the predicted drift down to what is wanted, by bisection."""
        low, high = 0.0, 1e-6
        while high < 1e30:
            self._divide(learned, high)
            if self.predicted() <= wanted:
                break
            low, high = high, 10 * high
        for _ in range(30):
            middle = math.sqrt(max(low, high / 10) * high)
            self._divide(learned, middle)
            low, high = (low, middle) if self.predicted() <= wanted else (middle, high)
        return high


def _first_price(rules: Sequence[PricedRule], wanted: float, reach: float) -> float:
    """The price at which coordinates that all go as far as they can have this predicted drift.

    A coordinate that Adam moves by η a step rests at η τ / (s λ), or gets as far as ``reach`` if that is nearer; with
    steps that do not all point one way both are taken for what √T of T steps do.
    """
    low, high = 1e-12, 1e30
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        total = 0.0
        for rule in rules:
            rest = (reach / (middle / rule.threshold * rule.curvatures)).clamp(max=reach)
            total += 0.5 * float((rule.curvatures * rest.square()).nan_to_num().sum())
        low, high = (low, middle) if total <= wanted else (middle, high)
    return high
