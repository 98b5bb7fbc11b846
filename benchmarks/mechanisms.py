"""Ways to keep to a damage budget that lost against the trust region of crispedit.budget; see docs/decisions.md.

All have the budget's damped coordinates, measurements and taking back; they differ in what makes a step and in what
follows the measured drift, or in what is minimised. ``benchmarks/budget.py --mechanisms`` runs them.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from crispedit.adam import adam
from crispedit.budget import AIM, Budgeted
from crispedit.editors import crispedit

RATE = 8.0
"""Adam's learning rate, times d_in."""
RATIO = 8.0
"""Measured over predicted drift, where the first price is set."""
TIGHTEN, RELAX = 4.0, 0.25
"""The price changes at most by these factors from epoch to epoch."""


class _Adam(Budgeted):
    """Adam on the coordinates in place of steps in the metric; of the mean loss."""

    preference = 0.0

    def optimizer(self, lr: float) -> Any:
        width = max(matrix.shape[1] for matrix in self.matrices)
        return adam(self.parameters, RATE / width)


class AdamInBall(_Adam):
    """Adam, and the nearest point of the ball in Euclid's distance: Z / (1 + ν D/τ), ν by bisection."""

    def apply(self) -> None:
        """After a projection."""
        costs = [(rule.metric / rule.threshold, 0.5 * rule.metric * rule.parameter.square()) for rule in self.priced]

        def cost(nu: float) -> float:
            return sum(float((part / (1 + nu * share).square()).sum()) for share, part in costs)

        if cost(0.0) > self.allowed:
            low, high = 1e-12, 1e12
            for _ in range(40):
                middle = math.sqrt(low * high)
                low, high = (middle, high) if cost(middle) > self.allowed else (low, middle)
            for rule, (share, _) in zip(self.priced, costs, strict=True):
                rule.parameter.div_(1 + high * share)
        super().apply()


class Priced(_Adam):
    """Adam, and after every step Z ← Z / (1 + s D/τ); the price s follows the measured drift."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        width = max(matrix.shape[1] for matrix in self.matrices)
        self.first = self._first_price(RATE / width * math.sqrt(self.steps))
        self._ask(self.first)

    @property
    def allowed(self) -> float:
        """There is no ball."""
        return math.inf

    def reset(self) -> None:
        """The price too."""
        super().reset()
        self._ask(self.first)

    def _ask(self, price: float) -> None:
        for rule in self.priced:
            rule.price = price

    def _first_price(self, reach: float) -> float:
        """The price at which coordinates that all go as far as they can are predicted to cost the budget."""
        low, high = 1e-12, 1e30
        while high > 1.01 * low:
            middle, total = math.sqrt(low * high), 0.0
            for rule in self.priced:
                rest = (reach / (middle / rule.threshold * rule.metric)).clamp(max=reach)
                total += 0.5 * float((rule.metric * rest.square()).sum())
            low, high = (low, middle) if total <= self.budget / RATIO else (middle, high)
        return high

    def after_epoch(self, low: bool) -> bool:
        """Measures, and adapts the price."""
        over = super().after_epoch(low)
        share = self.spent[-1].drift / (AIM * self.budget)
        self._ask(self.priced[0].price * min(TIGHTEN, max(RELAX, share)))
        return over

    def keep_within(self) -> dict[str, Any]:
        """With nothing taken by the way."""
        self._ask(0.0)
        return super().keep_within()


class Masked(Priced):
    """Adam, and a hard mask at D ≤ τ / s; s follows the measured drift."""

    def apply(self) -> None:
        """After the mask."""
        for rule in self.priced:
            if rule.price > 0:
                rule.parameter.mul_(rule.metric * rule.price <= rule.threshold)
        prices = [rule.price for rule in self.priced]
        self._ask(0.0)
        super().apply()
        self._ask(prices[0])


class Filtered(Priced):
    """Adam's step times μ / (D + μ), μ = τ / s: the quadratically penalised step; s follows the measured drift."""

    def reset(self) -> None:
        """The filtered parameters too."""
        super().reset()
        self.last = [parameter.clone() for parameter in self.parameters]

    def apply(self) -> None:
        """After the filter."""
        prices = [rule.price for rule in self.priced]
        for rule, last in zip(self.priced, self.last, strict=True):
            step = (rule.parameter - last).div_(1 + rule.price / rule.threshold * rule.metric)
            rule.parameter.copy_(last.add_(step))
        self._ask(0.0)
        super().apply()
        self._ask(prices[0])


class MeanLoss(Budgeted):
    """The trust region, with the mean loss even where not all edits can be made."""

    preference = 0.0


KINDS = {"mean loss": MeanLoss, "adam in the ball": AdamInBall, "priced": Priced, "mask": Masked, "filter": Filtered}
TRUST_REGION = "trust region"
"""The mechanism of the package itself."""


@contextmanager
def mechanism(name: str) -> Iterator[None]:
    """Within, budgets are kept in another way."""
    kept = crispedit.Budgeted
    crispedit.Budgeted = KINDS.get(name, kept)  # type: ignore[misc]
    try:
        yield
    finally:
        crispedit.Budgeted = kept  # type: ignore[misc]
