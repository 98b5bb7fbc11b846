"""The constraints that are compared. One function each: curvature of a matrix in, what becomes of a gradient out.

To add one, write a function of a :class:`Known` curvature and the energies γ, and decorate it with
:func:`constraint`; its name with ``-`` for ``_`` is its name on the command line. It returns a cut:
a :class:`KroneckerCut` (weights on the directions of a Kronecker eigenbasis) or a :class:`DenseCut` (eigenvectors
removed).
Where curvatures are cut is :mod:`crispedit.threshold`'s and :mod:`crispedit.subspace`'s to say, as for language models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ..eigen import TopSolver
from ..errors import ConfigError, check_choice
from ..spectrum import Spectrum
from ..subspace import Subspace
from ..threshold import table_threshold
from .layer import LayerCurvature, relative_difference
from .oracle import against_curvlinops

SAME = 1e-12
"""A Hessian that differs from the GNH by less than this, relatively, is the same up to rounding."""
SLOWEST = 1e-3
"""The smallest factor on the learning rate of plain fine-tuning, whose trade-off is drawn by slowing it down."""


class Known:
    """The curvature of one matrix at one set of weights; what several constraints need is computed once.

    Args:
        layer: What curvatures are made of.
    """

    def __init__(self, layer: LayerCurvature) -> None:
        self.layer = layer
        self._exact: dict[tuple[float, ...], DenseCut] = {}

    @cached_property
    def roots(self) -> Tensor:
        """(n, classes, d_out): see :meth:`LayerCurvature.roots`."""
        return self.layer.roots()

    @cached_property
    def kfac(self) -> Spectrum:
        """Of K-FAC's factors."""
        return Spectrum.of(*self.layer.factors(self.roots))

    @cached_property
    def optimal(self) -> Spectrum:
        """Of the nearest Kronecker product's factors."""
        return Spectrum.of(*self.layer.optimal_factors(self.roots))

    def exact(self, energies: Sequence[float]) -> "DenseCut":
        """The cut of the exact Gauss–Newton Hessian.

        Args:
            energies: Each in [0, 1).

        Returns:
            The cut; the same one when asked again.

        Raises:
            NumericsError: A number is not finite.
        """
        if tuple(energies) not in self._exact:
            matrix = self.layer.gauss_newton(self.roots)
            notes = {"products_against_curvlinops": against_curvlinops(self.layer, matrix, "gnh")}
            values, vectors = leading(matrix, max(energies))
            cut = DenseCut.of(values, vectors, float(matrix.diagonal().sum()), energies)
            self._exact[tuple(energies)] = replace(cut, notes=notes)
        return self._exact[tuple(energies)]


class Cut(Protocol):
    """What a constraint does to gradients, for every energy γ_k at once."""

    @property
    def removed(self) -> list[int]:
        """How many directions are removed, for every γ (0 for soft constraints)."""

    @property
    def rates(self) -> Tensor:
        """(K, 1, 1), factors on the learning rate."""

    def step(self, gradients: Tensor) -> Tensor:
        """Gradients (K, d_out, d_in), one for every γ, as they are applied."""


@dataclass(frozen=True)
class KroneckerCut:
    """Weights on the directions of Kronecker eigenbases: X ↦ U_G ((U_Gᵀ X U_A) ⊙ F) U_Aᵀ, eq. 6 where F is a mask.

    Args:
        output_basis: U_G, (1 or K, d_out, d_out) float32.
        input_basis: U_A, (1 or K, d_in, d_in) float32.
        weights: F, (K, d_out, d_in) float32.
        curvatures: (d_out, d_in) float64, what the directions are sorted by.
    """

    output_basis: Tensor
    input_basis: Tensor
    weights: Tensor
    curvatures: Tensor

    @classmethod
    def of(cls, subspaces: Sequence[Subspace], *, soft: bool = False) -> "KroneckerCut":
        """Of subspaces of one spectrum, at every γ: their masks, or their soft masks μ / (λ + μ)."""
        spectrum, table = subspaces[0].spectrum, subspaces[0].threshold.table
        weights = torch.stack([subspace.shrinkage if soft else subspace.mask for subspace in subspaces])
        curvatures = torch.outer(spectrum.beta, spectrum.alpha) if table is None else table.double()
        return cls(spectrum.output_basis[None], spectrum.input_basis[None], weights, curvatures)

    @property
    def removed(self) -> list[int]:
        """How many weights are 0."""
        return [int(count) for count in (self.weights == 0).sum((1, 2))]

    @property
    def rates(self) -> Tensor:
        """All 1."""
        return self.weights.new_ones(len(self.weights), 1, 1)

    def step(self, gradients: Tensor) -> Tensor:
        """Into the bases, weighted, and back."""
        inside = self.output_basis.mT @ gradients @ self.input_basis
        return self.output_basis @ (inside * self.weights) @ self.input_basis.mT

    def replaced(self, which: Tensor, others: "Sequence[KroneckerCut]") -> "KroneckerCut":
        """With the cuts of single energies ``others`` in the places ``which``, as after a refresh."""
        K = len(self.weights)
        bases = [U.expand(K, -1, -1).clone() for U in (self.output_basis, self.input_basis)]
        weights = self.weights.clone()
        for place, other in zip(which.tolist(), others, strict=True):
            bases[0][place], bases[1][place] = other.output_basis[0], other.input_basis[0]
            weights[place] = other.weights[0]
        return replace(self, output_basis=bases[0], input_basis=bases[1], weights=weights)


