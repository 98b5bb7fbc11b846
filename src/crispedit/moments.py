"""Second moments of vectors, E[v vᵀ], summed as the vectors stream by: dense, or sketched. Pure tensors.

A sketch of M (n × n) keeps Y = M Ω for a fixed random Ω (n × ℓ) and the exact trace: n ℓ numbers and 4 n ℓ
flops a vector, where the dense sum takes n² and 2 n². Y is linear in M, so sketches of several corpora add like
the moments themselves. What it stands for is the Nyström approximation

    M_nys = Y (Ωᵀ Y)⁺ Yᵀ,     0 ⪯ M_nys ⪯ M

(Tropp, Yurtsever, Udell & Cevher 2017, "Fixed-rank approximation of a positive-semidefinite matrix from
streaming data"). Because M_nys ⪯ M, the energy that leading eigenvectors of M_nys are said to hold is a lower
bound of what they hold of M: a subspace cut at an energy protects at least that energy, at the price of some more
directions than the eigenvectors of M would take.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from .eigen import Eigenpairs
from .errors import NumericsError

Kind = Literal["dense", "sketch"]
MAX_RANK = 2048
"""ℓ is half of n, and no more than this."""
ROWS = 1024
"""Rows of a sketch that are taken to float64 at a time."""
ROUNDING = 1e-6
"""Sums are float32: what lies below this share of the largest eigenvalue is noise."""


def sketch_rank(size: int) -> int:
    """ℓ for vectors of a size."""
    return max(1, min(MAX_RANK, size // 2))


@lru_cache(maxsize=32)
def _test_matrix(size: int, rank: int, device: torch.device) -> Tensor:
    """Ω: (size, rank) Gaussian float32, always the same one, so that sketches add."""
    generator = torch.Generator().manual_seed(size)
    omega: Tensor = torch.randn(size, rank, generator=generator) / size**0.5
    return omega.to(device)


@dataclass(frozen=True, eq=False)
class Sketch:
    """A sketch of a positive semidefinite matrix M of size n.

    Args:
        product: Y = M Ω, (n, ℓ) float32.
        trace: tr(M), exact up to rounding.
    """

    product: Tensor
    trace: float

    @classmethod
    def of(cls, matrix: Tensor, rank: int | None = None) -> "Sketch":
        """The sketch of a matrix that is at hand, (n, n); its rank is :func:`sketch_rank` unless it is given."""
        omega = _test_matrix(len(matrix), rank or sketch_rank(len(matrix)), matrix.device)
        return cls(matrix.float() @ omega, float(matrix.diagonal().sum(dtype=torch.float64)))

    def __len__(self) -> int:
        return len(self.product)

    @property
    def rank(self) -> int:
        """ℓ."""
        return self.product.shape[1]

    def to(self, device: torch.device) -> "Sketch":
        """The sketch on another device; on the same one itself, with the eigenpairs that it knows."""
        return self if device == self.product.device else Sketch(self.product.to(device), self.trace)

    @cached_property
    def eigenpairs(self) -> Eigenpairs:
        """The eigenpairs of M_nys that rise above rounding, at most ℓ, with the trace of M; float32 vectors.

        Their residuals with M are bounded by ‖M − M_nys‖ ≤ tr(M) − tr(M_nys), or by rounding: that is what is reported.

        Raises:
            NumericsError: A number is not finite.
        """
        if not torch.isfinite(self.product).all():
            raise NumericsError(f"the sketch of a curvature factor of size {len(self)} has numbers that are not finite")
        omega = _test_matrix(len(self), self.rank, self.product.device)
        core = self.product.new_zeros(self.rank, self.rank, dtype=torch.float64)  # Ωᵀ Y
        gram = torch.zeros_like(core)  # Yᵀ Y
        for rows, of_omega in zip(torch.split(self.product, ROWS), torch.split(omega, ROWS), strict=True):
            Y = rows.double()
            core += of_omega.double().T @ Y
            gram += Y.T @ Y
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        kept = values > ROUNDING * values[-1].clamp(min=1e-300)
        root = vectors[:, kept] / values[kept].sqrt()  # M_nys = (Y root) (Y root)ᵀ
        values, vectors = torch.linalg.eigh(root.T @ gram @ root)
        values, vectors = values.flip(0), vectors.flip(1)
        kept = values > ROUNDING * values[:1].clamp(min=1e-300)
        values = values[kept]
        basis = root @ (vectors[:, kept] / values.sqrt())
        vectors = torch.cat([(rows.double() @ basis).float() for rows in torch.split(self.product, ROWS)])
        overlaps = torch.zeros_like(core[: len(values), : len(values)])  # products left of orthonormal by rounding
        for rows in torch.split(vectors, ROWS):
            overlaps += rows.double().T @ rows.double()
        mend = torch.linalg.inv(torch.linalg.cholesky(overlaps)).T
        vectors = torch.cat([(rows.double() @ mend).float() for rows in torch.split(vectors, ROWS)])
        left = max(self.trace - float(values.sum()), ROUNDING * float(values[:1].sum()))
        return Eigenpairs(
            values=values,
            vectors=vectors,
            residuals=torch.full_like(values, left),
            trace=max(self.trace, 0.0),
        )


Moment = Tensor | Sketch


class MomentSum:
    """A sum of v vᵀ that is added to vector by vector.

    Args:
        size: n.
        kind: ``dense`` or ``sketch``; where a sketch has no fewer columns, dense all the same.
        device: Where the float32 sum lives.
    """

    def __init__(self, size: int, kind: Kind, device: torch.device) -> None:
        columns = size if kind == "dense" else min(size, sketch_rank(size))
        self.total = torch.zeros(size, columns, device=device)
        self.squares = torch.zeros((), dtype=torch.float64)  # on the CPU: not every device has float64

    def add(self, vectors: Tensor) -> None:
        """Adds vectors, (count, n) of any float dtype."""
        vectors = vectors.float()
        size, columns = self.total.shape
        if size == columns:
            self.total.addmm_(vectors.T, vectors)
        else:
            omega = _test_matrix(size, columns, self.total.device)
            self.total.addmm_(vectors.T, vectors @ omega)
            self.squares += vectors.square().sum().cpu().double()

    def mean(self, count: int) -> Moment:
        """The sum divided by ``count``."""
        return moment_of(self.total, self.squares, count)

    def state(self) -> dict[str, Tensor]:
        """The tensors from which the sum goes on."""
        return {"total": self.total, "squares": self.squares}


def moment_of(total: Tensor, squares: Tensor, count: int) -> Moment:
    """What a state of :class:`MomentSum` holds, divided by ``count``: dense where ``total`` is square."""
    mean = total / count
    return mean if total.shape[0] == total.shape[1] else Sketch(mean, float(squares) / count)


def captured(moment: Moment, vectors: Tensor) -> float:
    """tr(Uᵀ M U) for orthonormal columns U, (n, k): the energy that their span holds; of a sketch, a lower bound."""
    if isinstance(moment, Tensor):
        U = vectors.to(moment)
        return float(((moment @ U) * U).sum(dtype=torch.float64))
    pairs = moment.eigenpairs
    return float(((pairs.vectors.T @ vectors.to(pairs.vectors)).double().square().sum(1) * pairs.values).sum())


def times(moment: Moment, X: Tensor) -> Tensor:
    """M X for X (n, k), float32; of a sketch, M_nys X: never more of Xᵀ M X than there is."""
    if isinstance(moment, Tensor):
        return moment.to(X) @ X
    U = moment.eigenpairs.vectors.to(X)
    return U @ (moment.eigenpairs.values.to(X)[:, None] * (U.T @ X))


def trace(moment: Moment) -> float:
    """tr(M)."""
    return moment.trace if isinstance(moment, Sketch) else float(moment.diagonal().sum(dtype=torch.float64))


def weighted_sum(moments: Sequence[Moment], weights: Sequence[float]) -> Moment:
    """Σ w_k M_k; dense if all are dense, else a sketch.

    Args:
        moments: At least one, of equal size.
        weights: As many numbers.

    Returns:
        The sum, on the device of the first.
    """
    sketches = [moment for moment in moments if isinstance(moment, Sketch)]
    if not sketches:
        total = torch.zeros_like(moments[0])  # type: ignore[arg-type]  # all are tensors
        for moment, weight in zip(moments, weights, strict=True):
            total.add_(moment.to(total.device), alpha=weight)  # type: ignore[arg-type]
        return total
    parts = [m if isinstance(m, Sketch) else Sketch.of(m, sketches[0].rank) for m in moments]
    product = torch.zeros_like(parts[0].product)
    for part, weight in zip(parts, weights, strict=True):
        product.add_(part.product.to(product.device), alpha=weight)
    return Sketch(product, sum(weight * part.trace for part, weight in zip(parts, weights, strict=True)))
