"""Update rules: how the gradient of a loss in W becomes a change of W.

The *applied* change must lie in the low-curvature subspace, not only the gradient: Adam rescales element by
element, and a projected gradient that it has rescaled is no longer in the subspace. :class:`Coordinates`,
:class:`LeadingCoordinates`, :class:`Projected` and :class:`UpdateProjected` keep every change inside by construction,
for any optimiser. :class:`ProjectedGradient` does not; it is what the published code does. Compared, with what a step
costs, in docs/decisions.md. (CrispEdit, arXiv 2602.15823, Algorithm 1.)
"""

from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from .errors import ConfigError
from .models import EditMatrix
from .rotation import Frame, leading_basis
from .spectrum import Spectrum
from .subspace import Subspace

Update = Literal["coordinates", "leading", "filter", "priced", "projected", "update-projected", "projected-gradient"]

ROTATION = 0.4
"""Turning a token into the bases of ``leading`` may cost this, in parts of the 6 d_out d_in flops that it costs in W:
a tenth of a step."""


class UpdateRule(Protocol):
    """How gradients become updates of one matrix."""

    parameter: Tensor
    """What Adam trains, float32."""
    frame: Frame | None
    """The bases in which W is to be seen meanwhile (:func:`crispedit.rotation.rotated`); gradient and delta too."""

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """The gradient in :attr:`parameter` of a loss with gradient ``weight_gradient`` (d_out, d_in) in W.

        What it is given may be overwritten.
        """

    def stepped(self) -> None:
        """Called after every step of Adam, before :meth:`delta`."""

    def delta(self) -> Tensor:
        """The change of W that the parameter stands for, (d_out, d_in) float32."""

    def carried(self, before: Self, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """Adam's moments of another rule's parameter, as moments of this one's; see :mod:`crispedit.adam`.

        Args:
            before: The rule that they were collected with; of the same kind, for the same matrix.
            mean: Of the gradient in its parameter, as Adam weights it.
            square: Of the gradient's square, likewise.

        Returns:
            Mean and square; new tensors, or those that were given.

        Raises:
            ConfigError: That would take more than a round is worth.
        """


class BaseRule:
    """What most rules have in common."""

    frame: Frame | None = None

    def stepped(self) -> None:
        """Nothing is done after a step."""


class Unconstrained(BaseRule):
    """Adam on W itself: plain fine-tuning. The parameter is ΔW."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.parameter = torch.zeros(shape, device=device)

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """The gradient as it is."""
        return weight_gradient

    def delta(self) -> Tensor:
        """The parameter as it is."""
        return self.parameter

    def carried(self, before: Self, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """As they are."""
        return mean, square


class Elsewhere(BaseRule):
    """The rule of a matrix that another process trains: the bases that all see it in, and no numbers.

    Args:
        matrix: It.
        frame: The bases.
    """

    def __init__(self, matrix: EditMatrix, frame: Frame | None = None) -> None:
        self.frame = frame
        self.parameter = self.metric = torch.zeros(0, device=matrix.parameter.device)

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """None, like the parameter."""
        return torch.zeros_like(self.parameter)

    def delta(self) -> Tensor:
        """None: the weight comes from where it is trained (:mod:`crispedit.ownership`)."""
        return self.parameter

    def count_unseen(self, share: float) -> None:
        """Nothing: the other process counts them."""

    def cost(self) -> Tensor:
        """Zero: the other process has it."""
        return torch.zeros((), dtype=torch.float64, device=self.parameter.device)

    def charged(self) -> Tensor:
        """Zero, likewise."""
        return self.cost()

    def predicted(self) -> Tensor:
        """Zero, likewise."""
        return self.cost()

    def carried(self, before: Self, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """As they are."""
        return mean, square


class Coordinates(BaseRule):
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

    def carried(self, before: Self, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """Turned into this basis, and masked: Adam goes on moving where a mean is left."""
        mean, square = turned_moments(before.subspace.spectrum, self.subspace.spectrum, mean, square)
        return self.subspace.mask * mean, square


class LeadingCoordinates(BaseRule):
    """W = W₀ + Q_G (M ⊙ Z) Q_Aᵀ off a cross, Adam on Z: coordinates in bases that begin with the leading eigenvectors.

    What they are completed with is whatever is cheap (:mod:`crispedit.completion`): of an eigenvector that is not
    masked it matters only that Adam gives it moments of its own, and it matters most for the largest. W itself is seen
    in these bases while it is trained, so that gradients and updates need not be turned, but tokens only.

    Args:
        subspace: A cross.
        rotation: What the bases may cost: see :func:`leading_counts`.

    Raises:
        ConfigError: The subspace is not a cross.
    """

    def __init__(self, subspace: Subspace, rotation: float = ROTATION) -> None:
        check_update("leading", subspace)
        assert subspace.threshold.cross is not None
        self.rows, self.columns = subspace.threshold.cross
        self.frame = leading_frame(subspace, rotation)
        self.parameter = torch.zeros(subspace.shape, device=subspace.spectrum.input_basis.device)

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """M ⊙ ∇W', W' being W in the bases, where ∇W' was: another copy would cost as much as the bases of G."""
        weight_gradient[: self.rows] = 0
        weight_gradient[:, : self.columns] = 0
        return weight_gradient

    def delta(self) -> Tensor:
        """Z, zero where its gradient always is: the change of W'."""
        return self.parameter

    def carried(self, before: Self, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """Refused: bases that exist as reflections only cannot be squared entry by entry."""
        raise not_carried()


def leading_frame(subspace: Subspace, rotation: float) -> Frame:
    """The bases that begin with the leading eigenvectors of G and of A.

    Args:
        subspace: A cross.
        rotation: What they may cost: see :func:`leading_counts`.

    Returns:
        Both.
    """
    r, c = leading_counts(subspace, rotation)
    inputs, outputs = subspace.spectrum.leading_vectors()
    return Frame(leading_basis(outputs[:, :r]), leading_basis(inputs[:, :c]))


def not_carried() -> ConfigError:
    """What rules say in whose bases moments cannot be turned."""
    return ConfigError("optimizer kept does not go with update leading; use fresh, or update coordinates")


def leading_counts(subspace: Subspace, rotation: float = ROTATION) -> tuple[int, int]:
    """How many leading eigenvectors of G and of A the bases of ``leading`` begin with.

    The whole basis of G where that can be had: on real factors its spectrum is flat, and no few directions stand out.
    What is left goes to A, of which the cross takes most.

    Args:
        subspace: A cross.
        rotation: What turning a token may cost, in parts of the 6 d_out d_in flops that it costs in W itself.

    Returns:
        The counts, no fewer than the cross takes whatever that costs, and no more than are known.
    """
    (r, c), (d_out, d_in) = subspace.threshold.cross or (0, 0), subspace.shape
    known_of_A, known_of_G = subspace.spectrum.num_vectors
    left = rotation * 6 * d_out * d_in
    if known_of_G == d_out and 4 * d_out**2 <= left:
        r = d_out
    left -= min(8 * r * d_out, 4 * d_out**2)
    if known_of_A == d_in and 4 * d_in**2 <= left:
        return r, d_in
    return r, max(c, int(min(known_of_A, left / (8 * d_in))))


class Filter(BaseRule):
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

    def carried(self, before: Self, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """Turned into this basis."""
        return turned_moments(before.subspace.spectrum, self.subspace.spectrum, mean, square)


class Projected(BaseRule):
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

    def carried(self, before: Self, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """The mean projected, the square as it is: as in the published code."""
        return self.subspace.project(mean), square


class UpdateProjected(Projected):
    """W = W₀ + P(D), Adam on D with the gradient as it is: half the projections."""

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """The gradient as it is."""
        return weight_gradient


class ProjectedGradient(Projected):
    """Adam on W with the projected gradient, its steps not projected: the published code. It leaves the subspace."""

    def delta(self) -> Tensor:
        """The parameter as it is."""
        return self.parameter


def turned_moments(before: Spectrum, after: Spectrum, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Moments in the Kronecker eigenbasis of one spectrum as those in another's.

    The mean turns as every matrix does. A square is the diagonal of a covariance; what turns it into another diagonal
    are the squares of the rotations' entries, exactly if coordinates were uncorrelated.

    Args:
        before: Complete.
        after: Complete, of the same matrix.
        mean: (d_out, d_in), in the basis of ``before``.
        square: Likewise.

    Returns:
        Mean and square in the basis of ``after``.
    """
    of_G, of_A = (new.T @ old for new, old in zip(_bases(after), _bases(before), strict=True))
    return of_G @ mean @ of_A.T, of_G.square() @ square @ of_A.square().T


def _bases(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    return spectrum.output_basis, spectrum.input_basis


def check_update(update: Update, subspace: Subspace) -> None:
    """Refuses a rule for which a subspace is not made.

    Args:
        update: Its name.
        subspace: Of the matrix.

    Raises:
        ConfigError: The rule needs all eigenvectors, and the spectrum has only leading ones; or it needs a cross.
    """
    if update in ("coordinates", "filter") and not subspace.spectrum.complete:
        raise ConfigError(
            f"update {update} needs all eigenvectors; this spectrum has only leading ones: use update leading"
        )
    if update == "leading" and subspace.threshold.cross is None:
        raise ConfigError("update leading leaves out whole rows and columns: use constraint cross")
