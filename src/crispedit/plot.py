"""A picture of a curvature: per matrix its spectra, which pairs an energy protects, and what they hold.

Three panels per matrix. The two spectra, as shares of their traces, so that the product of two values is the
pair's share of all curvature. The plane of pairs (i, j), cut by the staircase β_i α_j = τ. And the share of
curvature against the share of directions that it takes to hold it. See :mod:`crispedit.threshold` for the terms.

The numbers (:class:`Points`) are computed apart from the drawing. matplotlib is the optional extra ``plot``: it is
imported only by what draws.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .artifacts import check_writable
from .curvature import Curvature
from .description import known_spectrum
from .errors import ArtifactError, ConfigError
from .spectrum import Spectrum
from .threshold import Threshold, check_energy, energy_threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = tuple[list[float], list[float]]
"""x and y."""

SUFFIXES = (".png", ".svg", ".pdf")
NEAR_ZERO = 1e-10
"""Share of a trace below which eigenvalues of float32 factors are rounding: the panel ends there."""

# inches; a fixed layout, so that headings never change the width of the panels below them
HEAD, ROW, LEFT, GAP, PANEL = 0.7, 3.7, 0.8, 0.9, (3.4, 2.45)

# of Okabe and Ito's palette, which colour-blind people can tell apart
INPUTS, OUTPUTS, PROTECTED, CROSS, INK = "#0072B2", "#D55E00", "#009E73", "#8C8C8C", "#333333"
DASHED: dict[str, Any] = {"color": CROSS, "linewidth": 1.2, "linestyle": (0, (4, 2))}


@dataclass(frozen=True, kw_only=True)
class Points:
    """What is drawn of one matrix; indices count from 1.

    Args:
        shape: (d_out, d_in).
        energy: γ.
        inputs: (index j, α_j / tr(A)) of the eigenvalues of A that are known and not 0.
        outputs: (index i, β_i / tr(G)).
        staircase: The cut through the pairs of largest curvature; ``None`` if only leading eigenpairs are known.
        cross: The cross of fewest pairs that holds γ; ``None`` if it reaches beyond the known eigenpairs.
        held: (share of directions, share of curvature) of the k largest pairs, for increasing k; empty if only
            leading eigenpairs are known.
        held_by_crosses: The same of crosses, as far as the eigenpairs are known.
    """

    shape: tuple[int, int]
    energy: float
    inputs: Line
    outputs: Line
    staircase: Threshold | None
    cross: Threshold | None
    held: Line
    held_by_crosses: Line

    @classmethod
    def of(cls, spectrum: Spectrum, energy: float) -> "Points":
        """Computes the points without ever forming the d_out × d_in products.

        Args:
            spectrum: Of one matrix; all eigenpairs, or leading ones.
            energy: γ in [0, 1).

        Returns:
            The points.

        Raises:
            ConfigError: ``energy`` is outside [0, 1).
        """
        check_energy(energy)
        alpha, beta = spectrum.alpha.cpu(), spectrum.beta.cpu()

        def staircase(energy: float) -> Threshold | None:
            return energy_threshold(alpha, beta, energy) if spectrum.complete else None

        inputs, outputs = _shares(alpha, spectrum.traces[0]), _shares(beta, spectrum.traces[1])
        largest = inputs[1][0] * outputs[1][0] if inputs[1] and outputs[1] else 0.0
        return cls(
            shape=spectrum.shape,
            energy=energy,
            inputs=inputs,
            outputs=outputs,
            staircase=staircase(energy),
            cross=spectrum.known_cross(energy),
            held=_held(staircase, spectrum.shape, largest) if largest else ([], []),
            held_by_crosses=_held(spectrum.known_cross, spectrum.shape, largest) if largest else ([], []),
        )


def _shares(values: Tensor, trace: float) -> Line:
    """Index and share of the trace of every value (n,) that is not 0: a log axis has no place for zeros."""
    positive = values[values > 0]
    return list(range(1, len(positive) + 1)), (positive / trace).tolist()


def _held(cut: Callable[[float], Threshold | None], shape: tuple[int, int], largest: float) -> Line:
    """Share of directions and share of curvature at some 60 energies, evenly spaced in log-odds.

    Args:
        cut: The threshold at an energy, or ``None`` where too little is known for it.
        shape: (d_out, d_in).
        largest: The share of curvature that the largest pair holds: what a single direction can.

    Returns:
        The points, from the fewest directions to those that hold 99.99 %.
    """
    last = 1 - 1e-4
    first = min(largest * (1 - 1e-9), last)  # a little less, or rounding may ask for a second pair
    energies = torch.tensor([first, last], dtype=torch.float64).logit()
    steps = torch.linspace(float(energies[0]), float(energies[1]), 60, dtype=torch.float64).sigmoid()
    cuts = [threshold for threshold in map(cut, steps.tolist()) if threshold is not None]
    held = {threshold.num_high: threshold.captured for threshold in cuts}
    return [k / (shape[0] * shape[1]) for k in held], list(held.values())


def boundary(counts: Tensor) -> Line:
    """The edge of a staircase in the plane of pairs, where pair (i, j) is the unit square around (j, i).

    Args:
        counts: (d_out,), how many pairs of every row are high; not increasing.

    Returns:
        The corners (x, y) from the lower edge at y = ½ to the last row that has a high pair; none without high pairs.
    """
    widths, lengths = torch.unique_consecutive(counts, return_counts=True)
    x, y = [], [0.5]
    for width, end in zip(widths.tolist(), lengths.cumsum(0).tolist(), strict=True):
        if width:
            x += [width + 0.5, width + 0.5]
            y += [end + 0.5, end + 0.5]
    # a step out to the left edge, unless the last row of all is reached and the edge is that of the plane
    return ([*x, 0.5], y) if x else ([], [])


def check_plot(path: Path) -> None:
    """Refuses a picture that cannot be drawn or written, before any work is done.

    Args:
        path: The file.

    Raises:
        ConfigError: It has another suffix than .png, .svg or .pdf, is a directory, or matplotlib is not installed.
        ArtifactError: Its directory cannot be written to.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"cannot draw '{path}'; its name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if path.is_dir():
        raise ConfigError(f"--plot '{path}' is a directory; name a file")
    check_writable(path.parent, overwrite=True)
    try:
        import_module("matplotlib")
    except ImportError:
        raise ConfigError("drawing needs matplotlib; install it with pip install 'crispedit[plot]'") from None


