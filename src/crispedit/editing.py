"""One edit from beginning to end: prepare, run an editor, prove what it did, save what was proved.

The editor only changes matrices. This module owns the original weights (and puts them back when
anything fails), the float32 masters, the proof before and after, and the check that what was written to
disk is the model in memory.
"""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor

from . import __version__, distributed, ranks
from .artifacts import write_json
from .capability import TextSums
from .certificate import certificate, texts_hash
from .checkpoint import PATCH, RECORD, Form, check_files, read_back, round_to, write_model
from .curvature import Curvature
from .editors import configured
from .editors.base import EditorConfig, EditProblem, Round
from .edits import Edit, EditSet, edits_from_rows, spread
from .errors import ConfigError, EditFailed, EditsError
from .generation import Answer, Ids
from .memory import give_back
from .models import EditMatrix, context_length, fingerprint, frozen, tensor_fingerprints
from .offload import in_one_place
from .patch import Patch, StoredTensors
from .precision import float32_masters
from .progress import Progress, no_progress
from .proof import (
    PROOF_EDITS,
    Example,
    MatrixChange,
    check_edited,
    drift_from,
    examples,
    matrix_changes,
)
from .rows import Chat, Prompter
from .sharding import whole_state
from .subspace import Subspace
from .texts import CapabilityTexts, TokenBatch, split_texts, text_batches
from .training import mean_loss
from .wild import Question, ask, expected_drafts, questions, score

SETTLED = 1e-5
"""Processes may come to weights that differ by so much of their norm: by rounding, on different hardware."""
CHECKED = 8
"""A model that was written is asked so many questions again, after all its tensors were compared."""


@dataclass(kw_only=True)
class EditResult:
    """An edited model and the proof of the edit.

    Args:
        model: The model, edited in place.
        tokenizer: Its tokenizer.
        delta: ΔW by parameter name, (d_out, d_in) float32 in main memory, as the model has it: rounded to the stored
            dtype.
        patch: The same exactly, bit for bit: what puts the edit on the stored model, and takes it off.
        metrics: Everything measured, JSON-ready; see :meth:`record`.
        examples: Some edits with full answers before and after.
        changes: Per matrix.
        settings: All settings of the run.
        provenance: Versions, model, edits, texts, curvature.
        notes: What the user should know about the edit set.
        stored_dtype: The checkpoint's dtype.
    """

    model: Any
    tokenizer: Any
    delta: dict[str, Tensor]
    patch: Patch
    metrics: dict[str, Any]
    examples: list[Example]
    changes: list[MatrixChange]
    settings: dict[str, Any]
    provenance: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    _prompter: Prompter = field(repr=False)
    _asked: list[Question] = field(repr=False)
    stored_dtype: torch.dtype

    def record(self) -> dict[str, Any]:
        """What ``crispedit.json`` holds: provenance, settings and metrics."""
        return {**self.provenance, "settings": self.settings, "metrics": self.metrics}

    def save(
        self, directory: str | Path, *, form: Form = "model", overwrite: bool = False, progress: Progress = no_progress
    ) -> Path:
        """Writes the edited model (or only its patch), reads the model back, and checks that it is the same.

        Of several processes the main one does, and the others wait.

        Args:
            directory: New or empty, unless ``overwrite``.
            form: ``model`` or ``delta`` (the patch).
            overwrite: Whether a directory that is not empty is replaced.
            progress: Called while models are asked.

        Returns:
            The directory.

        Raises:
            ConfigError: ``form`` is neither.
            EditFailed: The model read back has other tensors or answers differently. The directory is as it was
                before, then.
        """
        if form not in ("model", "delta"):
            raise ConfigError(f"save is '{form}'; it must be model or delta")
        state = whole_state(self.model) if ranks.in_step() and form == "model" else None
        fill = partial(self._fill, form=form, state=state, progress=progress)
        distributed.write_directory(Path(directory), fill, overwrite=overwrite)
        return Path(directory)

    def _fill(self, building: Path, *, form: Form, state: dict[str, Tensor] | None, progress: Progress) -> None:
        if form == "delta":
            self.patch.write(building / PATCH)
        elif state is not None or not in_one_place(self.model):
            # no process can ask a model of which it holds a part; and of one that no device holds there is no second
            write_model(self.model, self.tokenizer, building, self.stored_dtype, state)
            check_files(self.model, building, self.stored_dtype, state)
        else:
            write_model(self.model, self.tokenizer, building, self.stored_dtype)
            started = time.monotonic()
            self._check_written(building, progress)
            self.metrics["seconds"]["reading_back"] = round(time.monotonic() - started, 2)
        write_json(building / RECORD, self.record())

    def _check_written(self, directory: Path, progress: Progress) -> None:
        """Refuses a written model with other tensors than the one in memory, or other answers."""
        reloaded = read_back(self.model, directory, self.stored_dtype)
        asked = spread(self._asked, CHECKED)
        # both in the same batches: in bfloat16, answers may depend on them
        with frozen(self.model):
            here, there = (
                ask(model, self._prompter, asked, "no_context", progress=progress) for model in (self.model, reloaded)
            )
        for question, a, b in zip(asked, here, there, strict=True):
            if a != b:
                raise EditFailed(
                    f"the saved model answers otherwise than the one in memory: '{question.prompt}': '{b.text}', not "
                    f"'{a.text}'; nothing was kept"
                )


