"""A picture of a comparison: edit success against what is kept, a point per row.

A panel per measure of what is kept. Editors differ in colour and in marker, points of one editor with other settings
are joined, the Pareto front is a line with ringed points, and bars are the 95 % intervals of the paired differences to
the base model, drawn where the row is. matplotlib is the optional extra ``plot``: only what draws imports it.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plot import INK, check_plot, save_figure
from .tradeoff import BASE, LOWER_IS_BETTER, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind people can tell apart, without its yellow (too light on white)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
MARKERS = ("o", "s", "^", "D", "v", "p", "<", ">", "h")
FRONT = "#8C8C8C"
TITLES = {
    "abilities": "capability kept: mean of the tasks, %",
    "drift": "drift on held-out texts, nats/token (less is better)",
}
RINGS, ANGLES = 10, 16
"""Places for a label: as many heights off its point at most, in as many directions."""


def draw_comparison(found: Comparison, path: Path) -> None:
    """Draws a comparison to a file, whole or not at all.

    Args:
        found: With a measure of what is kept.
        path: A .png, .svg or .pdf file.

    Raises:
        ArtifactError: The file cannot be written.
    """
    check_plot(path)
    save_figure(figure_of(found), path)


def figure_of(found: Comparison) -> "Figure":
    """The picture.

    Args:
        found: With a measure of what is kept.

    Returns:
        A figure that no window system and no global state knows of.
    """
    from matplotlib.figure import Figure

    editors = list(dict.fromkeys(row.editor for row in found.rows[1:] if row.done))
    panels = len(found.kept)
    longest = max(map(len, ["base model: 100.0", *editors]))
    width, height = 6.2 * panels + 0.65 + 0.08 * longest, 5.6
    figure = Figure(figsize=(width, height), dpi=150)
    text: dict[str, Any] = {"color": INK, "va": "top", "parse_math": False}
    shared = found.shared
    model = shared["model"] if len(shared["model"]) <= 60 else f"…{shared['model'][-59:]}"
    title = f"What each editor gains and costs: {model}, {shared['edits']['count']} edits"
    figure.text(0.85 / width, 1 - 0.2 / height, title, fontsize=14, fontweight="bold", **text)
    under = "Bars: 95 % intervals of the paired differences to the base model. Grey line and rings: the Pareto front."
    figure.text(0.85 / width, 1 - 0.52 / height, under, fontsize=9, **text)
    for number, name in enumerate(found.kept):
        box = ((0.85 + 6.2 * number) / width, 0.62 / height, 5.3 / width, (height - 1.5) / height)
        _draw_panel(figure, figure.add_axes(box), found, name, editors)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=((6.2 * panels + 0.05) / width, 1 - 0.82 / height),
        frameon=False,
        fontsize=9,
    )
    return figure


def _draw_panel(figure: "Figure", axes: "Axes", found: Comparison, name: str, editors: Sequence[str]) -> None:
    """One measure of what is kept."""
    points = {
        index: (float(x), float(y))
        for index, (x, y) in enumerate(zip(found.values["success"], found.values[name], strict=True))
        if index and x is not None and y is not None
    }
    base = found.values[name][0]
    if name not in LOWER_IS_BETTER and base is not None:
        axes.axhline(base, color=INK, linewidth=0.9, linestyle=":", label=f"base model: {base:.1f}", zorder=1)
    front = sorted((points[index] for index in found.fronts[name]), key=lambda point: point[0])
    axes.plot(*zip(*front, strict=True), color=FRONT, linewidth=1.4, zorder=1.5)
    axes.plot(
        *zip(*front, strict=True), "o", color="none", markeredgecolor=FRONT, markersize=13, markeredgewidth=1.4,
        label="Pareto front", zorder=1.6,
    )  # fmt: skip
    for number, editor in enumerate(editors):
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        own = [index for index in points if found.rows[index].editor == editor]
        for index in own:
            (x, y), bars = points[index], _bars(found, name, index)
            axes.errorbar(x, y, xerr=bars[0], yerr=bars[1], color=colour, elinewidth=0.8, alpha=0.55, zorder=2)
        line = list(zip(*(points[index] for index in own), strict=True)) or [(), ()]
        axes.plot(*line, color=colour, linewidth=0.8, alpha=0.6, zorder=2.5)
        axes.plot(*line, marker, color=colour, markersize=7, markeredgecolor="white", label=editor, zorder=3)
    if name in LOWER_IS_BETTER:
        _log_scale(axes, [y for _, y in points.values()])
    axes.margins(0.08, 0.1)
    if name in LOWER_IS_BETTER:
        axes.invert_yaxis()
    axes.set_xlabel("edit success: mean of reliability and generalization, %")
    axes.set_ylabel(TITLES[name])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    _place_labels(figure, axes, points, {index: _settings(found, index) for index in points})


def _bars(found: Comparison, name: str, index: int) -> list[list[list[float]]]:
    """Lengths of the bars to both sides, of edit success and of what is kept."""
    lengths = []
    for measure in ("success", name):
        difference = found.against[BASE][measure][index]
        assert difference is not None
        below, above = difference.value - difference.low, difference.high - difference.value
        lengths.append([[max(0.0, below)], [max(0.0, above)]])
    return lengths


def _settings(found: Comparison, index: int) -> str:
    """What tells a row from the others of its editor."""
    return found.names[index].removeprefix(found.rows[index].editor).strip()


def _log_scale(axes: "Axes", values: Sequence[float]) -> None:
    """A log axis where the values ask for one, with plain numbers."""
    if min(values, default=0) <= 0 or max(values) < 3 * min(values):
        return
    axes.set_yscale("log")
    from matplotlib.ticker import LogLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")


def _place_labels(
    figure: "Figure", axes: "Axes", points: dict[int, tuple[float, float]], labels: dict[int, str]
) -> None:
    """Puts labels beside their points, where they touch neither each other nor a point; a thin line leads back."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    per_point = figure.dpi / 72
    at = {index: tuple(axes.transData.transform(point)) for index, point in points.items()}
    taken = [
        Bbox.from_bounds(x - 5 * per_point, y - 5 * per_point, 10 * per_point, 10 * per_point) for x, y in at.values()
    ]
    crossed = [Bbox.from_extents(*ends).padded(per_point / 2) for ends in _bar_ends(axes)]
    inside = axes.get_window_extent()
    for index, label in labels.items():
        if not label:
            continue
        x, y = at[index]
        style: dict[str, Any] = {"fontsize": 8, "color": INK, "parse_math": False, "va": "bottom", "ha": "left"}
        tried = axes.text(0, 0, label, **style)
        size = tried.get_window_extent()
        tried.remove()
        far, box = min(
            _places((x, y), size.width + 2 * per_point, size.height + per_point, 7 * per_point),
            key=lambda place: (
                _hidden(place[1], taken, inside),
                _hidden(place[1], crossed, inside) + 3 * place[0] * size.height,  # rather near than off a bar
            ),
        )
        taken.append(box)
        axes.annotate(
            label,
            points[index],
            xytext=((box.x0 - x) / per_point + 1, (box.y0 - y) / per_point + 0.5),
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "color": FRONT, "linewidth": 0.6} if far else None,
            **style,
        )


