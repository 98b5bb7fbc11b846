"""Everything that was measured of a model beside the same of its base: with intervals, and paired differences.

What a report and ``crispedit evaluate --base`` say of differences is this. A pair is an item of which both models have
a score, and the difference is resampled with the same items of both; see :mod:`crispedit.statistics`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from .evaluate_job import Evaluated
from .progress import Progress, no_progress
from .statistics import LEVEL, POWER, RESAMPLES, Measure, Stratum, differences
from .tradeoff import LOWER_IS_BETTER, change, measures

GAINED = ("success", "reliability", "generalization", "efficacy", "paraphrase_efficacy")
"""Measures that an edit is made for; all others are what it must leave as it is."""
SMALL = 1.0
"""Points: a loss of a percentage is said to be below this where its interval says so."""
_TITLES = {"success": "edit success", "loss": "loss on other texts", "drift": "drift on other texts"}
_TITLES |= {"agreement": "agreement with the base"}
_CONTEXTS = {"qa_context": "QA context", "no_context": "no context", "teacher_forced": "teacher-forced"}


def measure_rows(
    found: Evaluated, *, resamples: int = RESAMPLES, progress: Progress = no_progress
) -> list[dict[str, Any]]:
    """All that was measured, of both models, with intervals; on the items of which both have a score.

    Args:
        found: What was measured.
        resamples: Of the bootstrap.
        progress: Called after every measure.

    Returns:
        Rows for a report's ``measures`` (docs/evaluation.md), what was gained before what it cost. Without a base,
        there is no drift, and ``before``, ``difference`` and ``change`` are ``None``.
    """
    count = len(found.edits)
    after = found.after.items(count)
    before = found.before.items(count) if found.before is not None else None
    if before is not None:
        _keep_common(after, before)
    mine = {name: measure for name, measure in measures(after).items() if _counted(measure)}
    its = measures(before) if before is not None else {}
    if before is None:
        mine.pop("drift", None)  # nothing to have drifted from
    locality = found.after.forced.locality if found.after.forced is not None else None
    rows = []
    for number, (name, measure) in enumerate(sorted(mine.items(), key=lambda item: _rank(item[0]))):
        alone = differences([_nothing(measure), measure], 0, resamples=resamples)[1]
        paired = differences([its[name], measure], 0, resamples=resamples)[1] if name in its else None
        rows.append(
            {
                "name": name,
                "title": _title(name, locality),
                "group": "success" if _kind(name) in GAINED else "damage",
                "unit": "%" if measure.span is not None else "nats/token",
                "digits": 4 if measure.span is None else 2 if name == "abilities" else 1,
                "lower_is_better": name in LOWER_IS_BETTER,
                "items": sum(int((stratum.counts.sum(1) > 0).sum()) for stratum in measure.strata),
                "before": _finite(its[name].value) if name in its else None,
                "after": _finite(measure.value),
                "interval": [_finite(alone.low), _finite(alone.high)],
                "difference": {key: _finite(value) for key, value in asdict(paired).items()} if paired else None,
                "change": change(name, paired) if paired else None,
            }
        )
        progress("intervals", number + 1, len(mine))
    return rows


def differences_record(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What ``crispedit evaluate --base --json`` has under ``differences``.

    Args:
        rows: Of :func:`measure_rows`, with a base.

    Returns:
        ``level`` of the intervals, ``power``, ``resamples``, and by name the ``measures``: ``unit``, ``items``,
        ``base``, ``model``, the difference between them (``value``, ``low``, ``high``, ``error``, ``detectable``), and
        the ``change`` that it shows.
    """
    return {
        "level": LEVEL,
        "power": POWER,
        "resamples": RESAMPLES,
        "measures": {
            row["name"]: {
                "unit": row["unit"],
                "items": row["items"],
                "base": row["before"],
                "model": row["after"],
                **row["difference"],
                "change": row["change"],
            }
            for row in rows
            if row["difference"] is not None
        },
    }


def small_loss(row: Mapping[str, Any]) -> bool:
    """Whether the interval of a difference says that, if anything is lost, it is less than a point.

    Args:
        row: Of :func:`measure_rows`.

    Returns:
        False also of what an edit is made for, and of what has no percentages.
    """
    difference = row["difference"]
    if row["group"] != "damage" or row["unit"] != "%" or difference is None or difference["low"] is None:
        return False
    return bool(difference["low"] > -SMALL)


def could_have_shown(row: Mapping[str, Any]) -> str:
    """The smallest difference that a sample could have shown, where it shows none.

    Args:
        row: Of :func:`measure_rows`.

    Returns:
        A phrase; empty where there is a difference. No percentage changes by more than 100 points, and a sample that
        could have shown nothing less could have shown nothing.
    """
    if row["change"] != "none":
        return ""
    detectable = row["difference"]["detectable"]
    if row["unit"] == "%" and detectable is not None and detectable > 100:
        return "nothing"
    return f"≥ {rounded(detectable, row['digits'])}"


def rounded(value: float | None, digits: int, sign: str = "") -> str:
    """A number with so many decimals, or a dash; there is no −0.0.

    Args:
        value: The number.
        digits: How many.
        sign: ``+`` to have it always.

    Returns:
        A text.
    """
    return "–" if value is None else f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def _keep_common(after: dict[str, Any], before: dict[str, Any]) -> None:
    """Takes out the scores of edits that only one of two models has: paired differences are of the same items."""
    for context, kinds in after["edits"].items():
        for kind, scores in kinds.items():
            its = before["edits"][context][kind]
            for edit, pair in enumerate(zip(scores, its, strict=True)):
                if None in pair:
                    scores[edit] = its[edit] = None


def _counted(measure: Measure) -> bool:
    """Whether anything was counted: of edits that nobody judged, nothing was."""
    return all(bool((stratum.counts.sum(0) > 0).all()) for stratum in measure.strata)


def _nothing(measure: Measure) -> Measure:
    """The same items with nothing right: what a measure's own interval is a difference to."""
    return Measure(tuple(Stratum(torch.zeros_like(s.sums), s.counts) for s in measure.strata), measure.span)


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _rank(name: str) -> tuple[bool, bool, int]:
    """The order of measures: what was gained before what it cost, and of each the sums before their parts."""
    order = (*GAINED, "locality", "agreement", "abilities")
    kind = _kind(name)
    return kind not in GAINED, kind in LOWER_IS_BETTER, order.index(kind) if kind in order else len(order)


def _title(name: str, locality: str | None) -> str:
    """A measure's name in words; ``locality`` is what it is where it is teacher-forced."""
    context, _, kind = name.rpartition(".")
    kind = _TITLES.get(kind, kind.replace("_", " "))
    if name == "teacher_forced.locality" and locality == "likelihood":
        kind = "locality by likelihood"
    return f"{kind}, {_CONTEXTS.get(context, context)}" if context and context != "task" else kind


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
