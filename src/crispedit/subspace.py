"""The low-curvature subspace of one matrix: spectrum, energy threshold, projection, coordinates.

Pure tensors; nothing here knows of a model. Conventions as in :mod:`crispedit.curvature`: W is
(d_out, d_in), A is (d_in, d_in), G is (d_out, d_out), a mask has W's shape, and both spectra are
sorted in descending order. The curvature of the pair (i, j) is λ_ij = β_i α_j, where
A = U_A diag(α) U_Aᵀ and G = U_G diag(β) U_Gᵀ (CrispEdit, arXiv 2602.15823, section 3.3).

With sorted spectra the high-curvature pairs are a staircase: pair (i, j) is high exactly when
j < counts[i], with counts non-increasing. So a threshold needs no d_out × d_in table: prefix sums and
one ``searchsorted`` per candidate give the number of pairs above it and their energy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError, NumericsError


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Eigenvalues and eigenvectors of both Kronecker factors, in descending order.

    Args:
        alpha: Eigenvalues of A, (d_in,), float64, not negative.
        beta: Eigenvalues of G, (d_out,), float64, not negative.
        input_basis: U_A, (d_in, d_in), float32, one eigenvector per column.
        output_basis: U_G, (d_out, d_out), float32.
    """

    alpha: Tensor
    beta: Tensor
    input_basis: Tensor
    output_basis: Tensor

    @classmethod
    def of(cls, A: Tensor, G: Tensor) -> "Spectrum":
        """Diagonalises both factors in float64.

        Args:
            A: Input second moment, (d_in, d_in).
            G: Output-gradient second moment, (d_out, d_out).

        Returns:
            The spectrum, on the device of ``A``.
        """
        alpha, input_basis = _eigh(A, "A")
        beta, output_basis = _eigh(G, "G")
        return cls(alpha=alpha, beta=beta, input_basis=input_basis, output_basis=output_basis)


