"""What ``auto`` will take of a matrix before its spectra are known: its own rules, asked on spectra that are assumed.

Assumed are eigenvalues that fall like j^-p: p = 1, unless a curvature is there that says how spread it is. A search for
leading eigenpairs is assumed to need a basis of :data:`SETTLING` vectors, and :data:`COLUMNS` more for each. Bases are
tensors on the ``meta`` device: they have shapes, and no memory.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from .costs import EIGH_BYTES, Shape, eigh_flops, nystrom_flops
from .description import ENERGY, RANK, TAKEN
from .eigen import at_most, grown
from .errors import ConfigError
from .moments import Kind, sketch_rank
from .rule_choice import chosen_update, metric_form, step_flops
from .spectra import default_constraint
from .spectrum import Spectrum
from .subspace import Form, Subspace
from .threshold import cross_threshold
from .updates import ROTATION, Update, check_update, leading_counts

SETTLING, COLUMNS = 128, 2.7
"""Vectors of a basis before the first pair is known, and for every pair: measured on spectra like j^-0.8 to j^-1.2 of
sizes 1100 to 3584, for 5 to 240 pairs (docs/decisions.md)."""
EXPONENT = 1.0
"""p, where nothing is known."""
STEEPEST = 4.0
"""The largest p."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How matrices are edited: what an edit's settings say of it, and ``auto`` where they do not.

    Args:
        constraint: Which directions are left out.
        update: How a gradient becomes a change of the weights.
        form: How a projection onto a staircase is evaluated.
        rotation: What the bases of update ``leading`` may cost; see :func:`crispedit.updates.leading_counts`.
        budget: Whether drift is kept within one (:mod:`crispedit.budget`).
    """

    constraint: Literal["auto", "staircase", "cross"] = "auto"
    update: Update | Literal["auto"] = "auto"
    form: Form | Literal["auto"] = "auto"
    rotation: float = ROTATION
    budget: bool = False

    def update_of(self, subspace: Subspace) -> Update:
        """The rule of a matrix.

        Args:
            subspace: Of the matrix.

        Returns:
            ``priced`` within a budget, what is asked for, or what ``auto`` takes.

        Raises:
            ConfigError: The subspace does not allow what is asked for.
        """
        update = "priced" if self.budget else self.update
        if update == "auto":
            return chosen_update(subspace, self.rotation)
        check_update(update, subspace)
        return update


AUTO = Method()
"""What an edit does unasked."""


@dataclass(kw_only=True)
class _Side:
    """A factor of size n while its eigenpairs are looked for.

    Args:
        values: (n,) float64, the eigenvalues that it is assumed to have.
        basis: Vectors that were multiplied with it.
        known: How many pairs are known.
        flops: Of products, in float64.
        cubes: Of diagonalisations, n³ summed.
    """

    values: Tensor
    basis: int = 0
    known: int = 0
    flops: int = 0
    cubes: int = 0

    @property
    def size(self) -> int:
        """N."""
        return len(self.values)

    @property
    def whole(self) -> bool:
        """Whether all pairs are known."""
        return self.known == self.size

    @property
    def held(self) -> int:
        """Vectors that are kept: all that the search has made."""
        return self.size if self.whole else self.basis

    def diagonalise(self) -> None:
        """Finds all pairs."""
        self.cubes += self.size**3
        self.known = self.size

    def search(self, count: int) -> None:
        """A step of :meth:`crispedit.eigen.TopSolver.search`."""
        goal = grown(self.size, self.basis, count)
        if goal is None:
            self.diagonalise()
            return
        # products with the matrix; and every column made orthogonal to the basis, twice
        self.flops += 2 * self.size**2 * (goal - self.basis) + 4 * self.size * (goal**2 - self.basis**2)
        self.basis, self.known = goal, max(0, int((goal - SETTLING) / COLUMNS))
        self.cubes += goal**3

    def at_most(self) -> Tensor:
        """(n,): the spectrum as far as it is known, the rest as large as may be."""
        return at_most(self.values[: self.known], float(self.values.sum()), self.size)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is done with one matrix.

    Args:
        update: The rule.
        rotation: What its bases may cost.
        subspace: Its bases on the ``meta`` device.
        flops: Of products that the spectra take: in float64 of dense factors, in float32 of sketches.
        cubes: Of diagonalisations, n³ summed.
        working_bytes: What both searches, or one diagonalisation, hold at the most beside factors and spectra.
    """

    update: Update
    rotation: float
    subspace: Subspace
    flops: int
    cubes: int
    working_bytes: int

    @property
    def entries(self) -> int:
        """Of the matrix."""
        d_out, d_in = self.subspace.shape
        return d_out * d_in

    @property
    def total_flops(self) -> int:
        """Products and diagonalisations."""
        return self.flops + eigh_flops(1) * self.cubes

    @property
    def spectrum_bytes(self) -> int:
        """Of float32 vectors and float64 eigenvalues."""
        (d_out, d_in), spectrum = self.subspace.shape, self.subspace.spectrum
        of_A, of_G = spectrum.num_vectors
        return 4 * (d_in * of_A + d_out * of_G) + 16 * (len(spectrum.alpha) + len(spectrum.beta))

    @property
    def turned(self) -> bool:
        """Whether W is seen in other bases while it is trained, so that tokens are turned and not the matrix."""
        crossed = self.subspace.threshold.cross is not None
        return self.update == "leading" or (self.update == "priced" and crossed)

    @property
    def frame_bytes(self) -> int:
        """Of the bases in which W is seen, which every process has."""
        if not self.turned:
            return 0
        counts = zip(leading_counts(self.subspace, self.rotation), self.subspace.shape, strict=True)
        return sum(4 * n**2 if k == n else 8 * n * k for k, n in counts)

    @property
    def rule_bytes(self) -> int:
        """What the rule holds beside its parameter and the bases in which W is seen, where the matrix is trained.

        A mask or what stands for one, or a metric; and W as it was, while it is seen in other bases.
        """
        d_out, d_in = self.subspace.shape
        metric = self.update in ("coordinates", "filter", "priced") or self.subspace.form == "equation6"
        return 4 * d_out * d_in * (self.turned + (metric and self.update != "leading"))

    def step_flops(self, tokens: int) -> int:
        """What the rule adds to a step of so many tokens."""
        return step_flops(self.update, self.subspace, tokens, self.rotation)


