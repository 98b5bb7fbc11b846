"""A picture of a session: what is left of every round after every later one, and drift over the rounds.

(The first panel is CrispEdit's Figure 7, arXiv 2602.15823, for all pairs of rounds.)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArtifactError
from .plot import INK, INPUTS, OUTPUTS, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (10.0, 4.2)
"""Inches."""


def draw_session(rounds: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws a session's rounds to a file.

    Args:
        rounds: Their records, as the session keeps them.
        path: ``.png``, ``.svg`` or ``.pdf``; see :func:`crispedit.plot.check_plot`.

    Raises:
        ArtifactError: There is no round yet, or the file cannot be written.
    """
    if not rounds:
        raise ArtifactError("the session has no rounds to draw yet")
    save_figure(figure_of(rounds), path)


def retention(rounds: Sequence[Mapping[str, Any]]) -> list[list[float | None]]:
    """Reliability in percent of every round (rows) after every round (columns); ``None`` where nobody asked."""
    return [
        [(after["past"].get(str(of_round["number"])) or {}).get("reliability") for after in rounds]
        for of_round in rounds
    ]


def figure_of(rounds: Sequence[Mapping[str, Any]]) -> "Figure":
    """The picture; it is not written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_retention(left, retention(rounds))
    _draw_drift(right, rounds)
    return figure


def _draw_retention(axes: "Axes", table: Sequence[Sequence[float | None]]) -> None:
    """A square per pair of rounds, the darker the more of the earlier one is left."""
    count = len(table)
    axes.set_title("What is left of each round", loc="left", fontsize=11)
    axes.set(xlabel="after round", ylabel="of round")
    values = [[float("nan") if value is None else value for value in row] for row in table]
    if all(value is None for row in table for value in row):
        axes.text(0.5, 0.5, "no round has kept its edits:\nuse --keep-edits", ha="center", va="center", color=INK)
        axes.set(xticks=[], yticks=[])
        return
    extent = (0.5, count + 0.5, count + 0.5, 0.5)
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, extent=extent, aspect="auto", interpolation="nearest")
    if count <= 12:  # else there is no room for numbers
        for row, of_round in enumerate(table, 1):
            for column, value in enumerate(of_round, 1):
                if value is not None:
                    shade = "white" if value < 60 else "black"
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=shade)
    ticks = range(1, count + 1, max(1, count // 10))
    axes.set(xticks=ticks, yticks=ticks)
    axes.figure.colorbar(image, ax=axes, label="reliability, %")


def _draw_drift(axes: "Axes", rounds: Sequence[Mapping[str, Any]]) -> None:
    """Drift from the base, measured and as the curvature of the base predicts it."""
    axes.set_title("Drift from the base", loc="left", fontsize=11)
    numbers = [record["number"] for record in rounds]
    drawn = False
    for key, label, colour, style in (
        ("drift", "measured", OUTPUTS, "o-"),
        ("predicted", "predicted from the curvature", INPUTS, "s--"),
    ):
        values = [(record["drift"] or {}).get(key) for record in rounds]
        if any(value is not None for value in values):
            drawn = True
            shown = [float("nan") if value is None else value for value in values]
            axes.plot(numbers, shown, style, color=colour, label=label, markersize=4, linewidth=1.4)
    if not drawn:
        axes.text(0.5, 0.5, "no texts are held out", ha="center", va="center", color=INK, transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    axes.set(xlabel="after round", ylabel="nats per token", ylim=(0, None))
    axes.set_xticks(range(numbers[0], numbers[-1] + 1, max(1, len(numbers) // 10)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
