"""A curvature in a few numbers: how spread it is, what a cross takes to hold it, and whether the texts were enough.

The last is asked by halves: a cross cut from one half of the texts is compared with that of the other half, and with
the other half's curvature.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .eigen import approximate_pairs
from .errors import ConfigError
from .factors import Factors
from .moments import Moment, Sketch, captured, sketch_rank, trace
from .spectrum import Spectrum
from .subspace import Subspace, cross_overlap

ENERGY = 0.9
"""γ at which a curvature is described; the default of an edit."""
DESCRIBED_WHOLE = 1024
"""Factors wider than this are described by some leading pairs: no diagonalisation takes minutes unasked."""
RANK, TAKEN = 256, 0.75
"""So many at first; twice as many as long as crosses take more than this share of them."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """One matrix's curvature in a few numbers.

    Args:
        traces: tr(A) and tr(G).
        effective_rank: tr(M)² / ‖M‖²_F of A and of G: how many equal directions would be as spread.
        energy: γ of the cross below: the one asked for, or less where a sketch does not hold so much.
        cross: Its rows and columns, (r, c).
        share: Of all directions, in the cross.
        overlap: Of the crosses that two halves of the texts give: tr(Q Q') / √(tr Q · tr Q'), 1 if they are the
            same, ``share`` if they have nothing to do with each other. ``None`` without halves.
        transfer: Share of one half's curvature that the other half's cross holds; γ if the texts are enough.
    """

    traces: tuple[float, float]
    effective_rank: tuple[float, float]
    energy: float
    cross: tuple[int, int]
    share: float
    overlap: float | None
    transfer: float | None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Description":
        """What a manifest says of a matrix; JSON knows no tuples.

        Raises:
            KeyError: Something is missing.
        """
        known: dict[str, Any] = {f.name: values[f.name] for f in fields(cls)}
        return cls(**known | {name: tuple(value) for name, value in known.items() if isinstance(value, list)})


def leading_spectrum(factors: Factors) -> Spectrum:
    """The leading pairs of factors by sketches: of them, or of what they are sketches of."""
    sketches = [moment if isinstance(moment, Sketch) else Sketch.of(moment) for moment in (factors.A, factors.G)]
    return Spectrum.of_pairs(sketches[0].eigenpairs, sketches[1].eigenpairs)


def describe(factors: Factors, halves: Sequence[Factors] = (), energy: float = ENERGY) -> Description:
    """One matrix's curvature in a few numbers, in seconds at any width.

    Factors up to :data:`DESCRIBED_WHOLE` are diagonalised; of wider ones about as many leading pairs are found as
    crosses take (:func:`crispedit.eigen.approximate_pairs`). Where factors are sketches themselves the effective ranks
    come out too large, the share of the cross too, and the transfer too small.

    Args:
        factors: Of the matrix.
        halves: Factors of two halves of the texts, to be compared.
        energy: γ of the crosses; a tenth or more less where a sketch does not hold so much.

    Returns:
        The description.
    """
    energy, crosses = _crosses((factors, *halves), energy)
    overlap = transfer = None
    if len(halves) == 2:
        overlap = cross_overlap(crosses[1], crosses[2])
        transfer = (held(crosses[1], halves[1]) + held(crosses[2], halves[0])) / 2
    return Description(
        traces=crosses[0].spectrum.traces,
        effective_rank=(effective_rank(factors.A), effective_rank(factors.G)),
        energy=energy,
        cross=crosses[0].threshold.cross or (0, 0),
        share=crosses[0].threshold.num_high / math.prod(crosses[0].shape),
        overlap=overlap,
        transfer=transfer,
    )


def known_spectrum(factors: Factors) -> Spectrum:
    """All of a spectrum where that is cheap, else what sketches know of it."""
    if factors.dense and max(map(len, factors.dense)) <= DESCRIBED_WHOLE:
        return Spectrum.of(*factors.dense)
    return leading_spectrum(factors)


def effective_rank(moment: Moment) -> float:
    """tr(M)² / ‖M‖²_F, at most n; of a sketch, of what it knows."""
    norm = moment.norm() if isinstance(moment, Tensor) else moment.eigenpairs.values.norm()
    return min(trace(moment) ** 2 / max(float(norm) ** 2, 1e-300), len(moment))


def _crosses(every: Sequence[Factors], energy: float) -> tuple[float, list[Subspace]]:
    """The crosses of factors at an energy, or at a tenth, two tenths, … less, where all spectra know theirs."""
    size = max(len(every[0].A), len(every[0].G))
    if size <= DESCRIBED_WHOLE or not all(factors.dense for factors in every):
        return _cut([known_spectrum(factors) for factors in every], energy)
    rank = RANK
    while True:
        spectra = [Spectrum.of_pairs(*(approximate_pairs(M, rank) for M in factors.dense or ())) for factors in every]
        found, crosses = _cut(spectra, energy)
        taken = max(max(cross.threshold.cross or (0, 0)) for cross in crosses)
        if (found == energy and taken <= TAKEN * rank) or rank >= sketch_rank(size):
            return found, crosses
        rank *= 2


def _cut(spectra: Sequence[Spectrum], energy: float) -> tuple[float, list[Subspace]]:
    while energy > 0:
        try:
            return energy, [Subspace.of(spectrum, energy, "cross") for spectrum in spectra]
        except ConfigError:
            energy = round(energy - 0.1, 1)
    return 0.0, [Subspace.of(spectrum, 0.0, "cross") for spectrum in spectra]


def held(cross: Subspace, factors: Factors) -> float:
    """The share of the curvature of ``factors`` that a cross of other factors holds."""
    r, c = cross.threshold.cross or (0, 0)
    sides = ((factors.G, cross.spectrum.output_basis[:, :r]), (factors.A, cross.spectrum.input_basis[:, :c]))
    return 1 - math.prod(1 - captured(moment, U) / max(trace(moment), 1e-300) for moment, U in sides)
