"""The top of a positive semidefinite matrix: as many leading eigenpairs as a purpose needs, with residuals.

Rayleigh–Ritz over a block Krylov space that is kept orthogonal in full and restarted around the best Ritz
vectors (Golub & Underwood 1977; Wu & Simon 2000; the expansion by residuals is Davidson's, without a
preconditioner). One step costs one product of the matrix with a block. The trace is exact, so what the pairs
that are not known hold together is known too. Everything is float64; the matrix may be float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import NumericsError

BLOCK = 64
"""Columns of a block: wide enough for fast products, and for clusters of so many equal eigenvalues."""
TOLERANCE = 1e-9
"""A pair is done when ‖M v − λ v‖ ≤ TOLERANCE · λ: at a relative gap of 1e-3 the projector is then good to 1e-6."""
DENSE_SHARE = 0.25
"""Beyond this share of all pairs, or below :data:`DENSE_SIZE`, a full diagonalisation is cheaper."""
DENSE_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class Eigenpairs:
    """Leading eigenpairs of a positive semidefinite matrix of size n.

    Args:
        values: (k,) float64, descending, not negative.
        vectors: (n, k) float64, orthonormal columns.
        residuals: (k,) float64, ‖M v − λ v‖. Every one of ``values`` lies that close to an eigenvalue of M
            (Parlett, The Symmetric Eigenvalue Problem, theorem 4.5.1).
        trace: Of M.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    trace: float

    def __len__(self) -> int:
        return len(self.values)

    @property
    def size(self) -> int:
        """N."""
        return len(self.vectors)

    def projector_error(self, count: int) -> float:
        """A bound on ‖P − P'‖_F for the orthogonal projectors onto the first ``count`` vectors, found and true.

        ‖sin Θ‖_F ≤ ‖R‖_F / gap (Davis & Kahan 1970), and ‖P − P'‖_F = √2 ‖sin Θ‖_F. The gap is that between the
        last value inside and the first outside, less the latter's residual; the bound holds if no eigenvalue
        above the cut was missed, which a random start excludes with probability one.

        Args:
            count: At most ``len(self) - 1``, or all n.

        Returns:
            The bound; infinity where the gap is not resolved.
        """
        if count in (0, self.size):
            return 0.0
        gap = float(self.values[count - 1] - self.values[count] - self.residuals[count])
        return 2**0.5 * float(self.residuals[:count].norm()) / gap if gap > 0 else float("inf")


def at_most(values: Tensor, trace: float, size: int) -> Tensor:
    """A spectrum of which the top is known, the rest as large as top and trace allow.

    Args:
        values: (k,) float64, the leading eigenvalues, descending.
        trace: The sum of all.
        size: n.

    Returns:
        (n,): the values; then the last of them again and again, until the trace is used up; then zeros.
    """
    rest = values.new_zeros(size - len(values))
    if len(rest) and len(values) and float(values[-1]) > 0:
        left = max(trace - float(values.sum()), 0.0) / float(values[-1])
        rest = (left - torch.arange(len(rest), dtype=values.dtype, device=values.device)).clamp(0, 1) * values[-1]
    return torch.cat([values, rest])


def full_eigenpairs(matrix: Tensor, name: str = "") -> Eigenpairs:
    """All eigenpairs by dense diagonalisation in float64.

    Args:
        matrix: (n, n), symmetric up to rounding, positive semidefinite up to rounding.
        name: Of the matrix, for the error message.

    Returns:
        All n pairs; their residuals are bounded by the backward error of the diagonalisation, n ε λ₁.

    Raises:
        NumericsError: A number is not finite.
    """
    double = _symmetric(matrix, name)
    values, vectors = torch.linalg.eigh(double)
    values = values.flip(0).clamp(min=0)  # two tiny negative eigenvalues would make a positive product
    bound = len(double) * torch.finfo(torch.float64).eps * float(values[0])
    return Eigenpairs(
        values=values,
        vectors=vectors.flip(1).contiguous(),
        residuals=torch.full_like(values, bound),
        trace=float(double.diagonal().sum()),
    )