@dataclass(frozen=True)
class DenseCut:
    """Leading eigenvectors of a dense curvature removed: X ↦ X − U Uᵀ vec(X), with a U for every γ.

    The sets are nested, so eigenvectors are multiplied in blocks, from one γ's count to the next.

    Args:
        vectors: (n, k) float32, by falling |λ|, as many as the largest γ removes; n = d_out d_in, row-major.
        removed: How many of them every γ removes.
        captured: What share of Σ|λ| these hold.
        notes: What was found beside: plain data for the record.
    """

    vectors: Tensor
    removed: list[int]
    captured: list[float]
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Tensor, vectors: Tensor, total: float, energies: Sequence[float]) -> "DenseCut":
        """Of leading eigenpairs, more than the largest γ takes, or all.

        Args:
            values: |λ|, (k,) float64, falling.
            vectors: (n, k).
            total: Σ|λ| of all n.
            energies: Each in [0, 1).
        """
        n, k = vectors.shape
        # where it is cut depends on the sums alone, so that what is not known may be spread evenly
        rest = values.new_full((n - k,), max(total - float(values.sum()), 0.0) / max(n - k, 1))
        thresholds = [table_threshold(torch.cat([values, rest])[None], energy) for energy in energies]
        removed = [threshold.num_high for threshold in thresholds]
        return cls(vectors[:, : max(removed)].float().contiguous(), removed, [t.captured for t in thresholds])

    @property
    def rates(self) -> Tensor:
        """All 1."""
        return self.vectors.new_ones(len(self.removed), 1, 1)

    def step(self, gradients: Tensor) -> Tensor:
        """Projected off the removed eigenvectors."""
        flat = gradients.flatten(1)
        left = flat.clone()
        edges = [0, *sorted({*self.removed} - {0})]
        for start, end in pairwise(edges):
            concerned = [k for k, count in enumerate(self.removed) if count > start]
            U = self.vectors[:, start:end]
            left[concerned] -= (flat[concerned] @ U) @ U.T
        return left.view_as(gradients)


class Slowed:
    """No constraint: every gradient as it is, at learning rates from the full one down to :data:`SLOWEST` of it."""

    def __init__(self, count: int) -> None:
        self.removed = [0] * count
        self.rates = torch.logspace(0, float(torch.tensor(SLOWEST).log10()), count)[:, None, None]

    def step(self, gradients: Tensor) -> Tensor:
        """As they are."""
        return gradients


Function = Callable[[Known, Sequence[float]], Cut]


@dataclass(frozen=True)
class Constraint:
    """An entry of the registry.

    Args:
        name: On the command line and in files.
        title: For tables and pictures.
        function: Curvature and energies to a cut.
        dense: Whether it takes the diagonalisation of a dense curvature, of minutes.
        refresh: Whether its cut is computed anew when the weights have moved far.
    """

    name: str
    title: str
    function: Function
    dense: bool = False
    refresh: bool = False


CONSTRAINTS: dict[str, Constraint] = {}
"""All constraints by name, in the order in which they are shown."""


def constraint(title: str, *, dense: bool = False, refresh: bool = False) -> Callable[[Function], Function]:
    """Registers a function as a constraint; see :class:`Constraint`."""

    def register(function: Function) -> Function:
        name = function.__name__.replace("_", "-")
        CONSTRAINTS[name] = Constraint(name, title, function, dense, refresh)
        return function

    return register


def chosen_constraints(names: str | None, *, dense: bool) -> list[Constraint]:
    """The constraints of a comma-separated list, in the registry's order.

    Args:
        names: The list; ``all``; or ``None`` for all that are affordable.
        dense: Whether dense ones are, when nothing is named.

    Returns:
        The constraints.

    Raises:
        ConfigError: A name is unknown.
    """
    if names is None:
        return [c for c in CONSTRAINTS.values() if dense or not c.dense]
    if names == "all":
        return list(CONSTRAINTS.values())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        check_choice("constraint", name, CONSTRAINTS)
    if not wanted:
        raise ConfigError(f"no constraint is named; choose from {', '.join(CONSTRAINTS)}")
    return [c for c in CONSTRAINTS.values() if c.name in wanted]


