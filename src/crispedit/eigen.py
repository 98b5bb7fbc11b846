"""The top of a positive semidefinite matrix: as many leading eigenpairs as a purpose needs, with residuals.

Rayleigh–Ritz over a block Krylov space (Golub & Underwood, The block Lanczos method, 1977), with a basis that is kept
orthogonal in full and never restarted: beside the products with the matrix, which are what costs, that is cheap. Only
what is asked for has to converge. Of all else, residuals and the trace, which is exact, say how large it may be.

The matrix is held in float64, even one that comes in float32: a product in float32 is off by 1e-7 of the largest
eigenvalue, which is far more than the distance of two neighbours hundreds of places down.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError, NumericsError

BLOCK = 16
"""Columns of a block: the fewest that products are not much slower for. A narrow block needs fewer columns in all."""
PROJECTOR = 1e-5
"""The projector onto the pairs asked for is right to this, relative in Frobenius norm, if the gap is SAME or more."""
SAME = 1e-3
"""Eigenvalues that are closer than this, relatively, need not be told apart."""
VALUE = 1e-7
"""A pair is known when ‖M v − λ v‖ ≤ VALUE · λ: its eigenvalue is then right to VALUE² λ / (relative gap)."""
DENSE_SHARE = 0.25
"""A basis with more than this share of all directions is not worth it: a full diagonalisation is cheaper."""
DENSE_SIZE = 1024
"""So it is for every matrix up to this size."""
NOVELTY = 1e-2
"""A warm start has this much of what the old vectors do not span: a direction that is new must not be missed."""
MISSED, ROUNDS = 1e-3, 3
"""A refreshed basis may miss this share of the energy that it could hold; rounds that it is given to get there."""
TILE = 1024
"""Rows and columns of what is converted at a time."""
WIDEST = 32_766
"""LAPACK counts the 2 n² numbers that its solver works with in 32 bits."""


@dataclass(frozen=True, kw_only=True)
class Eigenpairs:
    """Leading eigenpairs of a positive semidefinite matrix of size n.

    Args:
        values: (k,) float64, descending, not negative.
        vectors: (n, k) float64, of a sketch and of what is approximate float32; orthonormal columns.
        residuals: (k,) float64, ‖M v − λ v‖. Every one of ``values`` lies that close to an eigenvalue of M
            (Parlett, The Symmetric Eigenvalue Problem, theorem 4.5.1).
        trace: Of M.
        beyond: What the eigenvalues that follow are at most, (j,) float64, descending, where that is known; those
            after that are no larger than the last.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    trace: float
    beyond: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def size(self) -> int:
        """N."""
        return len(self.vectors)

    def projector_error(self, count: int) -> float:
        """A bound on ‖P − P'‖_F for the orthogonal projectors onto the first ``count`` vectors, found and true.

        Of v_i, a part of at most ‖r_i‖ / δ_i lies outside the true space, δ_i being the distance of λ_i from the
        eigenvalues outside (Davis & Kahan 1970); and ‖P − P'‖_F is √2 times the norm of these parts. It holds if
        no eigenvalue above the cut was missed: see :class:`TopSolver`.

        Args:
            count: At most ``len(self) - 1``, or all n.

        Returns:
            The bound; infinity where the gap is not resolved.
        """
        if count in (0, self.size):
            return 0.0
        gaps = self.values[:count] - self.values[count] - self.residuals[count]
        return 2**0.5 * float((self.residuals[:count] / gaps).norm()) if float(gaps[-1]) > 0 else float("inf")


def at_most(values: Tensor, trace: float, size: int) -> Tensor:
    """A spectrum of which the top is bounded from above, the rest as large as top and trace allow.

    Args:
        values: (k,) float64, bounds of the leading eigenvalues, descending.
        trace: The sum of all.
        size: n.

    Returns:
        (n,): the values; then the last of them again and again; what exceeds the trace is cut off.
    """
    if len(values) >= size:
        return values[:size]
    last = values[-1:] if len(values) else values.new_tensor([trace])
    filled = torch.cat([values, last.expand(size - len(values))])
    return torch.minimum(filled, (trace - (filled.cumsum(0) - filled)).clamp(min=0))


