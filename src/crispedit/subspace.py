"""The low-curvature subspace of one matrix: what a cut leaves free, and the forms of the projection onto it.

Pure tensors; nothing here knows of a model. Conventions as in :mod:`crispedit.factors`: W is
(d_out, d_in), A is (d_in, d_in), G is (d_out, d_out), a mask has W's shape, and both spectra are
sorted in descending order, A = U_A diag(α) U_Aᵀ and G = U_G diag(β) U_Gᵀ. Which pairs (i, j) are high is said by a
:class:`crispedit.threshold.Threshold` (CrispEdit, arXiv 2602.15823, section 3.3).

The projection off a staircase is evaluated in the cheapest of three forms that are equal up to rounding:
eq. 6 of the paper as it stands; a *pivot*, which splits the high pairs at a corner into full rows and
full columns and costs in proportion to those; and, of a cross, a two-sided projection.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import ConfigError, check_choice
from .spectrum import Spectrum
from .threshold import Threshold, energy_threshold, table_threshold

Form = Literal["equation6", "pivot", "cross"]
BLOCK = 16
"""Rows of the first block of a pivot."""


class _Pivot:
    """The high pairs of a staircase, split at a corner: those in the first r rows, the others in the first c columns.

    Rows and columns are cut into blocks that double in size (:func:`_blocks`), each as long as its longest one.

    Args:
        counts: (d_out,) of the staircase.
        d_in: Input width.
    """

    def __init__(self, counts: Tensor, d_in: int) -> None:
        self.counts, self.d_in, self.d_out = counts, d_in, len(counts)
        columns = torch.arange(d_in, device=counts.device)
        ascending = counts.flip(0).contiguous()
        high = self.d_out - torch.searchsorted(ascending, columns, side="right")  # rows with counts > j
        r, c = torch.arange(self.d_out + 1, device=counts.device), torch.cat([counts, counts.new_zeros(1)])
        self._counts, self._heights = counts.tolist(), high.tolist()  # to be read without waiting for a GPU
        self.full = int((counts == d_in).sum())  # of these rows U_A U_Aᵀ is the identity
        widths = torch.cat([counts.new_zeros(self.full), _blocked(counts[self.full :])])
        heights = _blocked(high)
        self._row_flops = 4 * d_in * (r * self.d_out + widths)
        self._column_flops = 4 * self.d_out * (c * d_in + heights[c] - r * c)
        flops = self._row_flops + self._column_flops
        self.rows = int(flops.argmin())
        self.columns = int(c[self.rows])
        self.flops = int(flops[self.rows])
        """Of one projection."""

    @property
    def basis_shape(self) -> tuple[int, int]:
        """How many leading eigenvectors of G and of A it takes."""
        return self._heights[0], self._counts[0]

    def project(self, X: Tensor, U_G: Tensor, U_A: Tensor) -> Tensor:
        """X − U_G [ (U_Gᵀ X U_A) ⊙ (1 − M) ] U_Aᵀ."""
        r, c, counts = self.rows, self.columns, self.counts.to(X.device)
        T = U_G[:, :r].T @ X
        for start, end in _blocks(self.full, r):
            U = U_A[:, : self._counts[start]]
            inside = torch.arange(U.shape[1], device=X.device) < counts[start:end, None]
            T[start:end] = ((T[start:end] @ U) * inside) @ U.T
        left = torch.addmm(X, U_G[:, :r], T, alpha=-1)
        T = X @ U_A[:, :c]
        for start, end in _blocks(0, c):
            U = U_G[:, r : self._heights[start]]
            inside = torch.arange(start, end, device=X.device) < counts[r : r + U.shape[1], None]
            T[:, start:end] = U @ ((U.T @ T[:, start:end]) * inside)
        return left.addmm_(T, U_A[:, :c].T, alpha=-1)


def cross_overlap(one: "Subspace", other: "Subspace") -> float:
    """How far the directions that two crosses leave out are the same: tr(Q Q') / √(tr Q · tr Q').

    With P_G and P_A the projectors onto leading eigenvectors, Q = I − (I − P_G) ⊗ (I − P_A), so that all traces come
    from the small products of the bases.

    Args:
        one: A subspace in the form of a cross.
        other: Another, of the same shape.

    Returns:
        1 for the same directions; for unrelated ones the share of all directions that they take; 1 for two of none.
    """
    (r, c), (s, t) = (subspace.threshold.cross or (0, 0) for subspace in (one, other))
    d_out, d_in = one.shape
    bases = (one.spectrum.output_basis[:, :r].T, other.spectrum.output_basis[:, :s].to(one.spectrum.output_basis))
    in_outputs = float((bases[0] @ bases[1]).square().sum())
    bases = (one.spectrum.input_basis[:, :c].T, other.spectrum.input_basis[:, :t].to(one.spectrum.input_basis))
    in_inputs = float((bases[0] @ bases[1]).square().sum())
    sizes = [d_out * d_in - (d_out - i) * (d_in - j) for i, j in ((r, c), (s, t))]
    neither = (d_out - r - s + in_outputs) * (d_in - c - t + in_inputs)
    shared = sum(sizes) - d_out * d_in + neither
    return shared / (sizes[0] * sizes[1]) ** 0.5 if all(sizes) else float(sizes[0] == sizes[1])


def _blocks(first: int, end: int) -> list[tuple[int, int]]:
    """Blocks of 16, 32, 64, … from ``first``, the last one cut at ``end``: a product of fewer rows waits for memory."""
    starts = [first + BLOCK * (2**k - 1) for k in range((max(end - first, 0) // BLOCK + 1).bit_length())]
    return [(start, min(2 * start + BLOCK - first, end)) for start in starts if start < end]


def _blocked(lengths: Tensor) -> Tensor:
    """(n + 1,): the sum of the first 0, 1, … n lengths, each taken as that of the first of its block."""
    sums = lengths.clone()
    for start, end in _blocks(0, len(lengths)):
        sums[start:end] = lengths[start]
    return torch.cat([sums.new_zeros(1), sums.cumsum(0)])


@dataclass(frozen=True, kw_only=True)
class Subspace:
    """The low-curvature subspace of one matrix, and what may be done with it.

    Args:
        spectrum: Eigenvalues and bases.
        threshold: Where the spectrum is cut.
        form: How projections are evaluated.
    """

    spectrum: Spectrum
    threshold: Threshold
    form: Form

    @classmethod
    def of(cls, spectrum: Spectrum, energy: float, form: Form | Literal["auto"] = "auto") -> "Subspace":
        """The subspace that leaves out pairs holding ``energy`` of all curvature.

        Args:
            spectrum: Spectrum of the matrix's factors.
            energy: γ in [0, 1).
            form: ``equation6`` and ``pivot`` leave out the pairs of largest λ, and are equal; ``cross`` leaves out a
                cross. ``auto`` is the cheaper of the first two in flops (a pivot never takes more bytes), or ``cross``
                where the spectrum has only leading pairs.

        Returns:
            The subspace, on the spectrum's device.

        Raises:
            ConfigError: ``energy`` is outside [0, 1), the form is unknown, or the spectrum has too few pairs for it.
        """
        check_choice("form", form, (*get_args(Form), "auto"))
        if form == "cross" or (form == "auto" and not spectrum.complete):
            threshold = spectrum.known_cross(energy)
            if threshold is None:
                raise ConfigError(
                    f"a cross at energy {energy} takes more than the {len(spectrum.beta)} eigenvectors of G and "
                    f"{len(spectrum.alpha)} of A that are known: lower the energy, or compute it from dense factors"
                )
            return cls(spectrum=spectrum, threshold=threshold, form="cross")
        if not spectrum.complete:
            raise ConfigError(f"form {form} needs all eigenvectors; this spectrum has only leading ones: use cross")
        threshold = energy_threshold(spectrum.alpha, spectrum.beta, energy)
        subspaces = [cls(spectrum=spectrum, threshold=threshold, form=f) for f in ("pivot", "equation6")]
        return min((s for s in subspaces if form in ("auto", s.form)), key=lambda s: s.flops)

    @classmethod
    def of_table(cls, spectrum: Spectrum, curvatures: Tensor, energy: float) -> "Subspace":
        """The subspace of curvatures measured pair by pair in a Kronecker eigenbasis (EK-FAC; George et al. 2018).

        Args:
            spectrum: The bases, complete; its eigenvalues play no part.
            curvatures: (d_out, d_in), not negative; see :func:`crispedit.estimation.estimate_second_moments`.
            energy: γ in [0, 1).

        Returns:
            The subspace that leaves out the largest curvatures, in the form of eq. 6.

        Raises:
            ConfigError: ``energy`` is outside [0, 1), or the spectrum has only leading eigenvectors.
        """
        if not spectrum.complete:
            raise ConfigError("measured curvatures need all eigenvectors; this spectrum has only leading ones")
        return cls(spectrum=spectrum, threshold=table_threshold(curvatures, energy), form="equation6")

    def to(self, device: torch.device) -> "Subspace":
        """The subspace with its bases on another device."""
        return replace(self, spectrum=self.spectrum.to(device))

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.spectrum.shape

    @cached_property
    def _pivot(self) -> _Pivot:
        return _Pivot(self.threshold.counts, self.shape[1])

    @property
    def flops(self) -> int:
        """Of one projection, a multiplication and an addition counted apart."""
        d_out, d_in = self.shape
        if self.form == "pivot":
            return self._pivot.flops
        if self.form == "equation6":
            return 4 * d_out * d_in * (d_out + d_in)
        r, c = self._cross
        return 4 * d_out * (d_in * (r + c) + r * c)

    @property
    def num_bytes(self) -> int:
        """Of the float32 eigenvectors that the form takes."""
        d_out, d_in = self.shape
        taken = {"equation6": (d_out, d_in), "pivot": self._pivot.basis_shape, "cross": self._cross}[self.form]
        return 4 * (d_out * taken[0] + d_in * taken[1])

    @property
    def _cross(self) -> tuple[int, int]:
        return self.threshold.cross or (0, 0)

    @cached_property
    def mask(self) -> Tensor:
        """M of the paper's eq. 6: (d_out, d_in) float32, 1 where a pair has low curvature."""
        device = self.spectrum.input_basis.device
        if self.threshold.table is not None and self.threshold.tau is not None:
            return (self.threshold.table < self.threshold.tau).float().to(device)
        counts = self.threshold.counts.to(device)
        return (torch.arange(self.shape[1], device=counts.device) >= counts[:, None]).float()

    @cached_property
    def shrinkage(self) -> Tensor:
        """F_ij = μ / (λ_ij + μ) with μ = τ: a soft mask, (d_out, d_in) float32, one half where the mask is cut.

        Raises:
            ConfigError: The subspace is a cross, which no threshold cuts.
        """
        tau, spectrum = self.threshold.tau, self.spectrum
        if tau is None:
            raise ConfigError("a soft mask needs a threshold, which a cross does not have: use another constraint")
        if tau == float("inf"):
            return torch.ones_like(self.mask)
        table = self.threshold.table
        curvatures = torch.outer(spectrum.beta, spectrum.alpha) if table is None else table.double()
        return (tau / (curvatures + tau)).float().to(self.mask.device)

    def to_coordinates(self, X: Tensor) -> Tensor:
        """U_Gᵀ X U_A, the coordinates of ``X`` (d_out, d_in) in the Kronecker eigenbasis, unmasked."""
        return self.spectrum.output_basis.T @ X @ self.spectrum.input_basis

    def from_coordinates(self, Z: Tensor) -> Tensor:
        """U_G (M ⊙ Z) U_Aᵀ: the matrix (d_out, d_in) in the subspace with coordinates ``Z``."""
        return self.spectrum.output_basis @ (self.mask * Z) @ self.spectrum.input_basis.T

    def project(self, X: Tensor) -> Tensor:
        """P(X), the orthogonal projection of ``X`` (d_out, d_in) onto the subspace (paper, eq. 6)."""
        return self._project(X, self.spectrum.output_basis, self.spectrum.input_basis)

    def _project(self, X: Tensor, U_G: Tensor, U_A: Tensor) -> Tensor:
        """P(X) with bases of ``X``'s dtype."""
        if self.form == "equation6":
            return U_G @ ((U_G.T @ X @ U_A) * self.mask) @ U_A.T
        if self.form == "pivot":
            return self._pivot.project(X, U_G, U_A)
        r, c = self._cross
        U_G, U_A = U_G[:, :r], U_A[:, :c]
        columns = X @ U_A
        columns -= U_G @ (U_G.T @ columns)  # those in the rows go with them
        return torch.addmm(X, U_G, U_G.T @ X, alpha=-1).addmm_(columns, U_A.T, alpha=-1)

    def share_outside(self, X: Tensor) -> float:
        """‖P(X) − X‖ / ‖X‖ in Frobenius norm, evaluated in float64; 0 for X = 0."""
        double = X.double()
        inside = self._project(double, self.spectrum.output_basis.double(), self.spectrum.input_basis.double())
        norm = double.norm()
        return float((double - inside).norm() / norm) if norm > 0 else 0.0