# ---------------------------------------------------------------- the constraints


@constraint("no constraint")
def none(known: Known, energies: Sequence[float]) -> Cut:
    """Plain fine-tuning; γ means nothing to it, so it is slowed down, as by anyone who wants to keep more."""
    return Slowed(len(energies))


@constraint("exact Hessian", dense=True)
def hessian(known: Known, energies: Sequence[float]) -> Cut:
    """The eigenvectors of the Hessian of the capability loss, by falling |λ| (CrispEdit, section 3.1, eq. 3).

    Where it *is* the GNH, which it is between the kinks of ReLU, the GNH's eigenvectors are its own.
    """
    matrix = known.layer.hessian()
    notes: dict[str, Any] = {"products_against_curvlinops": against_curvlinops(known.layer, matrix, "hessian")}
    notes["difference_from_gnh"] = relative_difference(matrix, known.layer.gauss_newton(known.roots))
    if notes["difference_from_gnh"] < SAME:
        return replace(known.exact(energies), notes=notes)
    values, vectors = torch.linalg.eigh(matrix.float())  # indefinite: all of it; float32 takes half of the time
    order = values.abs().argsort(descending=True)
    values = values.abs()[order].double()
    return replace(DenseCut.of(values, vectors[:, order], float(values.sum()), energies), notes=notes)


@constraint("exact GNH", dense=True)
def gnh(known: Known, energies: Sequence[float]) -> Cut:
    """The eigenvectors of the Gauss–Newton Hessian (CrispEdit, section 3.2)."""
    return known.exact(energies)


@constraint("K-FAC")
def kfac(known: Known, energies: Sequence[float]) -> Cut:
    """Pairs of eigenvectors of E[a aᵀ] and E[G_n] by β_i α_j (CrispEdit, section 3.3): the main method's staircase."""
    return KroneckerCut.of([Subspace.of(known.kfac, energy, "equation6") for energy in energies])


@constraint("K-FAC, refreshed", refresh=True)
def kfac_refreshed(known: Known, energies: Sequence[float]) -> Cut:
    """K-FAC, computed anew at the current weights whenever these have moved far."""
    return kfac(known, energies)


@constraint("K-FAC, empirical")
def kfac_empirical(known: Known, energies: Sequence[float]) -> Cut:
    """K-FAC with gradients at the data's own labels, as in the published code."""
    spectrum = Spectrum.of(*known.layer.empirical_factors())
    return KroneckerCut.of([Subspace.of(spectrum, energy, "equation6") for energy in energies])


@constraint("EK-FAC")
def ekfac(known: Known, energies: Sequence[float]) -> Cut:
    """K-FAC's eigenvectors, cut by what is measured along each pair (George et al. 2018)."""
    moments = known.layer.moments(known.roots, known.kfac.output_basis, known.kfac.input_basis)
    return KroneckerCut.of([Subspace.of_table(known.kfac, moments, energy) for energy in energies])


@constraint("activation covariance")
def activation_covariance(known: Known, energies: Sequence[float]) -> Cut:
    """Eigenvectors of E[a aᵀ] alone (Adam-NSCL, arXiv 2103.15526)."""
    inputs = known.kfac.of_inputs()
    return KroneckerCut.of([Subspace.of(inputs, energy, "equation6") for energy in energies])


@constraint("soft filter")
def soft_filter(known: Known, energies: Sequence[float]) -> Cut:
    """Every direction of K-FAC's eigenbasis shrunk by μ / (λ + μ), μ the threshold that γ gives, instead of cut."""
    return KroneckerCut.of([Subspace.of(known.kfac, energy, "equation6") for energy in energies], soft=True)


@constraint("optimal Kronecker")
def optimal_kronecker(known: Known, energies: Sequence[float]) -> Cut:
    """Eigenvectors of the factors whose product is nearest to the GNH; see :meth:`LayerCurvature.optimal_factors`."""
    return KroneckerCut.of([Subspace.of(known.optimal, energy, "equation6") for energy in energies])


def leading(matrix: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs that hold an energy, and one more, by the package's own solver (:mod:`crispedit.eigen`).

    Args:
        matrix: (n, n) float64, positive semidefinite up to rounding.
        energy: γ in [0, 1), of the trace.

    Returns:
        Values (k,), falling, and vectors (n, k); all n where that is cheaper.

    Raises:
        NumericsError: A number is not finite.
    """
    solver = TopSolver(matrix, "of the exact GNH")
    while True:
        sums = solver.values.cumsum(0)  # of Ritz values, which are too small until they have settled
        count = int((sums < energy * solver.trace).sum()) + 1
        if count <= len(sums) and solver.settled(count):
            pairs = solver.pairs(count + 1)
            return pairs.values, pairs.vectors
        solver.search(count)