def _symmetric(matrix: Tensor, name: str) -> Tensor:
    """The matrix in float64, symmetrised: accumulation rounds M_ij and M_ji apart."""
    if not torch.isfinite(matrix).all():
        raise NumericsError(f"curvature factor {name} of shape {tuple(matrix.shape)} has numbers that are not finite")
    double = matrix.double()
    return (double + double.T) / 2


class TopSolver:
    """Finds the leading eigenpairs of one matrix, and more of them when asked again.

    Args:
        matrix: (n, n), symmetric and positive semidefinite up to rounding.
        name: Of the matrix, for the error message.
        start: (n, j) columns that are probably near the leading eigenvectors: those of an earlier matrix.
        seed: Of the random block that every start contains, so that no direction is missed.

    Raises:
        NumericsError: A number is not finite.
    """

    def __init__(self, matrix: Tensor, name: str = "", *, start: Tensor | None = None, seed: int = 0) -> None:
        self.matrix = _symmetric(matrix, name)
        self.trace = float(self.matrix.diagonal().sum())
        self.products = 0
        """Columns that the matrix was multiplied with: what the search cost."""
        self._generator = torch.Generator().manual_seed(seed)
        self._full: Eigenpairs | None = None
        n = len(self.matrix)
        self.V = self.W = self.matrix.new_zeros(n, 0)  # orthonormal basis, and M V
        self._expand(torch.cat([self._random(min(BLOCK, n)), *([] if start is None else [start.to(self.matrix)])], 1))

    def top(self, count: int, tolerance: float = TOLERANCE) -> Eigenpairs:
        """The leading pairs.

        Args:
            count: How many at least; one more is found where there is one, for the gap.
            tolerance: Of the residuals, relative to each eigenvalue.

        Returns:
            At least ``count`` converged pairs, or all.
        """
        n = len(self.matrix)
        wanted = min(count + 1, n)
        if self._full is None and (n <= DENSE_SIZE or wanted + BLOCK > DENSE_SHARE * n):
            self._full = full_eigenpairs(self.matrix)
        if self._full is not None:
            return self._full
        while True:
            values, S = torch.linalg.eigh(self.V.T @ self.W)
            values, S = values.flip(0), S.flip(1)
            inside = min(wanted, len(values))
            vectors = self.V @ S[:, :inside]
            differences = self.W @ S[:, :inside] - vectors * values[:inside]
            residuals = differences.norm(dim=0)
            floor = n * torch.finfo(torch.float64).eps * float(values[0])  # rounding; for eigenvalues that are 0
            open_ = (residuals > (tolerance * values[:inside]).clamp(min=floor)).nonzero().flatten()
            if inside == wanted and not len(open_):
                return Eigenpairs(
                    values=values[:inside].clamp(min=0), vectors=vectors, residuals=residuals, trace=self.trace
                )
            if self.V.shape[1] + BLOCK > max(2 * wanted, wanted + 6 * BLOCK):
                kept = S[:, : wanted + BLOCK]
                self.V, self.W = self.V @ kept, self.W @ kept
            block = differences[:, open_[:BLOCK]]
            if block.shape[1] < BLOCK // 2:  # few are open, or too few are known: widen the search
                block = torch.cat([block, self._random(BLOCK - block.shape[1])], 1)
            self._expand(block)

    def _expand(self, block: Tensor) -> None:
        """Takes the directions of a block into the basis; what lies in it already, or is rounding, is left out."""
        block = block / block.norm(dim=0).clamp(min=1e-300)
        for _ in range(2):  # once leaves rounding behind
            block = block - self.V @ (self.V.T @ block)
            block, R = torch.linalg.qr(block)
            block = block[:, R.diagonal().abs() > 1e-10]
        self.V = torch.cat([self.V, block], 1)
        self.W = torch.cat([self.W, self.matrix @ block], 1)
        self.products += block.shape[1]

    def _random(self, columns: int) -> Tensor:
        noise = torch.randn(len(self.matrix), columns, generator=self._generator, dtype=torch.float64)
        return noise.to(self.matrix.device)