@lru_cache(maxsize=64)
def choose(
    shape: Shape, kind: Kind, energy: float, ranks: tuple[float, float] | None = None, method: Method = AUTO
) -> Choice:
    """What a method does with a matrix, and ``auto`` where it leaves that open.

    Args:
        shape: (d_out, d_in).
        kind: Of its factors.
        energy: γ in [0, 1).
        ranks: Effective ranks of A and of G, tr(M)² / ‖M‖²_F, where they are known.
        method: What is asked for.

    Returns:
        The choice.

    Raises:
        ConfigError: The method does not go with the kind of factors, or with itself.
    """
    d_out, d_in = shape
    constraint = default_constraint(kind, shape) if method.constraint == "auto" else method.constraint
    metric = method.budget and kind == "dense"  # crispedit.editors.crispedit.metric_subspace
    exponents = (EXPONENT, EXPONENT) if ranks is None else (exponent(d_in, ranks[0]), exponent(d_out, ranks[1]))
    inputs, outputs = (_Side(values=falling(n, p)) for n, p in zip((d_in, d_out), exponents, strict=True))
    if kind == "sketch" and constraint == "staircase":
        raise ConfigError("sketched factors know leading directions only: use constraint cross, or dense factors")
    if kind == "sketch":
        for side in (inputs, outputs):
            rank = sketch_rank(side.size)
            side.known = side.basis = rank
            side.cubes = 2 * rank**3
            side.flops = nystrom_flops(side.size) - eigh_flops(1) * side.cubes
        subspace = _cross(_spectrum(inputs, outputs, (inputs.known, outputs.known)), energy)
        working = EIGH_BYTES * max(inputs.known, outputs.known) ** 2
    elif metric or constraint == "staircase":
        inputs.diagonalise()
        outputs.diagonalise()
        form = metric_form(shape) if metric else method.form
        subspace = Subspace.of(_spectrum(inputs, outputs, shape[::-1]), energy, form)
        working = EIGH_BYTES * max(shape) ** 2
    else:
        r, c = _search_cross(inputs, outputs, energy)
        subspace = _cross(_spectrum(inputs, outputs, (c + 1, r + 1)), energy)
        # of both the float64 matrix and basis; of one that is diagonalised, another matrix and LAPACK's workspace too
        working = sum(8 * side.size * (side.size + side.held) for side in (inputs, outputs))
        working += max(((EIGH_BYTES - 8) * side.size**2 for side in (inputs, outputs) if side.whole), default=0)
    return Choice(
        update=method.update_of(subspace),
        rotation=math.inf if method.budget else method.rotation,
        subspace=subspace,
        flops=inputs.flops + outputs.flops,
        cubes=inputs.cubes + outputs.cubes,
        working_bytes=working,
    )


