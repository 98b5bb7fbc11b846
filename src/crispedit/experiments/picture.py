"""The picture of the comparison: what must stay against what is learned, a curve per constraint with a band over seeds.

Left the whole range, right its upper end, where constraints differ. Curves join the means over seeds of both
accuracies, γ by γ; bands are the range of seeds of the envelope between them. Constraints differ in colour and in
marker. matplotlib is an optional extra: only what draws imports it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plot import INK, check_plot, save_figure
from ..scatter import COLOURS, MARKERS
from .area import envelope, height
from .summary import points_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS = 200
"""Places along a curve at which seeds are compared."""
KEPT_ABOVE = 0.9
"""The right panel begins at this capability accuracy, as a share of what it was."""


def draw_second_order(result: Mapping[str, Any], path: Path) -> None:
    """Draws a result to a file, whole or not at all.

    Args:
        result: As :func:`crispedit.experiments.summary.summarise` returns it.
        path: A .png, .svg or .pdf file.

    Raises:
        ConfigError: It cannot be drawn (:func:`crispedit.plot.check_plot`).
        ArtifactError: The file cannot be written.
    """
    check_plot(path)
    save_figure(figure_of(result), path)


def figure_of(result: Mapping[str, Any]) -> "Figure":
    """The picture, which no window system and no global state knows of; ``result`` as :func:`draw_second_order`'s."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 5.6), dpi=150)
    text: dict[str, Any] = {"color": INK, "va": "top"}
    settings, networks = result["settings"], result["networks"]
    names = ("digits 0–4", "digits 5–9") if settings["data"] == "digits" else ("MNIST", "Fashion-MNIST")
    title = f"What is learned and what is kept: {names[0]} to {names[1]}, LeNet-5 with {settings['activation']}"
    title += f", {settings['matrix']} edited"
    figure.text(0.055, 0.965, title, fontsize=14, fontweight="bold", **text)
    under = (
        f"Points: γ from 0.2 (right) to 1 (left), of 'no constraint' the learning rate; means of {len(networks)} seeds."
        " Bands: from the least to the greatest of them. Legend: area under the curve."
    )
    figure.text(0.055, 0.91, under, fontsize=9, **text)
    curves = _curves(result)
    boxes = ((0.055, 0.11, 0.335, 0.74), (0.445, 0.11, 0.335, 0.74))
    most = max(height(curve, x) for _, of_seeds in curves.values() for curve, x in ((c, c[0][0]) for c in of_seeds))
    for panel, box in enumerate(boxes):
        axes = figure.add_axes(box)
        for number, (name, (points, of_seeds)) in enumerate(curves.items()):
            _draw(
                axes,
                points,
                of_seeds,
                number,
                f"{result['constraints'][name]['title']}: {result['constraints'][name]['auc']:.4f}",
            )
        _finish(axes, names)
        if panel:
            bottom = KEPT_ABOVE * most
            inside = [x for points, _ in curves.values() for x, y in points if y >= bottom]
            axes.set_ylim(bottom, most + (most - bottom) / 30)
            axes.set_xlim(min(inside) - 0.01, max(inside) + 0.03)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: -float(labels[i].rsplit(" ", 1)[1]))
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order],
        loc="upper left", bbox_to_anchor=(0.79, 0.87), frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def _curves(result: Mapping[str, Any]) -> dict[str, tuple[list[tuple[float, float]], list[list[tuple[float, float]]]]]:
    """Per constraint: the means over seeds of its points, and the envelope of every seed."""
    pieces = {name: one["seeds"] for name, one in result["constraints"].items()}
    found = {}
    for name, seeds in pieces.items():
        pairs = zip(*(zip(one["edit"], one["capability"], strict=True) for one in seeds), strict=True)
        means = [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in pairs]
        found[name] = (means, [envelope(one) for one in points_of(result["networks"], pieces, name)])
    return found


def _draw(
    axes: "Axes", points: Sequence[tuple[float, float]], of_seeds: Sequence[Any], number: int, label: str
) -> None:
    colour = COLOURS[number % len(COLOURS)]
    marker = MARKERS[number % len(MARKERS)]
    dashed = (0, (4, 2)) if number >= len(COLOURS) else "-"  # a colour that comes again is told by its line as well
    low, high = max(curve[0][0] for curve in of_seeds), min(curve[-1][0] for curve in of_seeds)
    xs = [low + (high - low) * step / STEPS for step in range(STEPS + 1)]
    heights = [[height(curve, x) for curve in of_seeds] for x in xs]
    axes.fill_between(xs, [min(h) for h in heights], [max(h) for h in heights], color=colour, alpha=0.13, linewidth=0)
    axes.plot(
        *zip(*points, strict=True), color=colour, marker=marker, markersize=5, markeredgecolor="white",
        markeredgewidth=0.5, linewidth=1.4, linestyle=dashed, label=label,
    )  # fmt: skip


def _finish(axes: "Axes", names: tuple[str, str]) -> None:
    axes.set_xlabel(f"{names[1]} accuracy (learned)")
    axes.set_ylabel(f"{names[0]} accuracy (kept)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