def _bar_ends(axes: "Axes") -> Iterator[tuple[float, float, float, float]]:
    """The bars of a panel and the base model's line, in pixels: x and y of both ends."""
    frame = axes.get_window_extent()
    for line in axes.lines:
        if str(line.get_label()).startswith(BASE):
            drawn: Any = line.get_ydata()
            height = axes.transData.transform((0, drawn[0]))[1]
            yield frame.x0, height, frame.x1, height
    for container in axes.containers:
        for bars in container[2]:
            for segment in bars.get_segments():
                ends = axes.transData.transform(segment)
                yield *ends.min(0), *ends.max(0)


def _places(point: tuple[float, ...], width: float, height: float, gap: float) -> Iterator[tuple[int, Any]]:
    """Boxes around a point, the nearest first, each with its ring."""
    from matplotlib.transforms import Bbox

    x, y = point
    for ring in range(RINGS):
        off = gap + ring * height
        for step in range(ANGLES):
            angle = 2 * math.pi * (step / ANGLES + 1 / 8)  # first the diagonal, where no bar is
            left = x + math.cos(angle) * off - _share(math.cos(angle)) * width
            bottom = y + math.sin(angle) * off - _share(math.sin(angle)) * height
            yield ring, Bbox.from_bounds(left, bottom, width, height)


def _share(direction: float) -> float:
    """How much of a label lies before its anchor in a direction (a cosine): nothing, all, or half if it is across."""
    return 0.5 if abs(direction) < 0.3 else 0.0 if direction > 0 else 1.0


def _hidden(box: Any, taken: Sequence[Any], inside: Any) -> float:
    """How much of a box is covered or outside the panel, in pixels."""
    covered = sum(_area(box, other) for other in taken)
    return float(covered + 2 * (box.width * box.height - _area(box, inside)))


def _area(one: Any, other: Any) -> float:
    """Of the intersection of two boxes."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(0.0, width) * max(0.0, height))