def edit(
    model: Any,
    tokenizer: Any,
    edits: EditSet | Sequence[Edit] | Sequence[dict[str, Any]],
    *,
    curvature: Curvature | None = None,
    texts: CapabilityTexts | Sequence[str] | None = None,
    editor: str = "crispedit",
    layers: Sequence[int] | None = None,
    seed: int = 0,
    chat: Chat = "auto",
    train_edits: Sequence[Edit] = (),
    stored_dtype: torch.dtype | None = None,
    model_name: str = "",
    after_round: Callable[[Round], None] = lambda done: None,
    progress: Progress = no_progress,
    **settings: Any,
) -> EditResult:
    """Edits a model in place and proves what that did.

    Args:
        model: A Hugging Face causal LM.
        tokenizer: Its tokenizer.
        edits: An edit set, edits, or rows as dictionaries.
        curvature: Of the model's capability loss. Estimated from ``texts`` where it is needed and missing.
        texts: Capability texts; a held-out fifth of them measures drift. Those of ``curvature`` when omitted.
        editor: ``EDITOR`` or ``EDITOR:PRESET``.
        layers: Decoder blocks to edit; those of ``curvature``, else the editor's default.
        seed: Same seed, same machine, same result.
        chat: Whether prompts go through the chat template.
        train_edits: Other edits, for editors that learn how to edit.
        stored_dtype: The checkpoint's dtype, in which the model will be saved; the model's when omitted.
        model_name: Recorded; what the model's configuration says when omitted.
        after_round: Called after every round, with the model as it is then, in float32 where it is edited; what it
            takes is not in ``seconds``.
        progress: Called during every longer step.
        **settings: The editor's settings: ``energy``, ``lr``, ``epochs``, ``eos``, …

    Returns:
        The result; ``result.save(directory)`` writes it.

    Raises:
        ConfigError: A setting is unknown or does not fit.
        EditFailed: Nothing changed, the loss did not fall, or a number is not finite. The model's
            original weights are put back then, as on any exception.
    """
    module, config = configured(editor, settings)
    edit_set = edits if isinstance(edits, EditSet) else _as_edit_set(edits)
    check_subjects(config, edit_set)
    if layers is None and curvature is not None and config.needs_curvature():
        layers = curvature.layers
    matrices = config.matrices(model, layers)
    prompter = Prompter.of(model, tokenizer, chat=chat, eos=config.eos)
    rows = prompter.rows(edit_set, context_length(model))
    if texts is not None and not isinstance(texts, CapabilityTexts):
        texts = split_texts(texts, seed=seed)
    provenance = _provenance(model, model_name, edit_set)
    if config.needs_texts() and texts is None:
        raise ConfigError(f"editor {editor} needs capability texts: give --texts")
    if curvature is None and config.needs_curvature():
        if texts is None:
            raise ConfigError(f"editor {editor} needs a curvature: give --curvature or --texts")
        chosen = sorted({m.layer for m in matrices})
        curvature = Curvature.estimate(
            model, tokenizer, texts, layers=chosen, seed=seed, model_name=model_name, progress=progress
        )
    if curvature is not None:
        # of an editor that does without, only the held-out texts are of use
        curvature.check_model(model, matrices if config.needs_curvature() else (), tokenizer)
        curvature.spectra.solve_near(matrices)
        provenance |= {"texts": dict(curvature.texts), "curvature": curvature.manifest(with_texts=False)}
    if texts is not None:
        provenance["texts"] = texts.manifest()
    held_out = _held_out(model, tokenizer, curvature, texts)

    problem = EditProblem(
        model=model,
        prompter=prompter,
        matrices=matrices,
        edits=tuple(edit_set),
        rows=rows,
        curvature=curvature,
        texts=texts,
        train_edits=tuple(train_edits),
        held_out=held_out.batches if held_out else (),
        seed=seed,
        progress=progress,
    )
    asked = questions(spread(tuple(edit_set), PROOF_EDITS))
    dtype = stored_dtype or model.dtype
    with frozen(model):
        proved = _edit_and_prove(problem, module, config, asked, held_out, dtype, after_round)
    edited = provenance["model"]
    about = {"model": edited["name"], "dtype": edited["dtype"], "editor": editor, "edits": provenance["edits"]}
    proved.metrics["seconds"] = {
        "curvature": round(curvature.seconds if curvature else 0.0, 2),
        **proved.metrics["seconds"],
    }
    run = {"editor": editor, "layers": sorted({m.layer for m in matrices}), "seed": seed, "chat": chat}
    return EditResult(
        model=model,
        tokenizer=tokenizer,
        delta=proved.delta,
        patch=replace(proved.patch, about=about),
        metrics=proved.metrics,
        examples=examples(asked, proved.before, proved.after),
        changes=proved.changes,
        settings={**run, **config.model_dump()},
        provenance=provenance,
        notes=[*edit_set.notes, *proved.notes],
        _prompter=prompter,
        _asked=asked,
        stored_dtype=dtype,
    )


