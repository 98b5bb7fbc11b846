"""``crispedit edit``, from names and paths to a result."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import cache, distributed
from .artifacts import read_json
from .curvature import Curvature, affordable_kind
from .editing import EditResult, check_subjects
from .editing import edit as edit_model
from .editors import configured
from .editors._gradient import GradientConfig, RuledConfig
from .editors.base import EditorConfig
from .edits import Edit
from .errors import ArtifactError, ConfigError, TextsError
from .frontier import frontier, put_back
from .inputs import capability_texts, check_same, read_edits
from .models import EditMatrix, context_length, find_device, fingerprint, load_model, parse_layers, tokenizer_hash
from .progress import Progress, log, no_progress
from .rows import Prompter
from .sharding import check_shard, shard_model
from .texts import CapabilityTexts


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
