"""One row of a comparison, in a process of its own: the edit, what was measured of it, and what that took."""

import time
from typing import Any

import torch

from .capability import Logits, logits_of, logits_with
from .curvature_file import read_manifest
from .edit_job import EditJob
from .editing import EditResult
from .editors import configured
from .errors import ModelError
from .evaluation import agreeing, measure
from .inputs import capability_texts, has_tasks, read_edits
from .memory import peak_bytes
from .models import fingerprint, load_model, parse_layers
from .patch import StoredTensors
from .progress import Progress
from .tradeoff import BASE


def prepare_curvature(task: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Sees to it that the curvature of a row is in the cache.

    Args:
        task: :meth:`crispedit.comparing.CompareJob.task`.
        progress: Called during the pass.

    Returns:
        ``seconds`` that its estimate took, now or long ago (``None`` where that is not known), whether it was
        ``cached``, and the peak ``memory`` of this process.
    """
    curvature, cached = EditJob(**task["job"]).curvature_in_cache(**task["options"], progress=progress)
    assert curvature.path is not None
    return {
        "seconds": read_manifest(curvature.path).get("seconds"),
        "cached": cached,
        "memory": _memory(),
    }


def measure_row(task: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Edits, unless it is the base model's row, and evaluates.

    Args:
        task: :meth:`crispedit.comparing.CompareJob.task`, with the base model's ``fingerprint`` and ``base_answers``
            where they are known.
        progress: Called during every longer step.

    Returns:
        The row's record, JSON-ready.

    Raises:
        ModelError: These are not the weights that the base model's row was measured with.
    """
    job = EditJob(**task["job"])
    edits = read_edits(job.edits, limit=job.limit, conflicts=job.conflicts)
    texts = capability_texts(job.model, job.texts, job.samples, job.seed)
    assert texts is not None
    options: dict[str, Any] = {
        "texts": texts.held_out,
        "judge": task["judge"],
        "chat": job.chat,
        "progress": progress,
    }
    if job.editor == BASE:
        loaded = load_model(job.model, **task["options"])
        memory = _memory()
        model, tokenizer, base = loaded.model, loaded.tokenizer, logits_of(loaded.model)
        record: dict[str, Any] = {"fingerprint": fingerprint(model), "seconds": {"edit": 0.0, "proof": 0.0}}
    else:
        result = job.run(**task["options"], progress=progress)
        memory = _memory()
        model, tokenizer, base = result.model, result.tokenizer, _base_logits(job, result)
        training, about = result.metrics["training"], result.provenance["model"]
        if task["fingerprint"] not in (None, about["fingerprint"]):
            raise ModelError(f"the weights of '{job.model}' are not those that the base model's row was measured with")
        record = {
            "fingerprint": about["fingerprint"],
            "seconds": {name: result.metrics["seconds"][name] for name in ("edit", "proof")},
            "settings": result.settings,
            "learning_rates": training["learning_rates"],
            "trials": len(training["trials"]),
            "steps": training["steps"],
            "edit_loss": result.metrics["edit_loss"],
            "notes": result.notes,
        }
    started = time.monotonic()
    found = measure(
        model, tokenizer, edits, base=base, base_answers=task["base_answers"], tasks=has_tasks(model), **options
    )
    if job.editor == BASE and any(near.answer is None for edit in edits for near in edit.locality):
        record["answers"] = found.answers  # right is what the base model says
        found = agreeing(found, edits)
    record["seconds"] |= {
        "evaluation": round(time.monotonic() - started, 2),
        "processor": round(time.process_time(), 2),  # of all the row, whatever else the machine had to do
    }
    return {**record, "evaluation": found.summary(), "items": found.items(len(edits)), "memory": memory}


def _base_logits(job: EditJob, result: EditResult) -> Logits:
    """The base model's logits from an edited model: what was added to its matrices is taken off while they are used.

    A second model would take as much memory again.
    """
    layers = parse_layers(job.layers) if job.layers is not None else None
    before = result.patch.reversed().applied(StoredTensors(result.model, result.stored_dtype))
    matrices = [m for m in configured(job.editor, job.settings)[1].matrices(result.model, layers) if m.name in before]
    originals = {m.name: m.as_weight(before[m.name]) for m in matrices}
    return logits_with(result.model, matrices, originals)


def _memory() -> dict[str, int | None]:
    """Peak memory so far, in bytes: of the process, and on a GPU."""
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"process": peak_bytes(), "gpu": gpu}