@dataclass(frozen=True, kw_only=True)
class _Proved:
    """What an edit did: ΔW, as numbers and as bits, its size per matrix, the answers before and after, all measures."""

    delta: dict[str, Tensor]
    patch: Patch
    changes: list[MatrixChange]
    before: list[str]
    after: list[str]
    metrics: dict[str, Any]
    notes: list[str]


def _edit_and_prove(
    problem: EditProblem,
    module: ModuleType,
    config: EditorConfig,
    asked: Sequence[Question],
    held_out: "_HeldOut | None",
    dtype: torch.dtype,
    after_round: Callable[[Round], None],
) -> _Proved:
    """Runs an editor between the questions before and after, in float32 and then as ``dtype`` will store it."""
    model, matrices, prompter, progress = problem.model, problem.matrices, problem.prompter, problem.progress

    def answers(drafts: Sequence[Sequence[Ids]]) -> list[Answer]:
        give_back()
        return ask(model, prompter, asked, "no_context", drafts=drafts, progress=progress)

    def ask_again(done: Round) -> None:
        if config.asks_after_rounds():
            drafts = [[*draft, answer.ids] for draft, answer in zip(expected, before, strict=True)]
            texts = [answer.text for answer in answers(drafts)]
            done.details.update(score(asked, texts, base=[answer.text for answer in before]))
        after_round(done)

    shown = spread(problem.rows, PROOF_EDITS)

    def loss() -> float:
        return mean_loss(model, shown)

    subspaces = _subspaces(problem, config)  # what cannot be cut is said before anything is asked
    began = time.monotonic()
    expected = expected_drafts(prompter, asked, "no_context")
    unknown = [q.kind != "locality" for q in asked]  # to the model as it is: targets would be tried in vain
    base = tensor_fingerprints(StoredTensors(model, dtype))
    with _restoring(matrices) as originals:
        before = answers([[] if new else draft for new, draft in zip(unknown, expected, strict=True)])
        with float32_masters(matrices):
            loss_before = loss()
            give_back()
            rounds, seconds = _run(module.edit(problem, config), matrices, ask_again)
            # what is measured of the change waits in main memory: the model is asked meanwhile
            change = {m.name: (m.weight - originals[m.name].float()).cpu() for m in matrices}
            loss_after = loss()
            notes = check_edited(change, loss_before, loss_after, must_fall=config.lowers_loss)
            unrounded = answers([[*draft, answer.ids] for draft, answer in zip(expected, before, strict=True)])
            rounding = round_to(matrices, originals, dtype)
        delta = {m.name: (m.weight.float() - originals[m.name].float()).cpu() for m in matrices}
        pairs = {m.name: (m.as_weight(originals[m.name]).to(dtype), m.parameter.data.to(dtype)) for m in matrices}
        patch = Patch.of_changes(pairs, base, {})
        same = dtype == model.dtype == torch.float32  # nothing was rounded
        after = unrounded if same else answers([[answer.ids] for answer in unrounded])
        drift = drift_from(originals, model, matrices, held_out.batches, progress) if held_out else None

    answered = [[answer.text for answer in some] for some in (before, unrounded, after)]
    changes = matrix_changes(change, originals, subspaces)
    metrics = {
        "before": score(asked, answered[0]),
        "after": score(asked, answered[2], base=answered[0]),
        "proof_edits": len({question.edit for question in asked}),
        "answers_changed_by_rounding": sum(a != b for a, b in zip(answered[1], answered[2], strict=True)),
        "rounding": asdict(rounding),
        "capability": asdict(drift.means()) if drift else dict.fromkeys(("drift", "loss_base", "loss")),
        "matrices": [asdict(of_matrix) for of_matrix in changes],
        "edit_loss": {"before": loss_before, "after": loss_after},
        "training": _training(rounds),
        "rounds": [{"num_edits": r.num_edits, **r.details} for r in rounds],
        **_budget(rounds, drift, held_out),
        "seconds": {"edit": round(seconds, 2), "proof": round(time.monotonic() - began - seconds, 2)},
    }
    return _Proved(
        delta=delta,
        patch=patch,
        changes=changes,
        before=answered[0],
        after=answered[2],
        metrics=metrics,
        notes=notes,
    )


