"""The spectrum of a pair of Kronecker factors: all eigenpairs, or the leading ones that a cross takes. Pure tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .eigen import Eigenpairs, TopSolver, at_most, full_eigenpairs, refreshed
from .threshold import Threshold, check_energy, cross_threshold

SPARE = 16
"""Pairs beyond the cross that an updated spectrum keeps for the next update."""


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
        following: (d_in, j_A) and (d_out, j_G), float32: vectors orthonormal to the bases and to each other that are
            near the eigenvectors that follow, but are not known to be; where a search has left some over.
    """

    alpha: Tensor
    beta: Tensor
    input_basis: Tensor
    output_basis: Tensor
    traces: tuple[float, float]
    residuals: tuple[Tensor, Tensor]
    beyond: tuple[Tensor | None, Tensor | None] = (None, None)
    following: tuple[Tensor | None, Tensor | None] = (None, None)

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
                found = cls.of_pairs(inputs.pairs(c + 1), outputs.pairs(r + 1))
                following = (inputs.following(len(found.alpha)).float(), outputs.following(len(found.beta)).float())
                return replace(found, following=following)
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
        start, cut = self, self.known_cross(energy)
        if cut is not None:  # no more than it takes: a whole basis would be diagonalised whole
            r, c = cut.cross or (0, 0)
            start = self.leading(c + SPARE, r + SPARE)
        inputs, outputs = refreshed(A, start.input_basis, "A"), refreshed(G, start.output_basis, "G")
        if inputs is not None and outputs is not None:
            found = Spectrum.of_pairs(inputs, outputs)
            if (threshold := found.known_cross(energy)) is not None:
                r, c = threshold.cross or (0, 0)
                return found.leading(c + SPARE, r + SPARE)
        return Spectrum.for_cross(A, G, energy, start=start)

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
            following=(None, None),
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
            following=(self.following[0], None),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, as tensors by name: what one process gives to another."""
        named = {
            "alpha": self.alpha,
            "beta": self.beta,
            "input_basis": self.input_basis,
            "output_basis": self.output_basis,
            "traces": torch.tensor(self.traces, dtype=torch.float64),
        }
        pairs = {"residuals": self.residuals, "beyond": self.beyond, "following": self.following}
        of_sides = {f"{name}/{side}": t for name, pair in pairs.items() for side, t in zip("AG", pair, strict=True)}
        return named | {name: t for name, t in of_sides.items() if t is not None}

    @classmethod
    def of_tensors(cls, given: Mapping[str, Tensor]) -> "Spectrum":
        """What :meth:`tensors` made tensors of."""
        return cls(
            **{name: given[name] for name in ("alpha", "beta", "input_basis", "output_basis")},
            traces=(float(given["traces"][0]), float(given["traces"][1])),
            residuals=(given["residuals/A"], given["residuals/G"]),
            beyond=(given.get("beyond/A"), given.get("beyond/G")),
            following=(given.get("following/A"), given.get("following/G")),
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

    def known_cross(self, energy: float) -> Threshold | None:
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
        inputs, outputs = (None if vectors is None else vectors.to(device) for vectors in self.following)
        return replace(
            self,
            input_basis=self.input_basis.to(device),
            output_basis=self.output_basis.to(device),
            following=(inputs, outputs),
        )

    @property
    def num_vectors(self) -> tuple[int, int]:
        """How many :meth:`leading_vectors` of A and of G there are."""
        j_A, j_G = (0 if following is None else following.shape[1] for following in self.following)
        return len(self.alpha) + j_A, len(self.beta) + j_G

    def leading_vectors(self) -> tuple[Tensor, Tensor]:
        """(d_in, k) and (d_out, k'): all vectors there are, the eigenvectors first; orthonormal columns."""
        inputs, outputs = (
            basis if following is None else torch.cat([basis, following], 1)
            for basis, following in zip((self.input_basis, self.output_basis), self.following, strict=True)
        )
        return inputs, outputs

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
