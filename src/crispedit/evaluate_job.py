"""``crispedit evaluate``, from names and paths to what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import distributed
from .bundled import corpus
from .certificate import measured, texts_hash
from .checkpoint import load_edited, read_record
from .edits import EditSet
from .errors import ConfigError
from .evaluation import (
    Evaluation,
    answers_of_base,
    check_protocol,
    evaluate_live,
    measure,
    measure_both,
    needs_base_answers,
)
from .harness_job import HarnessJob
from .inputs import check_same, has_tasks, read_edits
from .judge import Judge
from .live import LiveModel
from .models import BUNDLED, find_device, fingerprint
from .progress import Progress, no_progress
from .rows import Chat
from .sharding import check_shard, shard_model
from .texts import load_texts, split_texts


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What ``crispedit evaluate`` measured, and of what.

    Args:
        model: Its name.
        base: That of its base, if one was given.
        edits: What was asked about.
        record: The model's ``crispedit.json``, where it has one.
        judge: The name of who decided what is right.
        chat: Whether prompts went through the chat template, as it was asked for.
        stop_at_period: Whether answers were cut at the first period too.
        after: Of the model.
        before: Of its base, on the same items.
        endpoint: Where the model is, if it is behind a live server.
        harness: Tasks of lm-evaluation-harness, and how they came about.
        texts_sha256: Of the texts that drift was measured on.
        base_fingerprint: Of the base's weights (:func:`crispedit.models.fingerprint`), where they were read in the
            recorded edit's dtype.
    """

    model: str
    base: str | None
    edits: EditSet
    record: dict[str, Any] | None
    judge: str
    chat: str
    stop_at_period: bool
    after: Evaluation
    before: Evaluation | None
    endpoint: dict[str, Any] | None = None
    harness: dict[str, Any] | None = None
    texts_sha256: str | None = None
    base_fingerprint: str | None = None

    def budget(self) -> dict[str, Any] | None:
        """The recorded budget against the drift that was measured now; ``None`` where there is none, or no base.

        Returns:
            What :func:`crispedit.certificate.measured` says, with ``recorded``, the certificate of the edit itself;
            ``same_texts``, whether both are of the same texts; and ``same_base``, whether drift is from the weights
            that were edited, ``None`` where the dtype is another one.
        """
        record = self.record or {}
        recorded = (record.get("metrics") or {}).get("budget")
        if recorded is None or self.after.texts is None or not self.after.has_base:
            return None
        assert self.texts_sha256 is not None
        kept = {name: recorded[name] for name in ("drift", "low", "high", "met", "texts_sha256")}
        found = measured(recorded["budget"], self.after.texts, self.texts_sha256)
        return {
            **found,
            "recorded": kept,
            "same_texts": self.texts_sha256 == recorded["texts_sha256"],
            "same_base": self.base_fingerprint and self.base_fingerprint == record["model"]["fingerprint"],
        }

    def summary(self) -> dict[str, Any]:
        """The means of the model, in the shape of :func:`crispedit.evaluation.evaluate`.

        Returns:
            With them ``capability.budget``, of a model edited within one, and ``endpoint`` and ``harness``, where there
            are such; the harness's scores are also among those of the bundled world's tasks.
        """
        found = self.after.summary()
        budget = self.budget()
        if budget is not None:
            found["capability"]["budget"] = budget
        if self.endpoint is not None:
            found["endpoint"] = self.endpoint
        if self.harness is not None:
            found["harness"] = self.harness
            own = found["capability"]["tasks"]
            for name, task in self.harness["tasks"].items():
                own[f"lm_eval {name}" if name in own else name] = task["score"]
        return found