def _run(
    rounds: Iterator[Round], matrices: Sequence[EditMatrix], after_round: Callable[[Round], None]
) -> tuple[list[Round], float]:
    """The rounds of an editor, and the seconds that they took it."""
    found: list[Round] = []
    seconds, started = 0.0, time.monotonic()
    for done in rounds:
        _settle(matrices)
        seconds += time.monotonic() - started
        found.append(done)
        after_round(done)
        started = time.monotonic()
    return found, seconds + time.monotonic() - started


def _settle(matrices: Sequence[EditMatrix]) -> None:
    """Gives all processes the matrices of the main one, bit for bit.

    Editors that train matrices have them from their owners; other editors have done the same work everywhere, and where
    the processes run on different hardware the results may still differ by rounding.

    Raises:
        EditFailed: They differ by more.
    """
    if ranks.count() == 1:
        return
    with ranks.sharing():
        _settle_together(matrices)


def _settle_together(matrices: Sequence[EditMatrix]) -> None:
    own = [matrix.parameter.data.clone() for matrix in matrices]
    distributed.broadcast_tensors([matrix.parameter.data for matrix in matrices])
    off = max(float((m.parameter.data - w).norm() / w.norm()) for m, w in zip(matrices, own, strict=True))
    if (worst := max(distributed.gather(off))) > SETTLED:
        raise EditFailed(f"the processes of this run have come to different weights (by {worst:.1e}); run it on one")