def falling(size: int, exponent: float) -> Tensor:
    """(n,) float64: j^-p, divided by their sum.

    Args:
        size: n.
        exponent: p.
    """
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -exponent
    return values / values.sum()


def exponent(size: int, rank: float) -> float:
    """The p at which j^-p are as spread as a spectrum is.

    Args:
        size: n.
        rank: Its effective rank, (Σ λ)² / Σ λ².

    Returns:
        From 0 to :data:`STEEPEST`.
    """
    low, high = 0.0, STEEPEST
    for _ in range(40):
        middle = (low + high) / 2
        if 1 / float(falling(size, middle).square().sum()) > rank:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@lru_cache(maxsize=64)
def described_ranks(shape: Shape) -> tuple[int, ...]:
    """How many leading pairs of dense factors are found to describe a matrix (:func:`crispedit.description.describe`).

    Args:
        shape: (d_out, d_in) of the matrix, whose spectra are assumed to fall like 1/j.

    Returns:
        In the order in which they are tried.
    """
    d_out, d_in = shape
    widest = max(cross_threshold(falling(d_in, EXPONENT), falling(d_out, EXPONENT), ENERGY).cross or (0, 0))
    ranks = [RANK]
    while ranks[-1] < min(widest / TAKEN, sketch_rank(max(shape))):
        ranks.append(2 * ranks[-1])
    return tuple(ranks)


def _search_cross(inputs: _Side, outputs: _Side, energy: float) -> tuple[int, int]:
    """The search of :meth:`crispedit.spectrum.Spectrum.for_cross`; the rows and columns that it ends with."""
    while True:
        r, c = cross_threshold(inputs.at_most(), outputs.at_most(), energy).cross or (0, 0)
        wanted = [(s, k) for s, k in ((outputs, r), (inputs, c)) if k and s.known < min(k + 1, s.size)]
        if not wanted:
            return r, c
        for side, count in wanted:
            side.search(count)


def _spectrum(inputs: _Side, outputs: _Side, counts: tuple[int, int]) -> Spectrum:
    """So many pairs of A and of G, or all where all are known; what a search has left over beside them."""
    sides = (inputs, outputs)
    taken = [side.size if side.whole else min(count, side.known) for side, count in zip(sides, counts, strict=True)]
    alpha, beta = (side.values[:k] for side, k in zip(sides, taken, strict=True))
    bases = [torch.empty(side.size, k, device="meta") for side, k in zip(sides, taken, strict=True)]
    following = [
        torch.empty(side.size, max(side.held - k, 0), device="meta") for side, k in zip(sides, taken, strict=True)
    ]
    beyond = [side.values[k : side.known] for side, k in zip(sides, taken, strict=True)]
    return Spectrum(
        alpha=alpha,
        beta=beta,
        input_basis=bases[0],
        output_basis=bases[1],
        traces=(1.0, 1.0),
        residuals=(torch.zeros_like(alpha), torch.zeros_like(beta)),
        beyond=(beyond[0], beyond[1]),
        following=(following[0], following[1]),
    )


def _cross(spectrum: Spectrum, energy: float) -> Subspace:
    """The cross at an energy, or at a tenth, two tenths, … less, where a sketch does not hold so much."""
    while True:
        try:
            return Subspace.of(spectrum, energy, "cross")
        except ConfigError:
            energy = max(round(energy - 0.1, 1), 0.0)