def full_eigenpairs(matrix: Tensor, name: str = "") -> Eigenpairs:
    """All eigenpairs by dense diagonalisation in float64.

    Args:
        matrix: (n, n), symmetric up to rounding, positive semidefinite up to rounding.
        name: Of the matrix, for the error message.

    Returns:
        All n pairs; their residuals are bounded by the backward error of the diagonalisation, n ε λ₁.

    Raises:
        NumericsError: A number is not finite.
        ConfigError: The matrix is wider than LAPACK can diagonalise.
    """
    if matrix.device.type == "cpu" and len(matrix) > WIDEST:
        raise ConfigError(
            f"a curvature factor{f' ({name})' if name else ''} is {len(matrix):,} wide, and at most {WIDEST:,} can be "
            "diagonalised whole on a CPU: compute the curvature with --factors sketch"
        )
    double = _symmetric(matrix, name)
    values, vectors = torch.linalg.eigh(double)
    values = values.flip(0).clamp(min=0)  # two tiny negative eigenvalues would make a positive product
    return Eigenpairs(
        values=values,
        vectors=vectors.flip(1).contiguous(),
        residuals=torch.full_like(values, _rounding(values)),
        trace=float(double.diagonal().sum()),
    )


def approximate_pairs(matrix: Tensor, rank: int, seed: int = 0) -> Eigenpairs:
    """About the leading pairs: Rayleigh–Ritz over the range of M² Ω, Ω random (Halko, Martinsson & Tropp 2011, 4.5).

    Where a spectrum falls like 1/j the values are right to 2 % in the first quarter and to 10 % in the first half. None
    is too large, so that what so many vectors are said to hold of the trace they do hold.

    Args:
        matrix: (n, n) float32, positive semidefinite up to rounding.
        rank: How many.
        seed: Of Ω.

    Returns:
        That many pairs, or n; float32 vectors.
    """
    omega = torch.randn(len(matrix), min(rank, len(matrix)), generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(matrix @ omega.to(matrix))[0]
    basis = torch.linalg.qr(matrix @ basis)[0]
    images = matrix @ basis
    values, turns = torch.linalg.eigh((basis.T @ images).double())
    values, turns = values.flip(0).clamp(min=0), turns.flip(1).to(matrix)
    vectors = basis @ turns
    residuals = (images @ turns - vectors * values.to(matrix)).norm(dim=0).double()
    trace = float(matrix.diagonal().sum(dtype=torch.float64))
    return Eigenpairs(values=values, vectors=vectors, residuals=residuals, trace=trace)


def _rounding(values: Tensor, size: int | None = None) -> float:
    """Below n ε λ₁ a residual means nothing."""
    return (size or len(values)) * torch.finfo(torch.float64).eps * float(values[0])


def _symmetric(matrix: Tensor, name: str) -> Tensor:
    """The matrix in float64, symmetrised: accumulation rounds M_ij and M_ji apart. Tile by tile, in the cache."""
    double = torch.empty(matrix.shape, dtype=torch.float64, device=matrix.device)
    tiles = [slice(i, i + TILE) for i in range(0, len(matrix), TILE)]
    for k, rows in enumerate(tiles):
        for columns in tiles[: k + 1]:
            tile = (matrix[rows, columns].double() + matrix[columns, rows].T) / 2
            if not math.isfinite(float(tile.sum())):
                shape = tuple(matrix.shape)
                raise NumericsError(f"curvature factor {name} of shape {shape} has numbers that are not finite")
            double[rows, columns] = tile
            double[columns, rows] = tile.T
    return double


def grown(size: int, basis: int, count: int) -> int | None:
    """How large the basis of a search will be after some more blocks.

    Args:
        size: n.
        basis: Vectors in the basis so far.
        count: How many pairs are wanted.

    Returns:
        Vectors in the basis; ``None`` where a full diagonalisation is cheaper.
    """
    goal = basis + max(4 * BLOCK, basis // 10)
    return None if size <= DENSE_SIZE or max(goal, count) > DENSE_SHARE * size else goal


class TopSolver:
    """Finds the leading eigenpairs of one matrix, and more of them when asked again.

    With V the basis (one vector per row), T = V M Vᵀ and Q the block that comes next, M Vᵀ = Vᵀ T + Qᵀ R up to
    rounding, with an R that is zero but for the last columns: T's eigenvectors give Ritz pairs, and R their
    residuals, without another product.

    No eigenvalue is missed, with probability one, for the first block is random; but of an eigenvalue of higher
    multiplicity than a block has columns, only so many copies can be seen. Where so many agree, the block is widened.

    Args:
        matrix: (n, n), symmetric and positive semidefinite up to rounding.
        name: Of the matrix, for the error message.
        start: (n, j) columns that are probably near the leading eigenvectors: those of an earlier matrix.
        seed: Of what is random.

    Attributes:
        values: (m,) float64, the Ritz values of the basis, descending: none exceeds the eigenvalue at its place.
        residuals: (m,) float64.
        products: Columns that the matrix was multiplied with: what the search cost.

    Raises:
        NumericsError: A number is not finite.
    """

    def __init__(self, matrix: Tensor, name: str = "", *, start: Tensor | None = None, seed: int = 0) -> None:
        n = len(matrix)
        self.matrix = _symmetric(matrix, name)
        self.trace = float(self.matrix.diagonal().sum())
        self.products = 0
        self.values = self.residuals = self.matrix.new_zeros(0)
        self._known = 0  # so many leading Ritz pairs are right to VALUE
        self._crowd = n + 1  # so many lead up to the first that agree in such number that more copies may be unseen
        self._generator = torch.Generator().manual_seed(seed)
        self._full: Eigenpairs | None = None
        self._V, self._T = self.matrix.new_empty(0, n), self.matrix.new_empty(0, 0)
        self._R = self._S = self._T
        self._m, self._width, self._scale = 0, BLOCK, 0.0  # vectors in the basis, in a block; about λ₁
        block = self._random(BLOCK, n)
        if start is not None and start.shape[1]:  # mixtures of the old vectors, with a little of everything else
            mixtures = self._random(BLOCK, start.shape[1]) @ start.to(self.matrix).T
            block = mixtures / mixtures.norm() + NOVELTY * block / block.norm()
        self._next, _, _ = self._orthonormal(block)

    def top(self, count: int) -> Eigenpairs:
        """The leading pairs.

        Args:
            count: How many at least.

        Returns:
            That many and one more, for the gap, where there is one; all of them if it took a full diagonalisation.
        """
        while not self.settled(count):
            self.search(count)
        return self.pairs(count + 1)

    def settled(self, count: int) -> bool:
        """Whether the first ``count`` pairs and their projector are known: see :data:`PROJECTOR` and :data:`SAME`."""
        wanted = min(count + 1, len(self.matrix))
        if count == 0 or len(self.values) == len(self.matrix):
            return True
        if self._known < wanted or self._crowd <= wanted:
            return False
        values, residuals = self.values[:wanted], self.residuals[:wanted]
        gaps = (values[:-1] - values[-1] - residuals[-1]).clamp(min=SAME * float(values[-2]))
        error = (residuals[:-1] / gaps)[residuals[:-1] > _rounding(values, len(self.matrix))].norm()
        return bool(2**0.5 * float(error) <= PROJECTOR * count**0.5)

    def search(self, count: int) -> None:
        """Takes a few more blocks into the basis, to find ``count`` pairs; finds all if the basis grows too large."""
        n = len(self.matrix)
        goal = grown(n, self._m, count)
        if goal is None:
            self._full = full_eigenpairs(self.matrix)
            self.values, self.residuals, self._known = self._full.values, self._full.residuals, n
            return
        if self._crowd <= min(count + 1, self._known):
            self._width += BLOCK
        while self._m < min(goal, n):
            self._expand()
        values, S = torch.linalg.eigh(self._T[: self._m, : self._m])
        self.values, self._S = values.flip(0).clamp(min=0), S.flip(1)
        rounding = _rounding(self.values, n)
        residuals = (self._R @ self._S[self._m - self._R.shape[1] :]).norm(dim=0)
        self.residuals = residuals.clamp(min=rounding)
        self._known = int((self.residuals <= (VALUE * self.values).clamp(min=rounding)).cumprod(0).sum())
        first, last = self.values[: 1 - self._width], self.values[self._width - 1 :]
        crowded = ((first - last <= SAME * first) & (last > rounding)).nonzero()
        self._crowd = int(crowded[0]) + self._width if len(crowded) else n + 1

    def at_most(self) -> Tensor:
        """(n,): the whole spectrum, what is not known taken for as large as residuals and trace allow."""
        return at_most(self._bounds(), self.trace, len(self.matrix))

    def pairs(self, count: int) -> Eigenpairs:
        """The first ``count`` pairs, or those of them that are known; all if it took a full diagonalisation."""
        if self._full is not None:
            return self._full
        count = min(count, self._known)
        return Eigenpairs(
            values=self.values[:count],
            vectors=self._V[: self._m].T @ self._S[:, :count],
            residuals=self.residuals[:count],
            beyond=self._bounds()[count:],
            trace=self.trace,
        )

    def following(self, count: int) -> Tensor:
        """(n, j) orthonormal columns: Ritz vectors after the first ``count``, not converged, that the search left over.

        What they are good for is a basis that begins with what probably matters.
        """
        if self._full is not None or not self._m:
            return self.matrix.new_empty(len(self.matrix), 0)
        return self._V[: self._m].T @ self._S[:, min(count, self._known) :]

    def _bounds(self) -> Tensor:
        """What the first eigenvalues are at most: those known; then value and residual of pairs nearly found.

        Of pairs further down neither says much: such a Ritz value stands for many eigenvalues at once.
        """
        run = (self.residuals <= SAME * self.values).cumprod(0)
        nearly = min(max(self._known, int(run.sum())), self._crowd)
        unknown = torch.arange(len(run), device=run.device) >= self._known
        return (self.values + unknown * self.residuals)[:nearly].cummin(0).values

    def _expand(self) -> None:
        """Takes the next block into the basis, and finds the one after it."""
        first, k = self._m, len(self._next)
        self._m += k
        if self._m > len(self._V):
            self._V = _enlarged(self._V, 2 * self._m, len(self.matrix))
            self._T = _enlarged(self._T, 2 * self._m, 2 * self._m)
        self._V[first : self._m] = self._next
        W = self._next @ self.matrix
        self.products += k
        self._scale = max(self._scale, float(W.norm(dim=1).max()))
        block, self._R, T = self._orthonormal(W)
        self._T[first : self._m, : self._m], self._T[: self._m, first : self._m] = T, T.T
        if len(block) < self._width and self._m + len(block) < len(self.matrix):  # the space is exhausted, or crowded
            noise = self._random(self._width - len(block), len(self.matrix))
            noise *= (self._scale or 1.0) / noise.norm(dim=1, keepdim=True)
            block, R, _ = self._orthonormal(torch.cat([W, noise]))
            self._R = R[:, :k]
        self._next = block

    def _orthonormal(self, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Splits a block (k, n) of rows into what lies in the basis and what does not.

        Returns:
            Q (j, n), R (j, k) and C (k, m): block = Rᵀ Q + C V up to rounding, with orthonormal rows in Q and V.
        """
        V = self._V[: self._m]
        C = block @ V.T
        Q, R = torch.linalg.qr((block - C @ V).T)
        U, s, Z = torch.linalg.svd(R, full_matrices=False)
        kept = s > 100 * torch.finfo(torch.float64).eps * max(self._scale, float(block.norm()))
        Q = (Q @ U[:, kept]).T
        Q = Q - (Q @ V.T) @ V  # of a short remainder the first time left rounding behind
        L = torch.linalg.cholesky(Q @ Q.T)  # near the identity: accurate, and faster than a second QR
        return torch.linalg.solve_triangular(L, Q, upper=False), L.T @ (s[kept, None] * Z[kept]), C

    def _random(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self._generator, dtype=torch.float64).to(self.matrix.device)


def _enlarged(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix as the corner of a larger one, of which the rest is not yet written."""
    larger = matrix.new_empty(rows, columns)
    larger[: matrix.shape[0], : matrix.shape[1]] = matrix
    return larger


def refreshed(matrix: Tensor, start: Tensor, name: str = "") -> Eigenpairs | None:
    """Leading vectors of an earlier matrix made those of a matrix that is nearly the same, as far as energy goes.

    Rayleigh–Ritz over the old vectors and the directions into which the new matrix moves them most. The values are
    Rayleigh quotients: what the vectors hold of the new matrix they do hold, whatever the vectors' own error, and
    what they miss of the most that so many could hold is about Σ ‖r_i‖² / θ_i, of second order in that error (and
    several times that where the spectrum is flat). An eigenvector whose neighbours are close may be off by much more:
    for that, see :class:`TopSolver`.

    Args:
        matrix: (n, n) float32, symmetric and positive semidefinite up to rounding.
        start: (n, j) orthonormal columns, leading eigenvectors of the earlier matrix.
        name: Of the matrix, for the error message.

    Returns:
        More than j pairs, the values right to float32 rounding; all of them where that is as cheap; none of none;
        ``None`` where
        more than :data:`MISSED` of the energy would be missed after :data:`ROUNDS` rounds: the matrix is another one.

    Raises:
        NumericsError: A number is not finite.
    """
    trace = float(matrix.diagonal().sum(dtype=torch.float64))
    if not start.shape[1]:  # nothing to set out from, and nothing that it took
        nothing = torch.zeros(0, dtype=torch.float64, device=matrix.device)
        return Eigenpairs(values=nothing, vectors=nothing.expand(len(matrix), 0), residuals=nothing, trace=trace)
    if len(matrix) <= DENSE_SIZE or start.shape[1] + 2 * BLOCK * ROUNDS > DENSE_SHARE * len(matrix):
        return full_eigenpairs(matrix, name)
    V = start.to(matrix)
    W = matrix @ V
    if not (torch.isfinite(W).all() and math.isfinite(trace)):
        raise NumericsError(f"curvature factor {name} of shape {tuple(matrix.shape)} has numbers that are not finite")
    for _ in range(ROUNDS):
        R = W - V @ (V.T @ W)
        moved = torch.linalg.eigh((R.T @ R).double())[1].flip(1)[:, : 2 * BLOCK].to(matrix)
        Q = R @ moved
        for _ in range(2):  # once leaves rounding behind
            Q = torch.linalg.qr(Q - V @ (V.T @ Q))[0]
        V, W = torch.cat([V, Q], 1), torch.cat([W, matrix @ Q], 1)
        values, S = torch.linalg.eigh((V.T @ W).double())
        values, S = values.flip(0), S.flip(1).to(matrix)
        V, W = V @ S, W @ S
        residuals = (W - V * values.to(matrix)).norm(dim=0).double()
        leading = slice(0, start.shape[1])  # the vectors beyond are there to take up what is new
        missed = float((residuals[leading].square() / values[leading].clamp(min=1e-300)).sum())
        if missed <= MISSED * float(values[leading].sum()):
            return Eigenpairs(values=values.clamp(min=0), vectors=V.double(), residuals=residuals, trace=trace)
    return None
