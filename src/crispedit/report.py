"""The report of an evaluation as plain data: what ``crispedit evaluate … --report`` writes, in one of three forms.

    Evaluated ──report_data──▶ a dictionary, JSON-ready ──┬─▶ FILE.json, as it is
                                                          ├─▶ FILE.md    (report_markdown.py)
                                                          └─▶ FILE.html  (report_html.py, report.html)

The dictionary is documented in docs/evaluation.md; :data:`FORMAT` counts its versions. Paths are left out but for
their last name: a report is passed on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from . import __version__
from .curvature import Curvature
from .description import ENERGY
from .evaluate_job import Evaluated
from .judge import Verdict
from .paired import measure_rows
from .progress import Progress, no_progress
from .report_curvature import curvature_data, last_name
from .report_definitions import definitions
from .report_verdict import Held, caveats, certificate, sentence
from .statistics import LEVEL, POWER, RESAMPLES
from .wild import Question, questions

FORMAT = 1


def report_data(
    found: Evaluated,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    curvature: Curvature | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Everything that a report says.

    Args:
        found: What was measured.
        rows: Its measures (:func:`crispedit.paired.measure_rows`), where they are known already.
        curvature: That of the edit, to be drawn.
        progress: Called during longer steps.

    Returns:
        The report; see docs/evaluation.md. Numbers that are not finite are ``None``.
    """
    rows = measure_rows(found, progress=progress) if rows is None else rows
    by_name = {row["name"]: row for row in rows}
    held, run, has_base, budget = _held(found), _run(found), found.before is not None, found.budget()
    base = last_name(found.base) if found.base is not None else None
    return {
        "format": FORMAT,
        "crispedit": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": last_name(found.model),
        "base": base,
        "protocol": {"judge": found.judge, "chat": found.chat, "stop_at_period": found.stop_at_period},
        "statistics": {"level": LEVEL, "power": POWER, "resamples": RESAMPLES},
        "edit_set": {
            "source": last_name(found.edits.source),
            "schema": found.edits.schema,
            "sha256": found.edits.sha256,
            "count": len(found.edits),
            "notes": list(found.edits.notes),
        },
        "verdict": {
            "sentence": sentence(held, by_name, has_base=has_base),
            "caveats": caveats(held, by_name, base=base, unjudged=_unjudged(found), run=run),
            "held": asdict(held),
            "certificate": certificate(budget) if budget is not None else None,
        },
        "measures": list(rows),
        "edits": _edits(found),
        "run": run,
        "curvature": curvature_data(curvature, _energy(found), progress=progress) if curvature is not None else None,
        "definitions": definitions(
            by_name,
            judge=found.judge,
            stop_at_period=found.stop_at_period,
            has_base=has_base,
            forced=found.after.forced.locality if found.after.forced is not None else None,
        ),
    }


def _held(found: Evaluated) -> Held:
    """How many edits hold: answered with their target without context."""
    asked = questions(found.edits)

    def verdicts(of: Mapping[str, Sequence[Verdict]]) -> list[Verdict]:
        return [v for q, v in zip(asked, of["no_context"], strict=True) if q.kind == "reliability"]

    after = verdicts(found.after.verdicts)
    before = None if found.before is None else verdicts(found.before.verdicts).count(True)
    judged = sum(verdict is not None for verdict in after)
    return Held(after=after.count(True), before=before, judged=judged, count=len(after))


def _unjudged(found: Evaluated) -> int:
    """Answers without a verdict though there is something that would be right."""
    asked, has_base = questions(found.edits), found.before is not None
    return sum(
        verdict is None and (has_base or question.expected is not None)
        for verdicts in found.after.verdicts.values()
        for question, verdict in zip(asked, verdicts, strict=True)
    )


def _edits(found: Evaluated) -> list[dict[str, Any]]:
    """Every edit with its questions and the answers to them, in the order of the edit set."""
    edits: list[dict[str, Any]] = [
        {"row": edit.row, "subject": edit.subject, "target": edit.target, "questions": []} for edit in found.edits
    ]
    for index, question in enumerate(questions(found.edits)):
        edits[question.edit]["questions"].append(
            {
                "kind": question.kind,
                "prompt": _text(question),
                "expected": question.expected,
                "answers": {context: _answer(found, context, index) for context in found.after.answers},
            }
        )
    return edits


def _text(question: Question) -> str:
    """A prompt as text; of a conversation, its messages after the names of their roles."""
    if isinstance(question.prompt, str):
        return question.prompt
    return "\n".join(f"{role}: {content}" for role, content in question.prompt)


def _answer(found: Evaluated, context: str, index: int) -> dict[str, Any]:
    before = found.before
    return {
        "before": None if before is None else before.answers[context][index],
        "before_right": None if before is None else before.verdicts[context][index],
        "after": found.after.answers[context][index],
        "right": found.after.verdicts[context][index],
    }


def _run(found: Evaluated) -> dict[str, Any] | None:
    """How the model was edited, from its ``crispedit.json``; one that patches were put on was not edited."""
    record = found.record
    if record is None or "patches" in record:
        return None
    settings, metrics = dict(record.get("settings", {})), record.get("metrics", {})
    edits, texts, training = record.get("edits", {}), record.get("texts"), metrics.get("training", {})
    return {
        "editor": settings.pop("editor", None),
        "layers": settings.pop("layers", None),
        "settings": {name: last_name(v) if isinstance(v, str) else v for name, v in settings.items()},
        "model": last_name(str(record.get("model", {}).get("name"))),
        "fingerprint": record.get("model", {}).get("fingerprint"),
        "dtype": record.get("model", {}).get("dtype"),
        "edits": {**edits, "source": last_name(str(edits.get("source")))},
        "same_edits": edits.get("sha256") == found.edits.sha256,
        "texts": {**texts, "source": last_name(str(texts["source"]))} if texts else None,
        "versions": record.get("versions", {}),
        "machine": record.get("machine"),
        "seconds": metrics.get("seconds", {}),
        "edit_loss": metrics.get("edit_loss"),
        "epochs": len(training.get("epoch_losses", [])),
        "learning_rates": training.get("learning_rates", []),
        "matrices": metrics.get("matrices", []),
    }


def _energy(found: Evaluated) -> float:
    """γ of the edit, where its editor has one."""
    energy = ((found.record or {}).get("settings") or {}).get("energy")
    return float(energy) if energy is not None else ENERGY
