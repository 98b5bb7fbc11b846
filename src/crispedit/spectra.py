"""Spectra and subspaces of many matrices, each found when it is first asked for.

Eigenproblems are solved where their matrices are; of several processes each solves some, shared out by the cubes of
their widths, and gives them to all. How one is solved is in :mod:`crispedit.spectrum`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from . import distributed, ranks
from .description import leading_spectrum
from .errors import ConfigError, check_choice
from .factors import Factors
from .models import EditMatrix
from .moments import Kind
from .progress import log
from .rule_choice import coordinates_cost_little
from .spectrum import Spectrum
from .subspace import Subspace

CANNOT = (torch.OutOfMemoryError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]  # it is documented
"""What a GPU's solver may fail with where main memory's does not; cuSOLVER's own errors have no class of their own."""

Constraint = Literal["staircase", "cross", "ekfac", "inputs"]
CPU = torch.device("cpu")


class Spectra:
    """The spectra of factors, and the subspaces that are cut by them.

    Args:
        factors: By name of the matrix.
        starts: Spectra of factors that these resemble, by name: searches for leading eigenpairs set out from them.
    """

    def __init__(self, factors: Mapping[str, Factors], starts: Mapping[str, Spectrum] | None = None) -> None:
        self.factors, self.starts = factors, dict(starts or {})
        self.places: dict[str, torch.device] = {}
        """Devices on which eigenproblems are solved, by name, if not where the factors are."""
        self.edited: frozenset[str] = frozenset()
        """What is about to be edited, where that is known; other spectra wait until they are asked for."""
        self.second_moments: Mapping[str, Tensor] = {}
        """By name, where they were measured (:func:`crispedit.estimation.estimate_second_moments`)."""
        self._whole: dict[str, Spectrum] = {}
        self._tops: dict[str, Spectrum] = {}
        self._subspaces: dict[tuple[str, float, Constraint], Subspace] = {}

    def for_factors(self, factors: Mapping[str, Factors], starts: Mapping[str, Spectrum] | None = None) -> "Spectra":
        """The spectra of other factors of the same model, to be found where these are.

        Args:
            factors: By name of the matrix.
            starts: As above.

        Returns:
            The spectra, none of them known.
        """
        others = Spectra(factors, starts)
        others.places, others.edited = dict(self.places), self.edited
        return others

    def known(self) -> dict[str, Spectrum]:
        """The spectra that were found, by name: what searches in similar factors may set out from."""
        return {**self._whole, **self._tops}

    def solve_near(self, matrices: Sequence[EditMatrix]) -> None:
        """Has eigenproblems solved where their matrices are, if that is a GPU: factors from a file are on the CPU.

        Args:
            matrices: Those of a model that is about to be edited.
        """
        devices = {matrix.name: matrix.parameter.device for matrix in matrices}
        self.edited = frozenset(devices)
        self.places |= {name: device for name, device in devices.items() if device.type == "cuda"}

    def whole(self, name: str) -> Spectrum:
        """All eigenpairs of one matrix's factors, diagonalised once.

        Args:
            name: The matrix.

        Returns:
            Its spectrum, complete.

        Raises:
            ConfigError: The factors are sketches.
        """
        if self.factors[name].dense is None:
            raise ConfigError("sketched factors know leading directions only: use constraint cross, or dense factors")
        if name not in self._whole:
            # of several processes, which can share the work, all that are not known
            names = [name] if ranks.count() == 1 else [n for n in self._together(name) if n not in self._whole]
            dense = [n for n in names if self.factors[n].dense is not None]
            self._whole |= self._shared_out({n: partial(self._diagonalised, n) for n in dense})
        return self._whole[name]

    def top(self, name: str, energy: float) -> Spectrum:
        """As much of a spectrum as a cross takes; of a sum, found from that of its largest part.

        Args:
            name: The matrix.
            energy: γ in [0, 1).

        Returns:
            Its leading eigenpairs; of sketches all that they know, whatever the energy.

        Raises:
            ConfigError: ``energy`` is outside [0, 1).
        """
        known = self._tops.get(name)
        if known is None and ranks.count() > 1:  # all of them at once: the work can be shared
            unknown = [n for n in self._together(name) if n not in self._tops]
            self._tops |= self._shared_out({n: partial(self._leading, n, energy) for n in unknown})
        elif known is None or (self.factors[name].dense and not known.known_cross(energy)):
            self._tops[name] = self._leading(name, energy)
        return self._tops[name]

    def subspace(self, name: str, energy: float, constraint: Constraint | Literal["auto"] = "auto") -> Subspace:
        """The low-curvature subspace of one matrix, cut once.

        Args:
            name: The matrix.
            energy: γ in [0, 1).
            constraint: What is left out: see :meth:`crispedit.curvature.Curvature.subspace`.

        Returns:
            The subspace, in the cheapest exact form.

        Raises:
            ConfigError: There is no such constraint, ``energy`` is outside [0, 1), or there are no second moments.
        """
        check_choice("constraint", constraint, ("auto", *get_args(Constraint)))
        if constraint == "auto":
            factors = self.factors[name]
            kind: Kind = "sketch" if factors.dense is None else "dense"
            constraint = default_constraint(kind, (len(factors.G), len(factors.A)))
        key = (name, energy, constraint)
        if key not in self._subspaces:
            self._subspaces[key] = self._subspace(*key)
        return self._subspaces[key]

    def _subspace(self, name: str, energy: float, constraint: Constraint) -> Subspace:
        if constraint == "cross":
            return Subspace.of(self.top(name, energy), energy, "cross")
        spectrum = self.whole(name)
        if constraint == "ekfac":
            if name not in self.second_moments:
                raise ConfigError("constraint ekfac needs second moments: call Curvature.measure_second_moments first")
            return Subspace.of_table(spectrum, self.second_moments[name], energy)
        if constraint == "inputs":
            return Subspace.of(spectrum.of_inputs(), energy)
        return Subspace.of(spectrum, energy)

    def _leading(self, name: str, energy: float) -> Spectrum:
        def solve(factors: Factors, device: torch.device) -> Spectrum:
            known, dense = self._tops.get(name), factors.dense
            if dense is None:
                return known or leading_spectrum(factors)
            if known is not None:
                return Spectrum.for_cross(*dense, energy, start=known.to(device))
            if name in self.starts:
                return self.starts[name].to(device).updated(*dense, energy)
            return Spectrum.for_cross(*dense, energy)

        return self._near(name, solve)

    def _diagonalised(self, name: str) -> Spectrum:
        def solve(factors: Factors, _: torch.device) -> Spectrum:
            assert factors.dense is not None
            return Spectrum.of(*factors.dense)

        return self._near(name, solve)

    def _near(self, name: str, solve: Callable[[Factors, torch.device], Spectrum]) -> Spectrum:
        """A spectrum, found where the matrix is; in main memory where a GPU has no room for that, or no solver.

        Those of CUDA are known to fail at widths of 23,000 and more (CUDALibrarySamples issue 246).

        Raises:
            RuntimeError: Another one.
        """
        device, factors = self._device(name), self.factors[name]
        try:
            return solve(factors.to(device), device)
        except RuntimeError as error:  # out of memory is one too
            if device.type == "cpu" or not (isinstance(error, CANNOT) or "cusolver" in str(error).lower()):
                raise
            why = "no room" if isinstance(error, torch.OutOfMemoryError) else "no way"
            log.info("%s on %s to diagonalise the curvature of %s: it is done in main memory", why, device, name)
        return solve(factors.to(CPU), CPU).to(device)

    def _device(self, name: str) -> torch.device:
        """Where the eigenproblems of a matrix are solved."""
        A = self.factors[name].A
        return self.places.get(name) or (A if isinstance(A, Tensor) else A.product).device

    def _together(self, name: str) -> list[str]:
        """What will be asked for beside a matrix: what is edited, if that is known."""
        return [n for n in self.factors if not self.edited or n == name or n in self.edited]

    def _shared_out(self, problems: Mapping[str, Callable[[], Spectrum]]) -> dict[str, Spectrum]:
        """The spectra of matrices: each found by one process, by the cubes of their widths, and given to all."""
        with ranks.sharing():
            sizes = [(len(self.factors[name].A), len(self.factors[name].G)) for name in problems]
            owners = distributed.owners([A**3 + G**3 for A, G in sizes])
            who = dict(zip(problems, owners, strict=True))
            mine = {name: solve() for name, solve in problems.items() if who[name] == ranks.rank()}
            if ranks.size() == 1:
                return mine
            found = {}
            for name, owner in who.items():
                tensors = distributed.tensors_of(owner, mine[name].tensors() if name in mine else None)
                found[name] = Spectrum.of_tensors(tensors).to(self._device(name))
            return found


def default_constraint(kind: Kind, shape: tuple[int, int]) -> Constraint:
    """What ``auto`` leaves out of a matrix: the staircase where coordinates in the whole eigenbasis cost little.

    Args:
        kind: Of its factors; sketches know no whole eigenbasis.
        shape: (d_out, d_in).

    Returns:
        ``staircase`` or ``cross``.
    """
    return "staircase" if kind == "dense" and coordinates_cost_little(shape) else "cross"
