"""The low-curvature subspace of one matrix: spectrum, energy threshold, projection, coordinates.

Pure tensors; nothing here knows of a model. Conventions as in :mod:`crispedit.curvature`: W is
(d_out, d_in), A is (d_in, d_in), G is (d_out, d_out), a mask has W's shape, and both spectra are
sorted in descending order. The curvature of the pair (i, j) is λ_ij = β_i α_j, where
A = U_A diag(α) U_Aᵀ and G = U_G diag(β) U_Gᵀ (CrispEdit, arXiv 2602.15823, section 3.3).

What is protected is a *staircase* of pairs: row i has its first ``counts[i]`` pairs high, with counts
that do not increase. Two staircases meet the same energy criterion:

- the pairs with the largest λ, fewest in number (the paper's choice); whether a pair is one of them is
  decided by bisection, without a d_out × d_in table;
- a *cross*, the first r rows and the first c columns. What it leaves unprotected is the product of what
  r and c leave of the two traces, so the top of both spectra is all that need be known.

The projection off a staircase is evaluated in the cheapest of three forms that are equal up to rounding:
eq. 6 of the paper as it stands; a *pivot*, which splits the high pairs at a corner into full rows and
full columns and costs in proportion to those; and, of a cross, a two-sided projection.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from .eigen import Eigenpairs, TopSolver, at_most, full_eigenpairs, refreshed
from .errors import ConfigError, did_you_mean

Form = Literal["equation6", "pivot", "cross"]
SPARE = 16
"""Pairs beyond the cross that an updated spectrum keeps for the next update."""


def check_form(form: str) -> None:
    """Raises :class:`ConfigError` unless ``form`` is a form, or ``auto``."""
    known = (*get_args(Form), "auto")
    if form not in known:
        raise ConfigError(f"form is '{form}'; it must be one of {', '.join(known)}{did_you_mean(form, known)}")


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Leading eigenpairs of both Kronecker factors, in descending order: all of them, or what a cross needs.

    Args:
        alpha: Eigenvalues of A, (k_A,), float64, not negative; k_A ≤ d_in.
        beta: Eigenvalues of G, (k_G,), float64, not negative; k_G ≤ d_out.
        input_basis: Eigenvectors of A, (d_in, k_A), float32, one per column: U_A.
        output_basis: Eigenvectors of G, (d_out, k_G), float32: U_G.
        traces: tr(A) and tr(G).
        residuals: ‖A v − α v‖, (k_A,), and ‖G v − β v‖, (k_G,), float64; see :class:`crispedit.eigen.Eigenpairs`.
        beyond: What the eigenvalues of A and of G that follow are at most, where more is known than the traces say.
    """

    alpha: Tensor
    beta: Tensor
    input_basis: Tensor
    output_basis: Tensor
    traces: tuple[float, float]
    residuals: tuple[Tensor, Tensor]
    beyond: tuple[Tensor | None, Tensor | None] = (None, None)

    @classmethod
    def of(cls, A: Tensor, G: Tensor) -> "Spectrum":
        """Diagonalises both factors whole, in float64.

        Args:
            A: Input second moment, (d_in, d_in).
            G: Output-gradient second moment, (d_out, d_out).

        Returns:
            The spectrum, on the device of ``A``.

        Raises:
            NumericsError: A number is not finite.
        """
        return cls.of_pairs(*(full_eigenpairs(M, name) for M, name in ((A, "A"), (G, "G"))))

    @classmethod
    def for_cross(cls, A: Tensor, G: Tensor, energy: float, *, start: "Spectrum | None" = None) -> "Spectrum":
        """As many leading eigenpairs as it takes to know the smallest cross that meets an energy.

        Args:
            A: Input second moment, (d_in, d_in).
            G: Output-gradient second moment, (d_out, d_out).
            energy: γ in [0, 1).
            start: The spectrum of factors that were nearly the same, from which the search sets out. It saves a tenth
                of the work: at the accuracy of the result, a direction that is a little off must be found anew.

        Returns:
            A spectrum with one pair more than the cross on either side that takes part in it, where there is one.

        Raises:
            ConfigError: ``energy`` is outside [0, 1).
            NumericsError: A number is not finite.
        """
        check_energy(energy)
        bases = (None, None) if start is None else (start.input_basis, start.output_basis)
        inputs, outputs = (TopSolver(M, name, start=basis) for M, name, basis in zip((A, G), "AG", bases, strict=True))
        while True:
            # what is not known is taken for as large as it may be: the true cross is no smaller
            r, c = cross_threshold(inputs.at_most(), outputs.at_most(), energy).cross or (0, 0)
            wanted = [(solver, count) for solver, count in ((outputs, r), (inputs, c)) if not solver.settled(count)]
            if not wanted:
                return cls.of_pairs(inputs.pairs(c + 1), outputs.pairs(r + 1))
            for solver, count in wanted:
                solver.search(count)

    def updated(self, A: Tensor, G: Tensor, energy: float) -> "Spectrum":
        """The spectrum of factors that are nearly those of this one: after some more tokens, say.

        A cross cut from it protects the energy for certain, for its eigenvalues are Rayleigh quotients and the traces
        are exact; its directions are the leading ones to second order only (:func:`crispedit.eigen.refreshed`).

        Args:
            A: Input second moment, (d_in, d_in).
            G: Output-gradient second moment, (d_out, d_out).
            energy: γ in [0, 1) of the cross that will be cut.

        Returns:
            A spectrum that knows its cross; found anew (:meth:`for_cross`) where the factors are others.

        Raises:
            ConfigError: ``energy`` is outside [0, 1).
            NumericsError: A number is not finite.
        """
        check_energy(energy)
        inputs, outputs = refreshed(A, self.input_basis, "A"), refreshed(G, self.output_basis, "G")
        if inputs is not None and outputs is not None:
            found = Spectrum.of_pairs(inputs, outputs)
            if (threshold := found.known_cross(energy)) is not None:
                r, c = threshold.cross or (0, 0)
                return found.leading(c + SPARE, r + SPARE)
        return Spectrum.for_cross(A, G, energy, start=self)

    def leading(self, columns: int, rows: int) -> "Spectrum":
        """The spectrum with so many pairs of A and of G, or what there is."""
        return replace(
            self,
            alpha=self.alpha[:columns],
            beta=self.beta[:rows],
            input_basis=self.input_basis[:, :columns],
            output_basis=self.output_basis[:, :rows],
            residuals=(self.residuals[0][:columns], self.residuals[1][:rows]),
            beyond=(None, None),
        )

    def of_inputs(self) -> "Spectrum":
        """The spectrum of A alone, with G = I: the constraint of Adam-NSCL (arXiv 2103.15526)."""
        d_out = self.shape[0]
        ones = torch.ones(d_out, dtype=self.beta.dtype, device=self.beta.device)
        return replace(
            self,
            beta=ones,
            output_basis=torch.eye(d_out, device=self.output_basis.device),
            traces=(self.traces[0], float(d_out)),
            residuals=(self.residuals[0], torch.zeros_like(ones)),
            beyond=(None, None),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.output_basis), len(self.input_basis)

    @property
    def complete(self) -> bool:
        """Whether all eigenpairs are known."""
        return (len(self.beta), len(self.alpha)) == self.shape

    def at_most(self) -> tuple[Tensor, Tensor]:
        """(d_in,) and (d_out,): both spectra, what is unknown taken for as large as bounds and traces allow."""
        alpha, beta = (
            values if beyond is None else torch.cat([values, beyond])
            for values, beyond in zip((self.alpha, self.beta), self.beyond, strict=True)
        )
        return at_most(alpha, self.traces[0], self.shape[1]), at_most(beta, self.traces[1], self.shape[0])

    def spread_out(self) -> tuple[Tensor, Tensor]:
        """(d_in,) and (d_out,): both spectra, what is unknown spread evenly, so that it pays as little as may be."""
        spectra = []
        for values, trace, n in zip((self.alpha, self.beta), self.traces, self.shape[::-1], strict=True):
            rest, left = n - len(values), max(trace - float(values.sum()), 0.0)
            spectra.append(torch.cat([values, values.new_full((rest,), left / max(rest, 1))]))
        alpha, beta = spectra
        return alpha, beta

    def known_cross(self, energy: float) -> "Threshold | None":
        """The smallest cross with an energy; or one that has it for certain, where a smaller one may be unknown.

        Args:
            energy: γ in [0, 1).

        Returns:
            The threshold, or ``None`` where a cross takes more eigenvectors than are known.

        Raises:
            ConfigError: ``energy`` is outside [0, 1).
        """
        for spectra in (self.at_most(), self.spread_out()):
            if any(float(s.sum()) < (1 - 1e-6) * trace for s, trace in zip(spectra, self.traces, strict=True)):
                continue  # of a sketch, whose values are too small to bound those that follow
            threshold = cross_threshold(*spectra, energy)
            r, c = threshold.cross or (0, 0)
            if r <= len(self.beta) and c <= len(self.alpha):
                return threshold
        return None

    def to(self, device: torch.device) -> "Spectrum":
        """The spectrum with its bases on another device; the eigenvalues stay where they are."""
        return replace(self, input_basis=self.input_basis.to(device), output_basis=self.output_basis.to(device))

    @classmethod
    def of_pairs(cls, inputs: Eigenpairs, outputs: Eigenpairs) -> "Spectrum":
        """The spectrum of eigenpairs of A and of G."""
        return cls(
            alpha=inputs.values,
            beta=outputs.values,
            input_basis=inputs.vectors.float(),
            output_basis=outputs.vectors.float(),
            traces=(inputs.trace, outputs.trace),
            residuals=(inputs.residuals, outputs.residuals),
            beyond=(inputs.beyond, outputs.beyond),
        )


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Where a spectrum is cut.

    Args:
        tau: The k-th largest curvature λ; pairs with λ ≥ tau are high. ``inf`` when k is 0; ``None`` for a cross.
        num_high: How many pairs are high: k, and all pairs tied with the k-th; or those of the cross.
        captured: Share of the total energy tr(A)·tr(G) that the high pairs hold.
        counts: (d_out,) int64; row i has ``counts[i]`` high pairs: its first ones, unless there is a table.
        cross: (r, c) if the staircase is a cross.
        table: (d_out, d_in), the curvatures themselves, where they are not products of eigenvalues.
    """

    tau: float | None
    num_high: int
    captured: float
    counts: Tensor
    cross: tuple[int, int] | None = None
    table: Tensor | None = None


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


def cross_threshold(alpha: Tensor, beta: Tensor, energy: float) -> Threshold:
    """The cross of fewest pairs that holds an energy: the first r rows and the first c columns.

    It leaves unprotected exactly (1 − E_G(r)) (1 − E_A(c)), with E the cumulative shares of the two traces.

    Args:
        alpha: (d_in,) float64, descending, not negative.
        beta: (d_out,) float64, descending, not negative.
        energy: γ in [0, 1). 0 makes no pair high.

    Returns:
        The threshold, its counts d_in in the first r rows and c in the others. r = 0 protects directions of A
        alone (Adam-NSCL, arXiv 2103.15526), c = 0 directions of G alone.

    Raises:
        ConfigError: ``energy`` is outside [0, 1).
    """
    check_energy(energy)
    d_in, d_out = len(alpha), len(beta)
    if energy * float(alpha.sum() * beta.sum()) == 0:
        counts = torch.zeros_like(beta, dtype=torch.int64)
        return Threshold(tau=None, num_high=0, captured=0.0, counts=counts, cross=(0, 0))
    left_of_A, left_of_G = _left(alpha), _left(beta)
    # for every r the fewest columns that leave no more than is allowed; the negated shares ascend
    allowed = torch.where(left_of_G > 0, (1 - energy) / left_of_G, torch.full_like(left_of_G, float("inf")))
    columns = torch.searchsorted(-left_of_A, -allowed, side="left")
    rows = torch.arange(d_out + 1, device=columns.device)
    r = int((rows * d_in + columns * (d_out - rows)).argmin())
    c = int(columns[r])
    counts = torch.full((d_out,), c, device=columns.device)
    counts[:r] = d_in
    captured = 1 - float(left_of_G[r] * left_of_A[c])
    return Threshold(tau=None, num_high=int(counts.sum()), captured=captured, counts=counts, cross=(r, c))


def table_threshold(curvatures: Tensor, energy: float) -> Threshold:
    """Cuts curvatures that are no products at an energy, by sorting: those measured by EK-FAC, say.

    Args:
        curvatures: (d_out, d_in), not negative.
        energy: γ in [0, 1). 0 makes no pair high.

    Returns:
        The threshold, with a table. With equal curvatures at the cut, all of them are high.

    Raises:
        ConfigError: ``energy`` is outside [0, 1).
    """
    check_energy(energy)
    ordered = curvatures.double().flatten().sort(descending=True).values
    sums = ordered.cumsum(0)
    tau, captured = float("inf"), 0.0
    if energy * float(sums[-1]) > 0:
        k = min(int(torch.searchsorted(sums, energy * sums[-1])), len(sums) - 1)
        tau = float(ordered[k])
    counts = (curvatures >= tau).sum(1)
    num_high = int(counts.sum())
    if num_high:
        captured = float(sums[num_high - 1] / sums[-1])
    return Threshold(tau=tau, num_high=num_high, captured=captured, counts=counts, table=curvatures)


def _left(values: Tensor) -> Tensor:
    """(n + 1,): the share of the sum that the first 0, 1, … n values leave; exactly 1 and 0 at the ends."""
    rest = (values / values.sum()).flip(0).cumsum(0).flip(0)  # summed from the small end, where it matters
    return torch.cat([values.new_ones(1), rest[1:], values.new_zeros(1)])


def check_energy(energy: float) -> None:
    """Raises :class:`ConfigError` unless ``energy`` is in [0, 1)."""
    if not 0 <= energy < 1:
        raise ConfigError(f"energy is {energy}; it must be at least 0 (plain fine-tuning) and less than 1")


class _Pivot:
    """The high pairs of a staircase, split at a corner: those in the first r rows, the others in the first c columns.

    Rows and columns are cut into blocks that double in size, each as long as its longest row or column.

    Args:
        counts: (d_out,) of the staircase.
        d_in: Input width.
    """

    def __init__(self, counts: Tensor, d_in: int) -> None:
        self.counts, self.d_in, self.d_out = counts, d_in, len(counts)
        columns = torch.arange(d_in, device=counts.device)
        ascending = counts.flip(0).contiguous()
        self.heights = self.d_out - torch.searchsorted(ascending, columns, side="right")  # rows with counts > j
        r, c = torch.arange(self.d_out + 1, device=counts.device), torch.cat([counts, counts.new_zeros(1)])
        self.full = int((counts == d_in).sum())  # of these rows U_A U_Aᵀ is the identity
        widths = torch.cat([counts.new_zeros(self.full), _blocked(counts[self.full :])])
        heights = _blocked(self.heights)
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
        return int(self.heights[0]), int(self.counts[0])

    def high(self, X: Tensor, U_G: Tensor, U_A: Tensor) -> Tensor:
        """U_G [ (U_Gᵀ X U_A) ⊙ (1 − M) ] U_Aᵀ."""
        r, c, counts = self.rows, self.columns, self.counts
        T = U_G[:, :r].T @ X
        for start, end in _blocks(self.full, r):
            U = U_A[:, : int(counts[start])]
            inside = torch.arange(U.shape[1], device=X.device) < counts[start:end, None].to(X.device)
            T[start:end] = ((T[start:end] @ U) * inside) @ U.T
        found = U_G[:, :r] @ T
        T = X @ U_A[:, :c]
        for start, end in _blocks(0, c):
            U = U_G[:, r : int(self.heights[start])]
            inside = torch.arange(start, end, device=X.device) < counts[r : r + U.shape[1], None].to(X.device)
            T[:, start:end] = U @ ((U.T @ T[:, start:end]) * inside)
        return torch.addmm(found, T, U_A[:, :c].T)


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
    """Blocks of 1, 2, 4, … from ``first``, the last one cut at ``end``."""
    starts = [first + 2**k - 1 for k in range(max(end - first, 0).bit_length())]
    return [(start, min(2 * start + 1 - first, end)) for start in starts if start < end]


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
                cross. ``auto`` is the cheaper of the first two in flops, or ``cross`` where the spectrum has only
                leading pairs.

        Returns:
            The subspace, on the spectrum's device.

        Raises:
            ConfigError: ``energy`` is outside [0, 1), the form is unknown, or the spectrum has too few pairs for it.
        """
        check_form(form)
        if form == "cross" or (form == "auto" and not spectrum.complete):
            threshold = spectrum.known_cross(energy)
            if threshold is None:
                r, c = cross_threshold(*spectrum.spread_out(), energy).cross or (0, 0)
                raise ConfigError(
                    f"a cross at energy {energy} needs at least {r} eigenvectors of G and {c} of A; this spectrum has "
                    f"{len(spectrum.beta)} and {len(spectrum.alpha)}: compute it for this energy"
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
            curvatures: (d_out, d_in), not negative; see :func:`crispedit.curvature.estimate_second_moments`.
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
        return 4 * d_out * d_in * (d_out + d_in if self.form == "equation6" else sum(self._cross))

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
        if self.form == "equation6":
            return self.from_coordinates(self.to_coordinates(X))
        return X - self._high(X, self.spectrum.output_basis, self.spectrum.input_basis)

    def _high(self, X: Tensor, U_G: Tensor, U_A: Tensor) -> Tensor:
        """X − P(X) with bases of ``X``'s dtype."""
        if self.form == "equation6":
            return U_G @ ((U_G.T @ X @ U_A) * (1 - self.mask)) @ U_A.T
        if self.form == "pivot":
            return self._pivot.high(X, U_G, U_A)
        r, c = self._cross
        of_rows = U_G[:, :r] @ (U_G[:, :r].T @ X)
        return torch.addmm(of_rows, (X - of_rows) @ U_A[:, :c], U_A[:, :c].T)

    def share_outside(self, X: Tensor) -> float:
        """‖P(X) − X‖ / ‖X‖ in Frobenius norm, evaluated in float64; 0 for X = 0."""
        double = X.double()
        high = self._high(double, self.spectrum.output_basis.double(), self.spectrum.input_basis.double())
        norm = double.norm()
        return float(high.norm() / norm) if norm > 0 else 0.0
