"""Update rules that leave nothing out: every direction is free, and has its price.

A mask lets all that is below its threshold τ go for nothing, and what is above it not at all. Here a change Z in the
Kronecker eigenbasis costs ½ Σ D Z², D = λ + μ, which is what the curvature predicts as drift where μ is 0: a proximal
step after every step of Adam pulls back by it (``priced``), or a ball bounds it (:mod:`crispedit.budget`).
"""

from typing import Self

import torch
from torch import Tensor

from .errors import ConfigError
from .subspace import Subspace
from .threshold import energy_threshold
from .updates import ROTATION, BaseRule, Elsewhere, leading_counts, leading_frame, not_carried, turned_moments

PRICE = 0.01
"""What ``priced`` asks by default: see docs/decisions.md."""


class _Priced(BaseRule):
    """Coordinates that are all free, and pulled back by what they cost; see :class:`PricedCoordinates`.

    Args:
        curvatures: λ by coordinate, (d_out, d_in) float32, not negative.
        threshold: τ, in terms of which prices are.
        price: s.
        damping: μ / τ: what every direction costs beside its curvature.
    """

    def __init__(self, curvatures: Tensor, threshold: float, price: float, damping: float) -> None:
        self.threshold, self.price, self.damping = threshold, price, damping * threshold
        self.unseen, self._mean = 0.0, curvatures.mean(dim=1, keepdim=True)
        self.metric = curvatures.add_(self.damping)
        self.parameter = torch.zeros_like(curvatures)

    def count_unseen(self, share: float) -> None:
        """Counts inputs that the texts do not have: D = β (α + a ᾱ) + μ, ᾱ the mean of α over all directions.

        A is what the texts put in, and a direction that they hardly use is flat; other inputs may use it. So many of
        them are taken to lie in all directions alike. G, what comes of an output, is the texts' still.

        Args:
            share: a, inputs of that kind for one of the texts'; 0 at first.
        """
        self.metric += (share - self.unseen) * self._mean
        self.unseen = share

    def stepped(self) -> None:
        """Z ← Z / (1 + s D/τ)."""
        if self.price > 0:
            self.parameter.div_((self.metric * (self.price / self.threshold)).add_(1))

    def cost(self) -> Tensor:
        """½ Σ D Z², a scalar in float64."""
        return 0.5 * (self.metric * self.parameter.square()).sum(dtype=torch.float64)

    def charged(self) -> Tensor:
        """½ Σ (D − μ) Z²: the predicted drift, unseen inputs as far as they count; a scalar in float64."""
        undamped = self.cost() - 0.5 * self.damping * self.parameter.square().sum(dtype=torch.float64)
        return undamped.clamp(min=0)

    def predicted(self) -> Tensor:
        """½ Σ λ Z²: the drift that the curvature predicts on texts like its own, nats per token; likewise."""
        unseen = 0.5 * self.unseen * (self._mean * self.parameter.square()).sum(dtype=torch.float64)
        return (self.charged() - unseen).clamp(min=0)


class PricedCoordinates(_Priced):
    """W = W₀ + U_G Z U_Aᵀ, Adam on Z, and after every step Z ← Z / (1 + s λ/τ): nothing is left out.

    What follows the step of Adam is a proximal step on s/2 Σ (λ/τ) Z², a multiple of the drift that the curvature
    predicts: every direction has its price. A mask lets all that is below its threshold τ go for nothing, and what is
    above it not at all; round after round, what is below adds up.

    Args:
        subspace: Of the matrix; its spectrum is complete.
        price: s: a coordinate of curvature τ keeps 1 / (1 + s) of itself in a step.
        damping: μ / τ.
    """

    def __init__(self, subspace: Subspace, price: float, damping: float = 0.0) -> None:
        self.spectrum = spectrum = subspace.spectrum
        table = subspace.threshold.table
        curvatures = torch.outer(spectrum.beta, spectrum.alpha).clamp(min=0).float() if table is None else table.float()
        device = spectrum.input_basis.device
        super().__init__(curvatures.to(device, copy=True), _positive(subspace.threshold.tau), price, damping)

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """U_Gᵀ ∇W U_A."""
        return self.spectrum.output_basis.T @ weight_gradient @ self.spectrum.input_basis

    def delta(self) -> Tensor:
        """U_G Z U_Aᵀ."""
        return self.spectrum.output_basis @ self.parameter @ self.spectrum.input_basis.T

    def carried(self, before: Self, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """Turned into this basis."""
        return turned_moments(before.spectrum, self.spectrum, mean, square)


class PricedLeading(_Priced):
    """The same in the bases of :class:`crispedit.updates.LeadingCoordinates`.

    What is not known of a spectrum is taken for flat.

    Args:
        subspace: A cross; the directions that it takes are turned at least.
        price: s.
        rotation: What the bases may cost: see :func:`leading_counts`.
        damping: μ / τ.
    """

    def __init__(self, subspace: Subspace, price: float, rotation: float = ROTATION, damping: float = 0.0) -> None:
        self.frame = leading_frame(subspace, rotation)
        spectrum = subspace.spectrum
        (r, c), (d_out, d_in) = leading_counts(subspace, rotation), subspace.shape
        alpha = _with_mean(spectrum.alpha, spectrum.traces[0], c, d_in)
        beta = _with_mean(spectrum.beta, spectrum.traces[1], r, d_out)
        threshold = energy_threshold(alpha, beta, subspace.threshold.captured)
        device = spectrum.input_basis.device
        super().__init__(torch.outer(beta, alpha).float().to(device), _positive(threshold.tau), price, damping)

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """∇W', W' being W in the bases."""
        return weight_gradient

    def delta(self) -> Tensor:
        """Z: the change of W'."""
        return self.parameter

    def carried(self, before: Self, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """Refused, as by :class:`crispedit.updates.LeadingCoordinates`."""
        raise not_carried()


PricedRule = PricedCoordinates | PricedLeading | Elsewhere


def priced_rule(subspace: Subspace, price: float, rotation: float = ROTATION, damping: float = 0.0) -> PricedRule:
    """The rule ``priced`` for one matrix, in the coordinates that its subspace is of.

    Args:
        subspace: Of the matrix, on the device of its weight.
        price: s.
        rotation: See :func:`leading_counts`.
        damping: μ / τ: what every direction costs beside its curvature.

    Returns:
        The rule, its parameter at zero.

    Raises:
        ConfigError: The energy of the subspace is 0.
    """
    if subspace.threshold.cross is not None:
        return PricedLeading(subspace, price, rotation, damping)
    return PricedCoordinates(subspace, price, damping)


def _positive(tau: float | None) -> float:
    """τ as what prices are in terms of: of no use where nothing or everything is left out."""
    if tau is None or not 0 < tau < float("inf"):
        raise ConfigError("update priced needs an energy above 0, which says what its price is of")
    return tau


def _with_mean(values: Tensor, trace: float, count: int, width: int) -> Tensor:
    """(width,): the first ``count`` eigenvalues, and for the other directions the mean of what is left of the trace."""
    known = values[:count].clamp(min=0)
    left = max(0.0, trace - float(known.sum())) / max(1, width - len(known))
    return torch.cat([known, known.new_full((width - len(known),), left)])
