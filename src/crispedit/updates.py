"""Update rules: how the gradient of a loss in W becomes a change of W.

The *applied* change must lie in the low-curvature subspace, not only the gradient: Adam rescales element by
element, and a projected gradient that it has rescaled is no longer in the subspace. :class:`Coordinates` and
:class:`Projected` keep every change inside by construction, for any optimiser. :class:`ProjectedGradient` does
not; it is what the published code does. Compared in docs/decisions.md. (CrispEdit, arXiv 2602.15823, Algorithm 1.)
"""

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from .errors import ConfigError
from .subspace import Subspace

Update = Literal["coordinates", "filter", "projected", "projected-gradient"]


class UpdateRule(Protocol):
    """How gradients become updates of one matrix."""

    parameter: Tensor
    """What Adam trains, float32."""

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """The gradient in :attr:`parameter` of a loss with gradient ``weight_gradient`` (d_out, d_in) in W."""

    def delta(self) -> Tensor:
        """The change of W that the parameter stands for, (d_out, d_in) float32."""


class Unconstrained:
    """Adam on W itself: plain fine-tuning. The parameter is ΔW."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.parameter = torch.zeros(shape, device=device)

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """The gradient as it is."""
        return weight_gradient

    def delta(self) -> Tensor:
        """The parameter as it is."""
        return self.parameter


class Coordinates:
    """W = W₀ + U_G (M ⊙ Z) U_Aᵀ, Adam on Z: its moments live in the Kronecker eigenbasis."""

    def __init__(self, subspace: Subspace) -> None:
        self.subspace = subspace
        self.parameter = torch.zeros_like(subspace.mask)

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """M ⊙ (U_Gᵀ ∇W U_A): Adam leaves coordinates whose gradient is always zero at zero."""
        return self.subspace.mask * self.subspace.to_coordinates(weight_gradient)

    def delta(self) -> Tensor:
        """U_G (M ⊙ Z) U_Aᵀ."""
        return self.subspace.from_coordinates(self.parameter)


class Filter:
    """W = W₀ + U_G (F ⊙ Z) U_Aᵀ with F_ij = μ / (λ_ij + μ), μ the threshold τ: a soft mask, Adam on Z.

    A step of Adam in Z shrunk by F minimises its linear model plus λ / 2μ times its square: the quadratically
    penalised form of the constraint. Nothing is left out, so the change does not lie in the subspace.
    """

    def __init__(self, subspace: Subspace) -> None:
        self.subspace = subspace
        self.shrinkage = subspace.shrinkage
        self.parameter = torch.zeros_like(self.shrinkage)

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """U_Gᵀ ∇W U_A. F is left to :meth:`delta`: Adam would take a factor of the gradient out again."""
        return self.subspace.to_coordinates(weight_gradient)

    def delta(self) -> Tensor:
        """U_G (F ⊙ Z) U_Aᵀ."""
        spectrum = self.subspace.spectrum
        return spectrum.output_basis @ (self.shrinkage * self.parameter) @ spectrum.input_basis.T


class Projected:
    """W = W₀ + P(D), Adam on D with the projected gradient; needs no coordinates, so the top of a spectrum will do."""

    def __init__(self, subspace: Subspace) -> None:
        self.subspace = subspace
        self.parameter = torch.zeros(subspace.shape, device=subspace.spectrum.input_basis.device)

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """P(∇W)."""
        return self.subspace.project(weight_gradient)

    def delta(self) -> Tensor:
        """P(D): by linearity the sum of the projected steps."""
        return self.subspace.project(self.parameter)


class ProjectedGradient(Projected):
    """Adam on W with the projected gradient, its steps not projected: the published code. It leaves the subspace."""

    def delta(self) -> Tensor:
        """The parameter as it is."""
        return self.parameter


_RULES: dict[str, type[Coordinates] | type[Filter] | type[Projected]] = {
    "coordinates": Coordinates,
    "filter": Filter,
    "projected": Projected,
    "projected-gradient": ProjectedGradient,
}
assert tuple(_RULES) == get_args(Update)


def update_rule(update: Update | Literal["auto"], subspace: Subspace) -> UpdateRule:
    """The rule of a name for one matrix.

    Args:
        update: Its name; ``auto`` is ``coordinates`` where all eigenvectors are known, else ``projected``.
        subspace: Of the matrix, on the device of its weight.

    Returns:
        The rule, its parameter at zero.

    Raises:
        ConfigError: The rule needs all eigenvectors, and the spectrum has only leading ones.
    """
    if update == "auto":
        update = "coordinates" if subspace.spectrum.complete else "projected"
    if update in ("coordinates", "filter") and not subspace.spectrum.complete:
        raise ConfigError(
            f"update {update} needs all eigenvectors; this spectrum has only leading ones: use update projected"
        )
    return _RULES[update](subspace)