def _subspaces(problem: EditProblem, config: EditorConfig) -> dict[str, Subspace]:
    """The subspaces that an editor promises to keep to, by matrix name."""
    if problem.curvature is None or not config.needs_curvature():
        return {}
    found = {m.name: config.subspace(problem.curvature, m.name) for m in problem.matrices}
    return {name: subspace for name, subspace in found.items() if subspace is not None}


def check_subjects(config: EditorConfig, edits: EditSet) -> None:
    """Refuses edits without a subject in their prompt, by row number, where the editor needs one.

    Args:
        config: The editor's.
        edits: The edits.

    Raises:
        EditsError: An edit has no subject, or it is not in the prompt exactly once.
    """
    if not config.needs_subject:
        return
    for edit in edits:
        if not edit.subject:
            raise EditsError(f"row {edit.row} has no subject, which this editor needs: give it a field 'subject'")
        if edit.prompt.count(edit.subject) != 1:
            times = edit.prompt.count(edit.subject)
            raise EditsError(
                f"row {edit.row}: the subject '{edit.subject}' is {times} times in the prompt '{edit.prompt}'; this "
                "editor needs it exactly once"
            )


def _as_edit_set(edits: Sequence[Any]) -> EditSet:
    """Edits or dictionaries given in Python as an edit set."""
    if edits and all(isinstance(item, Edit) for item in edits):
        return EditSet.of(edits)
    return edits_from_rows(edits)


def origin(model: Any, model_name: str) -> dict[str, Any]:
    """What was changed, by which versions, on what machine: the beginning of every ``crispedit.json``.

    Args:
        model: As it was before.
        model_name: Recorded; what the model's configuration says when empty.

    Returns:
        ``versions``, ``machine`` and ``model``.
    """
    versions = {
        "crispedit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {
        "versions": versions,
        "machine": f"{platform.machine()}, {model.device.type}",
        "model": {
            "name": model_name or model.config.name_or_path,
            "fingerprint": fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
    }


def _provenance(model: Any, model_name: str, edits: EditSet) -> dict[str, Any]:
    """Where model and edits came from, and on what they met."""
    return {
        **origin(model, model_name),
        "edits": {"source": edits.source, "schema": edits.schema, "sha256": edits.sha256, "count": len(edits)},
        "texts": None,
        "curvature": None,
    }


@dataclass(frozen=True)
class _HeldOut:
    """What drift is measured on: token batches, and the hash of the texts."""

    batches: list[TokenBatch]
    sha256: str


def _held_out(
    model: Any, tokenizer: Any, curvature: Curvature | None, texts: CapabilityTexts | None
) -> _HeldOut | None:
    """The texts that drift is measured on, if there are any."""
    held_out = texts.held_out if texts is not None else curvature.held_out if curvature is not None else ()
    return _HeldOut(text_batches(model, tokenizer, held_out), texts_hash(held_out)) if held_out else None


def _budget(rounds: Sequence[Round], drift: TextSums | None, held_out: _HeldOut | None) -> dict[str, Any]:
    """The certificate of an edit with a budget."""
    spent = rounds[-1].budget
    if spent is None:
        return {}
    assert drift is not None
    assert held_out is not None
    return {"budget": certificate(spent, drift, held_out.sha256)}


def _training(rounds: Sequence[Round]) -> dict[str, Any]:
    """How the rounds went, epoch by epoch."""
    return {
        "epoch_losses": [loss for r in rounds for loss in r.trace.epoch_losses],
        "learning_rates": [rate for r in rounds for rate in r.trace.rates],
        "trials": [asdict(trial) for r in rounds for trial in r.trace.trials],
        "steps": sum(r.trace.steps for r in rounds),
        "stopped_early": rounds[-1].trace.stopped_early,
        "forward": rounds[-1].trace.forward,
    }


@contextmanager
def _restoring(matrices: Sequence[EditMatrix]) -> Iterator[dict[str, Tensor]]:
    """The original weights by name; they are put back if the block raises, Ctrl-C included."""
    originals = {m.name: m.weight.clone() for m in matrices}
    try:
        yield originals
    except BaseException:
        for matrix in matrices:
            matrix.weight.copy_(originals[matrix.name])
        raise
