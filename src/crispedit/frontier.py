"""What a larger damage budget buys: edit success against drift, budget by budget, beside plain fine-tuning."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .models import EditMatrix
from .plot import DASHED, INK, INPUTS, OUTPUTS, PROTECTED, check_plot, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("reliability", "generalization", "locality")
"""What is asked after every budget, in percent."""
SIZE = (7.0, 4.4)
"""Inches."""

Point = Mapping[str, Any]
"""``drift`` in nats per token, and :data:`SHOWN`; of a budget also that, ``budget``,
and ``preference`` (:mod:`crispedit.triage`)."""


def frontier(rounds: Sequence[Mapping[str, Any]], fine_tuning: Mapping[str, Any]) -> dict[str, Any]:
    """A frontier for the record.

    Args:
        rounds: What the record says of the rounds of an edit, one per budget.
        fine_tuning: The metrics of plain fine-tuning with the same edits.

    Returns:
        ``points``, the smallest budget first; ``fine_tuning``, another; and ``knee``, the budget at the knee.
    """
    ascending = sorted(rounds, key=lambda of_round: float(of_round["budget"]))
    points = [{name: of_round[name] for name in ("budget", "drift", "preference", *SHOWN)} for of_round in ascending]
    reference = {"drift": fine_tuning["capability"]["drift"], **{name: fine_tuning["after"][name] for name in SHOWN}}
    return {"points": points, "fine_tuning": reference, "knee": points[knee(points, reference)]["budget"]}


def success(point: Point) -> float:
    """The mean of what was asked of the edits themselves, in percent: reliability, and generalization where asked."""
    scores = [point[name] for name in ("reliability", "generalization") if point[name] is not None]
    return sum(scores) / len(scores) if scores else math.nan


def knee(points: Sequence[Point], fine_tuning: Point) -> int:
    """Where more drift begins to buy little.

    The point that lies farthest above the line from the first to what no budget at all comes to, both axes from 0 to 1
    and drift on a logarithmic one (Satopää et al., "Finding a Kneedle in a Haystack", 2011).

    Args:
        points: By rising budget.
        fine_tuning: Without a budget.

    Returns:
        The index of the point; of several, the one with the least drift.
    """
    every = [*points, fine_tuning]
    drifts = [math.log(max(point["drift"], 1e-12)) for point in every]
    heights = [success(point) for point in every]
    width, height = max(drifts) - drifts[0], max(heights) - heights[0]
    if not (width > 0 and height > 0):
        return 0
    above = [(y - heights[0]) / height - (x - drifts[0]) / width for x, y in zip(drifts, heights, strict=True)]
    return above.index(max(above[:-1]))


@contextmanager
def put_back(matrices: Sequence[EditMatrix]) -> Iterator[None]:
    """Afterwards the matrices are what they were."""
    originals = [matrix.weight.clone() for matrix in matrices]
    try:
        yield
    finally:
        for matrix, original in zip(matrices, originals, strict=True):
            matrix.weight.copy_(original)


def draw_frontier(found: Mapping[str, Any], path: Path) -> None:
    """Draws a frontier to a file, whole or not at all.

    Args:
        found: What :func:`frontier` gives.
        path: A .png, .svg or .pdf file.

    Raises:
        ArtifactError: The file cannot be written.
    """
    check_plot(path)
    save_figure(figure_of(found), path)


def figure_of(found: Mapping[str, Any]) -> "Figure":
    """The picture; it is not written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    points, reference = found["points"], found["fine_tuning"]
    drifts = [point["drift"] for point in points]
    for name, colour, marker in zip(SHOWN, (INPUTS, PROTECTED, OUTPUTS), "os^", strict=True):
        values = [point[name] for point in points]
        if None in values or reference[name] is None:
            continue
        label = {"locality": "neighbours kept (locality)"}.get(name, name)
        axes.plot(drifts, values, marker=marker, color=colour, label=label, markersize=5, linewidth=1.5)
        axes.plot([reference["drift"]], [reference[name]], marker=marker, color=colour, fillstyle="none", markersize=8)
    at = next(point for point in points if point["budget"] == found["knee"])
    axes.axvline(at["drift"], **DASHED)
    axes.annotate(
        f"knee: budget {at['budget']:.2g}", (at["drift"], 0), xytext=(4, 6), textcoords="offset points", color=INK,
        fontsize=9,
    )  # fmt: skip
    axes.plot([], [], marker="o", color=INK, fillstyle="none", linestyle="none", label="plain fine-tuning")
    axes.set_title("What a damage budget buys", loc="left", fontsize=11)
    axes.set(xscale="log", ylim=(-3, 103), xlabel="drift on held-out texts, nats per token", ylabel="%")
    axes.grid(axis="y", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