def evaluate_job(
    model: str,
    edits: str,
    *,
    base: str | None = None,
    protocol: str = "wild",
    judge: Judge,
    texts: Path | None = None,
    limit: int | None = None,
    chat: str = "auto",
    conflicts: str = "error",
    stop_at_period: bool = False,
    harness: HarnessJob | None = None,
    shard: bool = False,
    options: dict[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Evaluated:
    """``crispedit evaluate``: loads model, base and texts, and evaluates.

    Args:
        model: What to evaluate.
        edits: Path or bundled split.
        base: The model before editing.
        protocol: ``wild``, ``teacher-forced`` or ``all``.
        judge: Says which answers are right.
        texts: For drift; those that ``crispedit.json`` names when omitted.
        limit: The first N edits.
        chat: Whether prompts go through the chat template.
        conflicts: What to do with one prompt and several targets.
        stop_at_period: Judge what the published stop rule leaves of an answer.
        harness: Tasks of lm-evaluation-harness.
        shard: Whether both models are divided among the processes (:mod:`crispedit.sharding`).
        options: For :func:`crispedit.models.load_model`.
        progress: Called during every longer step.

    Returns:
        What was measured, of the base too.

    Raises:
        ConfigError: Models are to be divided among one process, or for tasks.
    """
    check_protocol(protocol)  # before anything is loaded
    check_shard(shard)
    if shard and harness is not None:
        raise ConfigError("--tasks are run by one process, on a whole model: leave --shard or --tasks out")
    edit_set = read_edits(edits, limit=limit, conflicts=conflicts)
    record = read_record(model)
    chosen = _drift_texts(model, texts, record)
    there = harness and distributed.on_main(partial(harness.load, edits, progress=progress))
    options = options or {}
    loaded = load_edited(model, **options, shard=shard)
    check_same(loaded, edit_set, chosen, settings=[protocol, chat, stop_at_period, judge.name, base])
    base_model = load_edited(base, **options, shard=shard).model if base is not None else None
    base_fingerprint = None
    if base_model is not None:
        base_fingerprint = fingerprint(base_model)
        distributed.check_equal({"the base model's weights": base_fingerprint})
        edited_in = ((record or {}).get("model") or {}).get("dtype")
        if edited_in != str(base_model.dtype).removeprefix("torch."):
            base_fingerprint = None  # other numbers: nothing to compare
    if shard:
        for one in (loaded.model, base_model):
            if one is not None:
                shard_model(one, (), find_device(options.get("device", "auto")))
    how: dict[str, Any] = {
        "protocol": protocol,
        "texts": chosen,
        "tasks": has_tasks(loaded.model),
        "judge": judge,
        "chat": chat,
        "stop_at_period": stop_at_period,
        "progress": progress,
    }
    before = None
    if base_model is None:
        after = measure(loaded.model, loaded.tokenizer, edit_set, **how)
    else:
        after, before = measure_both(loaded.model, loaded.tokenizer, edit_set, base=base_model, **how)
    benchmarks = None
    if harness is not None:
        work = partial(harness.run, there or [], loaded, base_model, chat=chat, progress=progress)
        # lm-evaluation-harness has its own way to share work, and its own launcher
        benchmarks = distributed.on_main(work)
    return Evaluated(
        model=model,
        base=base,
        edits=edit_set,
        record=record,
        judge=judge.name,
        chat=chat,
        stop_at_period=stop_at_period,
        after=after,
        before=before,
        harness=benchmarks,
        texts_sha256=texts_hash(chosen) if chosen is not None else None,
        base_fingerprint=base_fingerprint,
    )


def evaluate_live_job(
    live: LiveModel,
    edits: str,
    *,
    base: str | None = None,
    judge: Judge,
    limit: int | None = None,
    conflicts: str = "error",
    stop_at_period: bool = False,
    options: dict[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Evaluated:
    """``crispedit evaluate --endpoint``: evaluates a model behind a server.

    Args:
        live: What to evaluate.
        edits: Path or bundled split.
        base: The model before editing, for locality prompts without an answer; it is asked here, not there.
        judge: Says which answers are right.
        limit: The first N edits.
        conflicts: What to do with one prompt and several targets.
        stop_at_period: Also cut answers at the first period.
        options: For :func:`crispedit.models.load_model`, of the base.
        progress: Called during every longer step.

    Returns:
        What was measured.
    """
    edit_set = read_edits(edits, limit=limit, conflicts=conflicts)
    chat: Chat = "off" if live.api == "completions" else "auto"
    base_answers = None
    if base is not None and needs_base_answers(edit_set):
        loaded = load_edited(base, **(options or {}))
        base_answers = answers_of_base(
            loaded.model,
            loaded.tokenizer,
            edit_set,
            chat=chat,
            stop_at_period=stop_at_period,
            progress=progress,
        )
    after = evaluate_live(
        live, edit_set, base_answers=base_answers, judge=judge, stop_at_period=stop_at_period, progress=progress
    )
    return Evaluated(
        model=live.name,
        base=None,
        edits=edit_set,
        record=None,
        judge=judge.name,
        chat=chat,
        stop_at_period=stop_at_period,
        after=after,
        before=None,
        endpoint=live.about(),
    )


def _drift_texts(model: str, path: Path | None, record: dict[str, Any] | None) -> Sequence[str] | None:
    """The texts for drift: a file's; else the held-out ones of the recorded run, where they can still be read."""
    recorded = (record or {}).get("texts")
    if model == BUNDLED and path is None:
        return split_texts(corpus.capability_texts()).held_out
    if recorded is None:
        return load_texts(path) if path is not None else None
    if path is not None:
        texts = load_texts(path)
    elif recorded["source"] == BUNDLED:
        texts = corpus.capability_texts()
    elif Path(recorded["source"]).is_file():
        texts = load_texts(recorded["source"])
    else:
        return None
    divided = split_texts(texts, source=recorded["source"], samples=recorded["samples"], seed=recorded["seed"])
    # other texts than those of the run: nothing was fitted to them, all can be used
    return divided.held_out if divided.sha256 == recorded["sha256"] else texts
