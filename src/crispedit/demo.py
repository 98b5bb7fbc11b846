"""The demo: plain fine-tuning and CrispEdit side by side, on the bundled model and its 200 edits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .artifacts import check_writable
from .bundled import world
from .checkpoint import read_record
from .edit_job import EditJob
from .editing import EditResult
from .evaluation import evaluate
from .inputs import capability_texts, read_edits
from .models import BUNDLED, load_model
from .progress import Progress, no_progress

EDITS = "bundled:demo"
EDITORS = ("ft", "crispedit")
"""The two methods: the same loop, the same search for a learning rate; see docs/decisions.md."""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo found.

    Args:
        columns: Evaluations of ``base``, ``ft`` and ``crispedit``.
        verdict: What the comparison says, line by line.
        example: A prompt whose answer the edit changed.
    """

    columns: dict[str, dict[str, Any]]
    verdict: list[str]
    example: str


def run_demo(out: Path, *, seed: int = 0, progress: Progress = no_progress) -> DemoResult:
    """Edits the bundled model twice, evaluates everything, and saves CrispEdit's model.

    Args:
        out: Directory for the edited model; one that the demo wrote before is replaced.
        seed: Of everything drawn at random.
        progress: Called during every longer step.

    Returns:
        The evaluations and what they say.
    """
    own = (read_record(out) or {}).get("command") == "demo"
    check_writable(out, overwrite=own)
    edits = read_edits(EDITS)
    base = load_model(BUNDLED)
    texts = capability_texts(BUNDLED, None, None, seed)
    assert texts is not None
    shared: dict[str, Any] = {"texts": texts.held_out, "tasks": True, "progress": progress}
    columns = {"base": evaluate(base.model, base.tokenizer, edits, base=base.model, **shared)}
    results: dict[str, EditResult] = {}
    for name in EDITORS:
        result = EditJob(model=BUNDLED, edits=EDITS, editor=name, seed=seed).run(progress=progress)
        columns[name] = evaluate(result.model, result.tokenizer, edits, base=base.model, **shared)
        results[name] = result
    results["crispedit"].provenance["command"] = "demo"
    results["crispedit"].save(out, overwrite=own, progress=progress)
    return DemoResult(columns=columns, verdict=verdict(columns), example=str(world.edit_rows("demo")[0]["prompt"]))


def verdict(columns: dict[str, dict[str, Any]]) -> list[str]:
    """What the three columns say of CrispEdit against plain fine-tuning.

    Args:
        columns: Evaluations of ``base``, ``ft`` and ``crispedit``.

    Returns:
        One line per goal: met or missed, with the numbers.
    """
    ft, crisp = columns["ft"], columns["crispedit"]
    lost = {name: ability_loss(columns["base"], columns[name]) for name in ("ft", "crispedit")}
    allowed = max(1.0, lost["ft"] / 3)
    drift_ft, drift = ft["capability"]["drift"], crisp["capability"]["drift"]
    goals = [
        (
            crisp["no_context"]["reliability"] >= 95,
            f"reliability {crisp['no_context']['reliability']:.1f} % "
            f"(goal: at least 95; fine-tuning {ft['no_context']['reliability']:.1f})",
        ),
        (
            crisp["no_context"]["generalization"] >= 0.8 * ft["no_context"]["generalization"],
            f"generalization {crisp['no_context']['generalization']:.1f} % "
            f"(goal: at least 80 % of fine-tuning's {ft['no_context']['generalization']:.1f})",
        ),
        (
            lost["crispedit"] <= allowed,
            f"mean loss over the five abilities {lost['crispedit']:.2f} points "
            f"(goal: at most {allowed:.2f}; fine-tuning {lost['ft']:.2f})",
        ),
        (
            drift <= drift_ft / 3,
            f"drift {drift:.4f} nats/token (goal: at most a third of fine-tuning's {drift_ft:.4f})",
        ),
    ]
    return [f"{'met   ' if met else 'MISSED'}  {text}" for met, text in goals]


def ability_loss(base: dict[str, Any], edited: dict[str, Any]) -> float:
    """Mean over the five abilities of base score minus edited score, in points."""
    before: dict[str, float] = base["capability"]["tasks"]
    after: dict[str, float] = edited["capability"]["tasks"]
    return sum(before[name] - after[name] for name in before) / len(before)
