"""Update rules: how the gradient of a loss in W becomes a change of W.

The *applied* change must lie in the low-curvature subspace, not only the gradient: Adam rescales element by
element, and a projected gradient that it has rescaled is no longer in the subspace. :class:`Coordinates`,
:class:`LeadingCoordinates`, :class:`Projected` and :class:`UpdateProjected` keep every change inside by construction,
for any optimiser. :class:`ProjectedGradient` does not; it is what the published code does. Compared, with what a step
costs, in docs/decisions.md. (CrispEdit, arXiv 2602.15823, Algorithm 1.)
"""

from collections.abc import Callable
from typing import Literal, Protocol, Self, get_args

import torch
from torch import Tensor

from .errors import ConfigError
from .models import EditMatrix
from .rotation import Frame, leading_basis
from .spectrum import Spectrum
from .subspace import Subspace
from .threshold import energy_threshold

Update = Literal["coordinates", "leading", "filter", "priced", "projected", "update-projected", "projected-gradient"]

TOKENS = 512
"""Of a step, where rules are chosen by what they cost."""
AFFORDABLE = 1.25
"""A rule may cost so many times what its matrix costs in such a step, forward and back: 6 d_out d_in flops a token.
An edited matrix is at most a fifth of what a step runs through, so that this is a quarter of the step."""
PIVOT = 2.2
"""So many times as long as its flops at the speed of thick products does a projection by a pivot take: measured."""
PRICE = 0.01
"""What ``priced`` asks by default: see docs/decisions.md."""
ROTATION = 0.4
"""The bases of ``leading`` may cost this, in the same unit: a tenth of the step."""


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


class _Rule:
    """What most rules have in common."""

    frame: Frame | None = None

    def stepped(self) -> None:
        """Nothing is done after a step."""


class Unconstrained(_Rule):
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


