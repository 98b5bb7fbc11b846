"""What the commands do, from names and paths to results: the layer between command line and library."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from . import __version__, cache, distributed, ranks
from .artifacts import read_json
from .bundled import corpus, world
from .certificate import measured, texts_hash
from .checkpoint import load_edited, read_record
from .curvature import Curvature, affordable_kind
from .editing import EditResult, check_subjects
from .editing import edit as edit_model
from .editors import configured
from .editors._gradient import GradientConfig, RuledConfig
from .editors._meta import lessons, train_in_directory
from .editors.base import EditorConfig
from .editors.mend import Config as MendConfig
from .edits import Edit, EditSet, edits_from_rows, load_edits
from .errors import ArtifactError, ConfigError, TextsError
from .evaluation import (
    Evaluation,
    answers_of_base,
    check_protocol,
    evaluate_live,
    measure,
    measure_both,
    needs_base_answers,
)
from .frontier import frontier, put_back
from .harness_job import HarnessJob
from .judge import Judge
from .live import LiveModel
from .models import (
    BUNDLED,
    EditMatrix,
    LoadedModel,
    context_length,
    find_device,
    fingerprint,
    frozen,
    load_model,
    parse_layers,
    tokenizer_hash,
)
from .precision import float32_masters
from .progress import Progress, log, no_progress
from .rows import Chat, Prompter
from .sharding import check_shard, shard_model
from .texts import CapabilityTexts, load_texts, split_texts

BUNDLED_EDITS = "bundled:"


def read_edits(name: str, *, limit: int | None = None, conflicts: str = "error") -> EditSet:
    """Edits from a file, or a split of the bundled world's (``bundled:demo``, ``:eval``, ``:train``).

    Args:
        name: Path, or ``bundled:SPLIT``.
        limit: The first N rows.
        conflicts: What to do with one prompt and several targets.

    Returns:
        The edits.

    Raises:
        ConfigError: There is no such split.
    """
    options: dict[str, Any] = {"limit": limit, "conflicts": conflicts}
    if not name.startswith(BUNDLED_EDITS):
        return load_edits(name, **options)
    split = name.removeprefix(BUNDLED_EDITS)
    if split not in world.SPLIT_SIZES:
        raise ConfigError(f"there are no bundled edits '{split}'; there are {', '.join(world.SPLIT_SIZES)}")
    return edits_from_rows(world.edit_rows(split), source=name, **options)


def has_tasks(model: Any) -> bool:
    """Whether :mod:`crispedit.bundled.train` has made a model, edited or not: the tasks were made for those."""
    return hasattr(model.config, "crispedit_world")


def capability_texts(model: str, path: Path | None, samples: int | None, seed: int) -> CapabilityTexts | None:
    """The capability texts of a file, else the bundled ones for the bundled model, else none.

    Args:
        model: The model's name.
        path: A file of texts.
        samples: How many to use.
        seed: Of drawing and division.

    Returns:
        The texts, divided.
    """
    if path is not None:
        return split_texts(load_texts(path), source=str(path), samples=samples, seed=seed)
    if model == BUNDLED:
        return split_texts(corpus.capability_texts(), source=BUNDLED, samples=samples, seed=seed)
    return None


def check_same(
    loaded: LoadedModel,
    edits: EditSet | None = None,
    texts: CapabilityTexts | Sequence[str] | None = None,
    curvature: Curvature | None = None,
    settings: Any = None,
) -> None:
    """Refuses processes that were not given the same: two hosts may have other files under one name.

    Args:
        loaded: The model.
        edits: The edits.
        texts: The texts, divided or not.
        curvature: A curvature that was read.
        settings: What else the result depends on.

    Raises:
        ConfigError: Something differs; what, and on which host.
    """
    if ranks.size() == 1:
        return
    config = {k: v for k, v in loaded.model.config.to_dict().items() if k != "_name_or_path"}
    divided = texts if texts is None or isinstance(texts, CapabilityTexts) else list(texts)
    distributed.check_equal(
        {
            "the versions": f"{__version__} {torch.__version__} {transformers.__version__}",
            "the model's configurations": _hash(config),
            "the model's weights": fingerprint(loaded.model),
            "the tokenizers": tokenizer_hash(loaded.tokenizer),
            "the edits": edits.sha256 if edits is not None else "",
            "the texts": divided.sha256 if isinstance(divided, CapabilityTexts) else _hash(divided),
            "the curvatures": _hash(curvature.manifest() if curvature is not None else None),
            "the settings": _hash(settings),
        }
    )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class EditJob:
    """One ``crispedit edit``: what the command line says, before anything is loaded."""

    model: str
    edits: str
    editor: str = "crispedit"
    curvature: Path | None = None
    texts: Path | None = None
    samples: int | None = None
    layers: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    seed: int = 0
    chat: str = "auto"
    conflicts: str = "error"
    train_edits: str | None = None
    expected_edits: str | None = None

    @classmethod
    def from_record(
        cls, path: Path, *, model: str | None, edits: str | None, curvature: Path | None, texts: Path | None
    ) -> "EditJob":
        """The job that a ``crispedit.json`` records.

        Args:
            path: The record, or the directory it is in.
            model: In place of the recorded model.
            edits: In place of the recorded file of edits, with the same content.
            curvature: In place of the recorded curvature.
            texts: In place of the recorded texts.

        Returns:
            The job.

        Raises:
            ArtifactError: It is no such record.
        """
        record = read_json(path / "crispedit.json" if path.is_dir() else path)
        if isinstance(record, dict) and "patches" in record:
            raise ArtifactError(f"'{path}' was made by 'crispedit {record.get('command')}': there is no edit to repeat")
        try:
            job, settings = record["job"], dict(record["settings"])
            settings.pop("layers")  # those that were edited; an editor's default may be no list for all its matrices
            return cls(
                model=model or record["model"]["name"],
                edits=edits or job["edits"],
                editor=settings.pop("editor"),
                curvature=curvature or (Path(job["curvature"]) if job["curvature"] and not texts else None),
                texts=texts or (Path(job["texts"]) if job["texts"] else None),
                samples=job["samples"],
                layers=job["layers"],
                seed=settings.pop("seed"),
                chat=settings.pop("chat"),
                settings=settings,
                limit=job["limit"],
                conflicts=job["conflicts"],
                train_edits=job["train_edits"],
                expected_edits=record["edits"]["sha256"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"'{path}' is not a record of a crispedit edit: it has no {error}") from error

    def run(
        self,
        *,
        device: str = "auto",
        dtype: str = "auto",
        device_map: str | None = None,
        offload: str | None = None,
        shard: bool = False,
        trust_remote_code: bool = False,
        progress: Progress = no_progress,
    ) -> EditResult:
        """Loads everything, cheapest check first, and edits.

        Args:
            device: As in :func:`crispedit.models.load_model`, like the next three.
            dtype: See there.
            device_map: See there.
            offload: Where blocks below the first edited one wait; see there.
            shard: Whether the model is divided among the processes (:mod:`crispedit.sharding`).
            trust_remote_code: See there.
            progress: Called during every longer step.

        Returns:
            The result, not yet saved.

        Raises:
            ArtifactError: A recorded run has other edits now.
            ConfigError: The editor cannot work on a sharded model.
            TextsError: Capability texts are needed, and there are none.
        """
        _, config = configured(self.editor, self.settings)
        check_shard(shard)
        if shard and not isinstance(config, RuledConfig):
            raise ConfigError(
                f"editor {self.editor} needs a whole model; with --shard there are those that train matrices"
            )
        layers = parse_layers(self.layers) if self.layers is not None else None
        edit_set = read_edits(self.edits, limit=self.limit, conflicts=self.conflicts)
        check_subjects(config, edit_set)
        train_edits = self._train_edits(config)
        if self.expected_edits not in (None, edit_set.sha256):
            raise ArtifactError(f"'{self.edits}' has other edits than the recorded run; give the file it was made from")
        texts = capability_texts(self.model, self.texts, self.samples, self.seed)
        found = Curvature.load(self.curvature) if self.curvature is not None else None
        named = layers if layers is not None or found is None else found.layers

        def edited(model: Any) -> Sequence[EditMatrix]:
            return config.matrices(model, named)

        loaded = load_model(
            self.model,
            device=device,
            dtype=dtype,
            device_map=device_map,
            offload=offload,
            edited=edited,
            shard=shard,
            trust_remote_code=trust_remote_code,
        )
        model, tokenizer = loaded.model, loaded.tokenizer
        if shard:
            shard_model(model, edited(model), find_device(device))
        check_same(loaded, edit_set, texts, found, self)
        # what is wrong with the rows is said before minutes go into a curvature
        Prompter.of(model, tokenizer, chat=self.chat, eos=config.eos).rows(edit_set, context_length(model))  # type: ignore[arg-type]
        if found is None and config.needs_curvature():
            found, _ = self._cached_curvature(model, tokenizer, config.matrices(model, layers), texts, progress)
        options: dict[str, Any] = {
            "curvature": found,
            "texts": texts if self.curvature is None else None,
            "layers": layers,
            "seed": self.seed,
            "chat": self.chat,  # checked by Prompter, with a better message
            "train_edits": train_edits,
            "stored_dtype": loaded.stored_dtype,
            "model_name": self.model,
            "progress": progress,
        }
        reference = None
        if config.asks_after_rounds():
            # what plain fine-tuning comes to is a point beside a frontier's
            alike = {name: value for name, value in self.settings.items() if name in GradientConfig.model_fields}
            with put_back(config.matrices(model, layers)):
                reference = edit_model(model, tokenizer, edit_set, **options, editor="ft", **alike).metrics
        result = edit_model(model, tokenizer, edit_set, **options, editor=self.editor, **self.settings)
        if reference is not None:
            result.metrics["frontier"] = frontier(result.metrics["rounds"], reference)
        result.provenance["job"] = {
            "edits": self.edits,
            "limit": self.limit,
            "conflicts": self.conflicts,
            "layers": self.layers,
            "train_edits": self.train_edits,
            "curvature": self.curvature and str(self.curvature),
            "texts": self.texts and str(self.texts),
            "samples": self.samples,
        }
        return result

    def _train_edits(self, config: EditorConfig) -> tuple[Edit, ...]:
        """Other edits to learn from: those of a file, else the rows beyond the limit, where the editor needs any."""
        if self.train_edits is not None:
            return tuple(read_edits(self.train_edits, conflicts="first"))
        if not config.needs_train_edits():
            return ()
        found = () if self.limit is None else read_edits(self.edits, conflicts="first")
        beyond = tuple(edit for edit in found if edit.row > (self.limit or 0))
        if not beyond:
            raise ConfigError(
                f"editor {self.editor} learns from other edits: give --train-edits FILE, or --limit N, so that the "
                "rows beyond it are left to learn from"
            )
        log.info("no --train-edits: %s learns from the %d rows beyond --limit", self.editor, len(beyond))
        return beyond

    def _cached_curvature(
        self,
        model: Any,
        tokenizer: Any,
        matrices: Sequence[EditMatrix],
        texts: CapabilityTexts | None,
        progress: Progress,
    ) -> tuple[Curvature, bool]:
        """The curvature of these texts, and whether it was in the cache; without texts, any that fits."""
        chosen = tuple(matrix.layer for matrix in matrices)
        identity = (fingerprint(model), chosen, tokenizer_hash(tokenizer))
        wanted: dict[str, Any] = {}
        if texts is not None:
            wanted = {
                "texts_sha256": texts.sha256,
                "fisher": "mc",
                "factors": distributed.from_main(lambda: affordable_kind(matrices)),
                "dtype": str(model.dtype).removeprefix("torch."),
                "seed": self.seed,
            }
        # others may have no such cache, and would wait for one that does
        found = Curvature.of_main(distributed.on_main(lambda: cache.find(*identity, **wanted)))
        if found is not None:
            log.info(
                "curvature found in the cache: %s (%s tokens of %s, %s factors)", found.path, f"{found.num_tokens:,}",
                found.texts["source"],
                found.kind,
            )  # fmt: skip
            return found, True
        if texts is None:
            raise TextsError(
                f"no capability texts for '{self.model}' and no cached curvature of layers "
                f"{', '.join(map(str, chosen))}: give --texts FILE or --curvature DIR"
            )
        found = Curvature.estimate(
            model,
            tokenizer,
            texts,
            layers=chosen,
            seed=self.seed,
            model_name=self.model,
            resume=cache.passes_directory(),
            progress=progress,
        )
        cache.keep(found)
        return found, False

    def curvature_in_cache(self, *, progress: Progress = no_progress, **options: Any) -> tuple[Curvature, bool]:
        """The curvature that the edit will need, estimated and kept if it is not in the cache yet.

        Args:
            progress: Called during the pass.
            **options: For :func:`crispedit.models.load_model`.

        Returns:
            The curvature, and whether it was there already.
        """
        _, config = configured(self.editor, self.settings)
        layers = parse_layers(self.layers) if self.layers is not None else None
        texts = capability_texts(self.model, self.texts, self.samples, self.seed)
        loaded = load_model(self.model, **options)
        matrices = config.matrices(loaded.model, layers)
        return self._cached_curvature(loaded.model, loaded.tokenizer, matrices, texts, progress)


def train_mend_job(
    model: str,
    train_edits: str,
    out: Path,
    *,
    settings: dict[str, Any],
    layers: str | None = None,
    texts: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat: str = "auto",
    conflicts: str = "error",
    overwrite: bool = False,
    options: dict[str, Any] | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """``crispedit train-mend``: trains the hypernetwork of editor mend, or goes on with a training.

    Args:
        model: That will be edited.
        train_edits: Path or bundled split; not the edits to be made.
        out: Directory for the network.
        settings: Of the editor.
        layers: Decoder blocks to edit.
        texts: Capability texts, for train edits without locality prompts.
        limit: The first N edits.
        seed: Of everything drawn at random.
        chat: Whether prompts go through the chat template.
        conflicts: What to do with one prompt and several targets.
        overwrite: Whether another training in the directory is replaced.
        options: For :func:`crispedit.models.load_model`.
        progress: Called after every step.

    Returns:
        The record of the training.

    Raises:
        ConfigError: The settings name a network.
    """
    config = MendConfig.of(settings)
    if config.network is not None:
        raise ConfigError("train-mend makes a network; leave --set network out")
    chosen = parse_layers(layers) if layers is not None else None
    edit_set = read_edits(train_edits, limit=limit, conflicts=conflicts)
    divided = capability_texts(model, texts, None, seed)
    loaded = load_model(model, **(options or {}))
    matrices = config.matrices(loaded.model, chosen)
    prompter = Prompter.of(loaded.model, loaded.tokenizer, chat=chat, eos=config.eos)  # type: ignore[arg-type]
    about = {
        "model": model,
        "train_edits": {"source": edit_set.source, "sha256": edit_set.sha256, "count": len(edit_set)},
        "texts": divided.manifest() if divided is not None else None,
        "tokenizer": tokenizer_hash(loaded.tokenizer),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "chat": chat,
        "eos": config.eos,
    }
    with frozen(loaded.model), float32_masters(matrices):
        return train_in_directory(
            out,
            loaded.model,
            matrices,
            lessons(loaded.model, prompter, edit_set, divided, seed),
            config.meta(matrices, seed),
            about,
            overwrite=overwrite,
            progress=progress,
        )


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

    def budget(self) -> dict[str, Any] | None:
        """The recorded budget against the drift that was measured now; ``None`` where there is none, or no base.

        Returns:
            What :func:`crispedit.certificate.measured` says, with ``recorded``, the certificate of the edit itself,
            and ``same_texts``, whether both are of the same texts.
        """
        recorded = ((self.record or {}).get("metrics") or {}).get("budget")
        if recorded is None or self.after.texts is None or not self.after.has_base:
            return None
        assert self.texts_sha256 is not None
        kept = {name: recorded[name] for name in ("drift", "low", "high", "met", "texts_sha256")}
        found = measured(recorded["budget"], self.after.texts, self.texts_sha256)
        return {**found, "recorded": kept, "same_texts": self.texts_sha256 == recorded["texts_sha256"]}

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
    if base_model is not None:
        distributed.check_equal({"the base model's weights": fingerprint(base_model)})
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
        benchmarks = distributed.on_main(
            work
        )  # lm-evaluation-harness has its own way to share work, and its own launcher
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