def draw_curvature(curvature: Curvature, energy: float, path: Path) -> None:
    """Draws a curvature to a file, whole or not at all.

    Args:
        curvature: Factors that are wide, or sketches, are drawn as far as their leading eigenpairs go.
        energy: γ in [0, 1), marked in every panel.
        path: A .png, .svg or .pdf file; its directory is created.

    Raises:
        ConfigError: ``energy`` is outside [0, 1), or the file cannot be drawn (:func:`check_plot`).
        ArtifactError: The file cannot be written.
    """
    check_plot(path)
    save_figure(figure_of(curvature, energy), path)


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a picture, whole or not at all.

    Args:
        figure: The picture.
        path: A .png, .svg or .pdf file; its directory is created.

    Raises:
        ArtifactError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format=path.suffix[1:].lower())
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write '{path}': {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def figure_of(curvature: Curvature, energy: float) -> "Figure":
    """The picture: one row of three panels per matrix.

    Args:
        curvature: Factors that are wide, or sketches, are drawn as far as their leading eigenpairs go.
        energy: γ in [0, 1).

    Returns:
        A figure that no window system and no global state knows of.

    Raises:
        ConfigError: ``energy`` is outside [0, 1).
    """
    from matplotlib.figure import Figure

    count = len(curvature.factors)
    width, height = 13, HEAD + ROW * count
    figure = Figure(figsize=(width, height), dpi=min(150, 60_000 / height))  # no side of a picture has 2^16 pixels
    name = curvature.model_name if len(curvature.model_name) <= 70 else f"…{curvature.model_name[-69:]}"
    text: dict[str, Any] = {"color": INK, "va": "top", "parse_math": False}  # a path may contain dollar signs
    title = f"Curvature of {name}, {curvature.fisher} Fisher: what γ = {energy:g} protects"
    figure.text(LEFT / width, 1 - 0.22 / height, title, fontsize=14, fontweight="bold", **text)
    for number, (name, factors) in enumerate(curvature.factors.items()):
        points = Points.of(known_spectrum(factors), energy)
        d_out, d_in = points.shape
        top = height - HEAD - ROW * number
        title = f"{name}      {d_out:,} outputs × {d_in:,} inputs      {factors.num_tokens:,} tokens"
        figure.text(LEFT / width, top / height, title, fontsize=11, **text)
        for column, draw in enumerate((_draw_spectra, _draw_pairs, _draw_held)):
            left, bottom = LEFT + column * (PANEL[0] + GAP), top - 0.55 - PANEL[1]
            box = (left / width, bottom / height, PANEL[0] / width, PANEL[1] / height)
            draw(figure.add_axes(box), points)
    return figure


def _draw_spectra(axes: "Axes", points: Points) -> None:
    """Both spectra; dots where a spectrum takes part in a protected pair for the last time."""
    last_input = last_output = 0
    said = ""
    if points.staircase is not None:
        counts = points.staircase.counts
        last_input, last_output, said = int(counts[0]), int((counts > 0).sum()), "all free beyond"
    elif points.cross is not None:
        (last_output, last_input), said = points.cross.cross or (0, 0), "edge of cross"
    for line, last, colour, name in (
        (points.inputs, last_input, INPUTS, "$\\alpha_j$, inputs"),
        (points.outputs, last_output, OUTPUTS, "$\\beta_i$, outputs"),
    ):
        axes.plot(*line, color=colour, label=name, **_style(line))
        if last:
            axes.plot(last, line[1][last - 1], "o", color=colour, markersize=6, clip_on=False, zorder=3)
    if last_input or last_output:
        axes.plot([], [], "o", color=INK, markersize=6, label=said)
    _log(axes, "x", 0.5, max(points.shape) + 0.5)
    axes.set_yscale("log")
    shares = points.inputs[1] + points.outputs[1]
    if not shares:
        _say(axes, "all eigenvalues are 0")
    axes.set_ylim(max(min(shares, default=NEAR_ZERO), NEAR_ZERO) / 2, 2 * max(shares, default=0.5))
    axes.set_xlabel("index of the eigenvalue")
    axes.set_ylabel("eigenvalue, share of the trace")
    _finish(axes)


def _draw_pairs(axes: "Axes", points: Points) -> None:
    """The plane of pairs: the staircase filled, the cross as a lighter line."""
    d_out, d_in = points.shape
    size = d_out * d_in
    _log(axes, "x", 0.5, d_in + 0.5)
    _log(axes, "y", 0.5, d_out + 0.5)
    if points.staircase is not None and points.staircase.num_high:
        x, y = boundary(points.staircase.counts)
        axes.fill([0.5, *x], [0.5, *y], color=PROTECTED, alpha=0.2, linewidth=0)
        share = _percent(points.staircase.num_high / size)
        axes.plot(x, y, color=PROTECTED, linewidth=1.8, label=f"protected, $\\beta_i\\alpha_j\\geq\\tau$: {share}")
    if points.cross is not None and points.cross.cross and points.cross.num_high:
        r, c = points.cross.cross
        share = _percent(points.cross.num_high / size)
        corners = [(d_in + 0.5, r + 0.5), (c + 0.5, r + 0.5), (c + 0.5, d_out + 0.5)]
        if points.staircase is None:  # then the cross is what is protected
            outline = [(0.5, 0.5), (d_in + 0.5, 0.5), *corners, (0.5, d_out + 0.5)]
            axes.fill(*zip(*outline, strict=True), color=CROSS, alpha=0.2, linewidth=0)
        corners = corners[:2] if c == 0 else corners[1:] if r == 0 else corners  # no line along an axis
        axes.plot(*zip(*corners, strict=True), label=f"cross: {share}", **DASHED)
    if points.energy == 0:
        _say(axes, "γ = 0: nothing is protected")
    elif points.staircase is None:
        what = "no staircase" if points.cross is not None else "neither staircase nor cross"
        _say(axes, f"only leading\neigenpairs are known:\n{what}", inside=points.cross is not None)
    axes.set_xlabel("input direction j", color=INPUTS)
    axes.set_ylabel("output direction i", color=OUTPUTS)
    _finish(axes)


def _draw_held(axes: "Axes", points: Points) -> None:
    """Curvature held against directions taken, in per cent; γ as a line, what it takes as a dot."""
    for line, style, name in (
        (points.held, {"color": PROTECTED, **_style(points.held)}, "largest pairs"),
        (points.held_by_crosses, DASHED, "crosses"),
    ):
        if line[0]:
            axes.plot([100 * x for x in line[0]], [100 * y for y in line[1]], label=name, **style)
    size = points.shape[0] * points.shape[1]
    axes.axhline(100 * points.energy, color=INK, linewidth=0.8, linestyle=":", label=f"γ = {points.energy:g}")
    for threshold, colour, marker in ((points.cross, CROSS, 4.5), (points.staircase, PROTECTED, 6)):
        if threshold is not None and threshold.num_high:
            x, y = 100 * threshold.num_high / size, 100 * threshold.captured
            axes.plot(x, y, "o", color=colour, markersize=marker, zorder=3)
    _log(axes, "x", 100 / size / 1.5, 150)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("share of all directions, %")
    axes.set_ylabel("share of all curvature, %")
    _finish(axes)


def _style(line: Line) -> dict[str, Any]:
    """A thin line; of few points, the points too: a line through one point would not be seen."""
    return {"linewidth": 1.8, "marker": "." if len(line[0]) <= 12 else ""}


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _log(axes: "Axes", which: str, low: float, high: float) -> None:
    """A log axis, "x" or "y", with every power of ten written out."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis.set_major_locator(LogLocator(numticks=20))
    # long decimals would run into each other: a large matrix has pairs that are a hundred-thousandth of a per cent
    axis.set_major_formatter(lambda value, _: f"{value:,g}" if value > 5e-4 else f"$10^{{{math.log10(value):.0f}}}$")
    axis.set_minor_formatter(NullFormatter())


def _say(axes: "Axes", message: str, *, inside: bool = False) -> None:
    """A remark in the upper right, where the plane of pairs is free; or inside, in the lower left of a cross."""
    x, y, ha, va = (0.04, 0.06, "left", "bottom") if inside else (0.96, 0.95, "right", "top")
    axes.text(x, y, message, transform=axes.transAxes, ha=ha, va=va, fontsize=9, color=INK)


def _finish(axes: "Axes") -> None:
    """No frame, a faint grid; the legend is the panel's heading, so that it never covers what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=3,
            frameon=False,
            fontsize=9,
            handlelength=1.4,
            columnspacing=1.2,
            borderaxespad=0.2,
            borderpad=0.2,
        )