def _eigh(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues (float64, clamped at 0) and eigenvectors (float32) of a factor, descending."""
    if not torch.isfinite(matrix).all():
        raise NumericsError(f"curvature factor {name} of shape {tuple(matrix.shape)} has numbers that are not finite")
    double = matrix.double()
    # symmetrised: accumulation rounds A_ij and A_ji apart; clamped: two tiny negative eigenvalues
    # would make a positive product
    values, vectors = torch.linalg.eigh((double + double.T) / 2)
    return values.flip(0).clamp(min=0), vectors.flip(1).float().contiguous()


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Where a spectrum is cut.

    Args:
        tau: The k-th largest curvature λ; pairs with λ ≥ tau are high. ``inf`` when k is 0.
        num_high: How many pairs are high: k, and all pairs tied with the k-th.
        captured: Share of the total energy tr(A)·tr(G) that the high pairs hold.
        counts: (d_out,) int64; row i of the staircase has its first ``counts[i]`` pairs high.
    """

    tau: float
    num_high: int
    captured: float
    counts: Tensor


def energy_threshold(alpha: Tensor, beta: Tensor, energy: float) -> Threshold:
    """Cuts a Kronecker spectrum at an energy, by bisection over the staircase.

    k is the smallest number of largest λ_ij = β_i α_j whose sum is at least ``energy`` of the total;
    τ is the k-th (design of CrispEdit, section 3.1, definition of k). The d_out × d_in products are
    never formed: each of about 60 bisection steps costs O(d_out log d_in).

    Args:
        alpha: (d_in,) float64, descending, not negative.
        beta: (d_out,) float64, descending, not negative.
        energy: γ in [0, 1). 0 makes no pair high: plain fine-tuning.

    Returns:
        The threshold. With equal λ at the cut, all of them are high.

    Raises:
        ConfigError: ``energy`` is outside [0, 1).
    """
    check_energy(energy)
    total = float(alpha.sum() * beta.sum())
    goal = energy * total
    if goal == 0:
        return Threshold(tau=float("inf"), num_high=0, captured=0.0, counts=torch.zeros_like(beta, dtype=torch.int64))

    ascending = alpha.flip(0).contiguous()
    prefix = torch.cat([alpha.new_zeros(1), alpha.cumsum(0)])

    def above(tau: float) -> tuple[Tensor, float]:
        """Counts per row of the pairs with λ ≥ tau, and their energy."""
        smallest = torch.where(beta > 0, tau / beta, torch.full_like(beta, float("inf")))
        counts = len(alpha) - torch.searchsorted(ascending, smallest, side="left")
        return counts, float((beta * prefix[counts]).sum())

    # the energy above tau falls as tau grows: low always reaches the goal, high never does
    low, high = 0.0, float(alpha[0] * beta[0]) * (1 + 1e-12)
    while True:
        middle = (low * high) ** 0.5 if low > 0 else high * 1e-3
        if not low < middle < high:
            break
        if above(middle)[1] >= goal:
            low = middle
        else:
            high = middle
        if (low > 0 and high / low < 1 + 1e-13) or high < 1e-300:
            break
    counts, captured = above(low)
    # low lies within rounding of the k-th product: name that product itself, the least of the staircase's corners
    rows = counts > 0
    tau = float((beta[rows] * alpha[counts[rows] - 1]).min())
    return Threshold(tau=tau, num_high=int(counts.sum()), captured=captured / total, counts=counts)


def check_energy(energy: float) -> None:
    """Raises :class:`ConfigError` unless ``energy`` is in [0, 1)."""
    if not 0 <= energy < 1:
        raise ConfigError(f"energy is {energy}; it must be at least 0 (plain fine-tuning) and less than 1")


@dataclass(frozen=True, kw_only=True)
class Subspace:
    """The low-curvature subspace of one matrix, and what may be done with it.

    Args:
        spectrum: Eigenvalues and bases.
        threshold: Where the spectrum is cut.
        mask: (d_out, d_in) float32, 1 where a pair has low curvature: M of the paper's eq. 6.
    """

    spectrum: Spectrum
    threshold: Threshold
    mask: Tensor

    @classmethod
    def of(cls, spectrum: Spectrum, energy: float) -> "Subspace":
        """The subspace that leaves out the pairs holding ``energy`` of all curvature.

        Args:
            spectrum: Spectrum of the matrix's factors.
            energy: γ in [0, 1).

        Returns:
            The subspace, on the spectrum's device.
        """
        threshold = energy_threshold(spectrum.alpha, spectrum.beta, energy)
        columns = torch.arange(len(spectrum.alpha), device=spectrum.alpha.device)
        mask = (columns >= threshold.counts[:, None]).float()
        return cls(spectrum=spectrum, threshold=threshold, mask=mask)

    def to(self, device: torch.device) -> "Subspace":
        """The subspace with its bases and mask on another device."""
        spectrum = Spectrum(
            alpha=self.spectrum.alpha,
            beta=self.spectrum.beta,
            input_basis=self.spectrum.input_basis.to(device),
            output_basis=self.spectrum.output_basis.to(device),
        )
        return Subspace(spectrum=spectrum, threshold=self.threshold, mask=self.mask.to(device))

    def to_coordinates(self, X: Tensor) -> Tensor:
        """U_Gᵀ X U_A, the coordinates of ``X`` (d_out, d_in) in the Kronecker eigenbasis, unmasked."""
        return self.spectrum.output_basis.T @ X @ self.spectrum.input_basis

    def from_coordinates(self, Z: Tensor) -> Tensor:
        """U_G (M ⊙ Z) U_Aᵀ: the matrix (d_out, d_in) in the subspace with coordinates ``Z``."""
        return self.spectrum.output_basis @ (self.mask * Z) @ self.spectrum.input_basis.T

    def project(self, X: Tensor) -> Tensor:
        """P(X), the orthogonal projection of ``X`` (d_out, d_in) onto the subspace (paper, eq. 6)."""
        return self.from_coordinates(self.to_coordinates(X))

    def share_outside(self, X: Tensor) -> float:
        """‖P(X) − X‖ / ‖X‖ in Frobenius norm, evaluated in float64; 0 for X = 0."""
        double = X.double()
        U_G, U_A = self.spectrum.output_basis.double(), self.spectrum.input_basis.double()
        high = (U_G.T @ double @ U_A) * (1 - self.mask)
        norm = double.norm()
        return float(high.norm() / norm) if norm > 0 else 0.0