class Elsewhere(_Rule):
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

    def cost(self) -> Tensor:
        """Zero: the other process has it."""
        return torch.zeros((), dtype=torch.float64, device=self.parameter.device)

    def predicted(self) -> float:
        """Zero, likewise."""
        return 0.0

    def carried(self, before: Self, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """As they are."""
        return mean, square


class Coordinates(_Rule):
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
        mean, square = _turned(before.subspace.spectrum, self.subspace.spectrum, mean, square)
        return self.subspace.mask * mean, square


class LeadingCoordinates(_Rule):
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
        self.frame = _leading_frame(subspace, rotation)
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
        raise _not_carried()


def _leading_frame(subspace: Subspace, rotation: float) -> Frame:
    """The bases that begin with the leading eigenvectors of G and of A."""
    r, c = leading_counts(subspace, rotation)
    inputs, outputs = subspace.spectrum.leading_vectors()
    return Frame(leading_basis(outputs[:, :r]), leading_basis(inputs[:, :c]))


def _not_carried() -> ConfigError:
    return ConfigError("optimizer kept does not go with update leading; use fresh, or update coordinates")


class _Priced(_Rule):
    """Coordinates that are all free, and pulled back by what they cost; see :class:`PricedCoordinates`.

    Args:
        curvatures: λ by coordinate, (d_out, d_in) float32, not negative.
        threshold: τ, in terms of which prices are.
        price: s.
        damping: μ / τ: what every direction costs beside its curvature.
    """

    def __init__(self, curvatures: Tensor, threshold: float, price: float, damping: float) -> None:
        self.threshold, self.price, self.damping = threshold, price, damping * threshold
        self.metric = curvatures.add_(self.damping)
        self.parameter = torch.zeros_like(curvatures)

    def stepped(self) -> None:
        """Z ← Z / (1 + s D/τ), D = λ + μ."""
        if self.price > 0:
            self.parameter.div_((self.metric * (self.price / self.threshold)).add_(1))

    def cost(self) -> Tensor:
        """½ Σ D Z², a scalar in float64."""
        return 0.5 * (self.metric * self.parameter.square()).sum(dtype=torch.float64)

    def predicted(self) -> float:
        """½ Σ λ Z²: the drift that the curvature predicts, nats per token."""
        undamped = self.cost() - 0.5 * self.damping * self.parameter.square().sum(dtype=torch.float64)
        return max(0.0, float(undamped))


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
        return _turned(before.spectrum, self.spectrum, mean, square)


class PricedLeading(_Priced):
    """The same in the bases of :class:`LeadingCoordinates`; what is not known of a spectrum is taken for flat.

    Args:
        subspace: A cross; the directions that it takes are turned at least.
        price: s.
        rotation: What the bases may cost: see :func:`leading_counts`.
        damping: μ / τ.
    """

    def __init__(self, subspace: Subspace, price: float, rotation: float = ROTATION, damping: float = 0.0) -> None:
        self.frame = _leading_frame(subspace, rotation)
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
        """Refused, as by :class:`LeadingCoordinates`."""
        raise _not_carried()


PricedRule = PricedCoordinates | PricedLeading | Elsewhere


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
    return r, max(c, min(known_of_A, int(left / (8 * d_in))))


class Filter(_Rule):
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
        return _turned(before.subspace.spectrum, self.subspace.spectrum, mean, square)


class Projected(_Rule):
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


def _turned(before: Spectrum, after: Spectrum, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Moments in the Kronecker eigenbasis of one spectrum as those in another's.

    The mean turns as every matrix does. A square is the diagonal of a covariance; what turns it into another diagonal
    are the squares of the rotations' entries, exactly if coordinates were uncorrelated.
    """
    of_G, of_A = (new.T @ old for new, old in zip(_bases(after), _bases(before), strict=True))
    return of_G @ mean @ of_A.T, of_G.square() @ square @ of_A.square().T


def _bases(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    return spectrum.output_basis, spectrum.input_basis


_RULES: dict[str, Callable[[Subspace], UpdateRule]] = {
    "coordinates": Coordinates,
    "leading": LeadingCoordinates,
    "filter": Filter,
    "projected": Projected,
    "update-projected": UpdateProjected,
    "projected-gradient": ProjectedGradient,
}
assert {*_RULES, "priced"} == {*get_args(Update)}  # which has settings of its own: update_rule


def step_flops(update: Update, subspace: Subspace, tokens: int = TOKENS, rotation: float = ROTATION) -> int:
    """What a rule adds to a step of plain fine-tuning, Adam aside.

    Args:
        update: Its name.
        subspace: Of the matrix.
        tokens: Of the step.
        rotation: See :func:`leading_counts`.

    Returns:
        Flops, a multiplication and an addition counted apart.
    """
    d_out, d_in = subspace.shape
    if update == "priced":
        update = "leading" if subspace.threshold.cross is not None else "coordinates"
    if update == "leading":
        counts = zip(leading_counts(subspace, rotation), subspace.shape, strict=True)
        return tokens * sum(min(8 * n * k, 4 * n * n) for k, n in counts)
    if update in ("coordinates", "filter"):
        return 4 * d_out * d_in * (d_out + d_in)
    return subspace.flops * (2 if update == "projected" else 1)


def coordinates_cost_little(shape: tuple[int, int]) -> bool:
    """Whether a matrix (d_out, d_in) is so narrow that it may be turned whole, twice a step: see :data:`AFFORDABLE`."""
    return 4 * sum(shape) <= AFFORDABLE * 6 * TOKENS


def chosen_update(subspace: Subspace, rotation: float = ROTATION) -> Update:
    """The best rule that a matrix can pay for, by counting; of quality and price: docs/decisions.md.

    Args:
        subspace: Of the matrix.
        rotation: See :func:`leading_counts`.

    Returns:
        The first of ``coordinates``, ``leading``, ``projected`` and ``update-projected`` that the subspace allows and
        that costs no more than :data:`AFFORDABLE`; or the cheapest of them.
    """
    possible: list[Update] = ["projected", "update-projected"]
    if subspace.threshold.cross is not None:
        possible.insert(0, "leading")
    if subspace.spectrum.complete:
        possible.insert(0, "coordinates")

    def cost(update: Update) -> float:
        slow = PIVOT if subspace.form == "pivot" and "projected" in update else 1
        return slow * step_flops(update, subspace, rotation=rotation)

    most = AFFORDABLE * 6 * subspace.shape[0] * subspace.shape[1] * TOKENS
    return next((update for update in possible if cost(update) <= most), min(possible, key=cost))


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


def rule_elsewhere(
    matrix: EditMatrix, update: Update | Literal["auto"], subspace: Subspace, rotation: float = ROTATION
) -> Elsewhere:
    """What a process has in place of :func:`update_rule` of a matrix that another one trains.

    Args:
        matrix: It.
        update: The rule's name.
        subspace: Of the matrix, on any device.
        rotation: See :func:`leading_counts`.

    Returns:
        Its bases, where W itself is seen in other ones.
    """
    if update == "auto":
        update = chosen_update(subspace, rotation)
    check_update(update, subspace)
    turned = update == "leading" or (update == "priced" and subspace.threshold.cross is not None)
    return Elsewhere(matrix, _leading_frame(subspace.to(matrix.parameter.device), rotation) if turned else None)


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


def update_rule(
    update: Update | Literal["auto"], subspace: Subspace, rotation: float = ROTATION, price: float = PRICE
) -> UpdateRule:
    """The rule of a name for one matrix.

    Args:
        update: Its name; ``auto`` is :func:`chosen_update`.
        subspace: Of the matrix, on the device of its weight.
        rotation: See :func:`leading_counts`.
        price: Of ``priced``.

    Returns:
        The rule, its parameter at zero.

    Raises:
        ConfigError: The rule needs all eigenvectors, and the spectrum has only leading ones; or it needs a cross.
    """
    if update == "auto":
        update = chosen_update(subspace, rotation)
    check_update(update, subspace)
    if update == "priced":
        return priced_rule(subspace, price, rotation)
    return LeadingCoordinates(subspace, rotation) if update == "leading" else _RULES[update](subspace)
