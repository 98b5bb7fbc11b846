"""The picture of the comparison: what must stay against what is learned, a curve per constraint with a band over seeds.

Left the whole range, right its upper corner, where constraints differ. Curves join the means over seeds of both
accuracies, γ by γ; bands are the range of seeds of the envelope between them. Constraints differ in colour and in
marker. matplotlib is an optional extra: only what draws imports it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plot import INK, check_plot, save_figure
from ..scatter import COLOURS, FRONT, MARKERS
from .area import Point, envelope, height
from .summary import PLAIN, points_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACTIVATION = {"relu": "ReLU", "tanh": "tanh"}
STEPS = 200
"""Places along a curve at which seeds are compared."""
KEPT_WITHIN = 0.045
"""The right panel shows what loses no more capability accuracy than this."""


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
    title = (
        f"What is learned and what is kept: {names[0]} to {names[1]}, LeNet-5 with {ACTIVATION[settings['activation']]}"
    )
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
    low, high = result["range"]
    for panel, box in enumerate(boxes):
        axes = figure.add_axes(box)
        for name, (points, of_seeds) in curves.items():
            of_name = result["constraints"][name]
            _draw(axes, points, of_seeds, _style(name, list(curves)), f"{of_name['title']}: {of_name['auc']:.4f}")
        _finish(axes, names)
        if panel:
            axes.set_ylim(most - KEPT_WITHIN, most + KEPT_WITHIN / 30)
            axes.set_xlim((low + high) / 2, high + (high - low) / 30)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: -float(labels[i].rsplit(" ", 1)[1]))
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order],
        loc="upper left", bbox_to_anchor=(0.79, 0.87), frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def _curves(result: Mapping[str, Any]) -> dict[str, tuple[list[Point], list[list[Point]]]]:
    """Per constraint: the means over seeds of its points, and the envelope of every seed."""
    pieces = {name: one["seeds"] for name, one in result["constraints"].items()}
    found = {}
    for name, seeds in pieces.items():
        pairs = zip(*(zip(one["edit"], one["capability"], strict=True) for one in seeds), strict=True)
        means = [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in pairs]
        found[name] = (means, [envelope(one) for one in points_of(result["networks"], pieces, name)])
    return found


def _style(name: str, names: Sequence[str]) -> dict[str, Any]:
    """How a constraint is drawn: none at all in grey, the others in the palette's colours, then these again, dashed."""
    if name == PLAIN:
        return {"color": FRONT, "marker": "o"}
    number = [other for other in names if other != PLAIN].index(name)
    style: dict[str, Any] = {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[1:][number % (len(MARKERS) - 1)],
        "linestyle": (0, (4, 2)) if number >= len(COLOURS) else "-",
    }
    # the Hessian's curve lies under the GNH's where both are the same: it is seen beside it
    return style | {"linewidth": 6, "alpha": 0.3, "markersize": 9} if name == "hessian" else style


def _draw(
    axes: "Axes", points: Sequence[Point], of_seeds: Sequence[Sequence[Point]], style: Mapping[str, Any], label: str
) -> None:
    low, high = max(curve[0][0] for curve in of_seeds), min(curve[-1][0] for curve in of_seeds)
    xs = [low + (high - low) * step / STEPS for step in range(STEPS + 1)]
    heights = [[height(curve, x) for curve in of_seeds] for x in xs]
    ends = [min(h) for h in heights], [max(h) for h in heights]
    axes.fill_between(xs, *ends, color=style["color"], alpha=0.08, linewidth=0)
    line: dict[str, Any] = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.5, "linewidth": 1.4}
    axes.plot(*zip(*points, strict=True), label=label, **(line | dict(style)))


def _finish(axes: "Axes", names: tuple[str, str]) -> None:
    axes.set_xlabel(f"{names[1]} accuracy (learned)")
    axes.set_ylabel(f"{names[0]} accuracy (kept)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
