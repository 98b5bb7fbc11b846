"""The area under a trade-off curve, and its interval over seeds.

Of one constraint and one seed, every γ gives a point: accuracy on the edit task, x, against accuracy on the capability
task, y, both 0 to 1. Two points belong to every constraint: the network as it was, and plain fine-tuning (γ = 0). What
is attainable is their upper envelope: the points that no other beats in both, joined by straight lines,

    C(x),  AUC = 1 / (x₁ − x₀) ∫ C(x) dx   from x₀ to x₁,

so 1 means that everything learned cost nothing. The range is the same for all constraints and seeds: from the largest
edit accuracy of a network as it was to the smallest of plain fine-tuning. (A range of its own for every seed, from its
network to its plain fine-tuning, is the other choice; :mod:`.summary` has both.) The interval is the percentile
bootstrap of the mean over seeds (:mod:`crispedit.statistics`), paired by seed for differences. With five seeds it is a
little too narrow; it says how much seeds differ, not more.
"""

from collections.abc import Sequence
from itertools import pairwise

from ..statistics import Difference, Measure, Stratum, differences, percentile_interval, replicates

Point = tuple[float, float]


def envelope(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both coordinates, by rising x, and so by falling y."""
    best: list[Point] = []
    for x, y in sorted(set(points), key=lambda point: (-point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best[::-1]


def height(curve: Sequence[Point], x: float) -> float:
    """C(x): between two points of an envelope on a straight line; level before the first; 0 beyond the last."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return 0.0


def area(points: Sequence[Point], low: float, high: float) -> float:
    """The normalised area.

    Args:
        points: (x, y), the two ends among them.
        low: x₀.
        high: x₁.

    Returns:
        The mean of C over [x₀, x₁]; C(x₀) where the range is empty.
    """
    curve = envelope(points)
    if high <= low:
        return height(curve, low)
    end = max(low, min(high, curve[-1][0]))  # beyond, C is 0
    edges = sorted({low, end, *(x for x, _ in curve if low < x < end)})
    total = sum((b - a) * (height(curve, a) + height(curve, b)) / 2 for a, b in pairwise(edges))
    return total / (high - low)


def reach(points: Sequence[Point], floor: float) -> float:
    """The largest x that is attained with y of at least ``floor`` on the envelope, which begins above it."""
    curve = envelope(points)
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y1 < floor:
            return x0 + (x1 - x0) * (y0 - floor) / (y0 - y1)
    return curve[-1][0]


def intervals(values: Sequence[Sequence[float]], seed: int = 0) -> list[tuple[float, float, float]]:
    """Mean and interval over seeds of several constraints' values.

    Args:
        values: Per constraint one value of every seed, the same seeds for all.
        seed: Of the bootstrap.

    Returns:
        (mean, low, high) of each; of a single seed all three are the same.
    """
    measures = [Measure((Stratum.of(list(of_seeds)),)) for of_seeds in values]
    drawn = replicates(measures, seed=seed)
    return [(measure.value, *percentile_interval(drawn[:, k])) for k, measure in enumerate(measures)]


def paired(values: Sequence[Sequence[float]], reference: int, seed: int = 0) -> list[Difference]:
    """Every constraint's values less those of the one at ``reference``, seed by seed; see :func:`intervals`."""
    return differences([Measure((Stratum.of(list(of_seeds)),)) for of_seeds in values], reference, seed=seed)
