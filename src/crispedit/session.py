"""Sessions: editing one model in rounds, over months, without keeping earlier edits.

A round is an edit of the model as all rounds before it left it, kept off the curvature of the capabilities and of all
earlier rounds (CrispEdit, arXiv 2602.15823, Algorithm 2). What is kept of it is a patch (:mod:`crispedit.patch`), what
it adds to the curvature, and what was measured; the edits themselves only where that is asked for. The directory
survives a kill at any moment (:mod:`crispedit.store`). Loading the newest model takes its base and one patch, however
many rounds there were: the *head*, which joins the patches of all of them.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from typing import Any

from torch import Tensor

from . import __version__
from .adapter import low_rank, write_adapter
from .artifacts import read_json, write_json
from .capability import Drift
from .checkpoint import RECORD, read_back, write_model
from .curvature import Curvature
from .editing import EditResult, edit, origin
from .editors import configured
from .edits import Edit, EditSet, Locality, spread
from .errors import ArtifactError, ConfigError, ModelError
from .generation import Answer
from .history import HISTORY_WEIGHT, HistoryWeight, with_history
from .merging import merge
from .models import EditMatrix, LoadedModel, context_length, fingerprint, frozen, load_model
from .patch import Patch, StoredTensors, apply_to
from .progress import Progress, log, no_progress
from .proof import drift_from
from .rows import Prompter
from .store import Store
from .texts import text_batches
from .wild import Question, ask, questions, score

BASE_CURVATURE, CURVATURE, PATCH, EDITS = "curvature", "curvature", "patch.safetensors", "edits.json"
ASKED = 256
"""After a round so many questions about all rounds whose edits are at hand are asked, however many rounds there are."""
KINDS = 3
"""Of questions about an edit: its prompt, another wording, what is to stay as it is."""


class Session:
    """A directory of rounds, open; made by :meth:`create`, opened by :meth:`reading` or :meth:`writing`.

    Args:
        store: The directory.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.about = store.about
        self.rounds = store.rounds()

    @classmethod
    def create(
        cls,
        directory: Path,
        loaded: LoadedModel,
        curvature: Curvature | None,
        *,
        editor: str = "crispedit",
        settings: Mapping[str, Any] | None = None,
        layers: Sequence[int] | None = None,
        history_weight: HistoryWeight = HISTORY_WEIGHT,
        seed: int = 0,
        chat: str = "auto",
    ) -> None:
        """Makes a session without rounds.

        Args:
            directory: New or empty.
            loaded: The base model; the session keeps its name and fingerprint, and no copy.
            curvature: Of its capability loss, for editors that need one; copied into the session.
            editor: ``EDITOR`` or ``EDITOR:PRESET``, of all rounds.
            settings: Of the editor; others are as in rounds (``in_rounds`` of its configuration).
            layers: Decoder blocks to edit; the editor's default when omitted.
            history_weight: What earlier rounds weigh in the curvature; see :mod:`crispedit.history`.
            seed: Of everything drawn at random.
            chat: Whether prompts go through the chat template.

        Raises:
            ConfigError: The editor needs a curvature, or other edits to learn from, and there are none.
            ArtifactError: There is something already, or it cannot be written.
        """
        settings = dict(settings or {})
        _, config = configured(editor, settings)
        preset = config.presets.get(editor.partition(":")[2], {})
        settings = {name: value for name, value in config.in_rounds.items() if name not in preset} | settings
        if config.needs_train_edits():
            raise ConfigError(
                f"editor {editor} learns from other edits, and a session has none: let 'crispedit train-mend' do it "
                "first, and give --set network=DIR"
            )
        matrices = config.matrices(loaded.model, layers)
        if config.needs_curvature():
            if curvature is None:
                raise ConfigError(f"editor {editor} needs a curvature: give --curvature or --texts")
            curvature.check_model(loaded.model, matrices, loaded.tokenizer)
        about = {
            "crispedit": __version__,
            "model": loaded.name,
            "fingerprint": fingerprint(loaded.model),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "editor": editor,
            "settings": settings,
            "layers": list(layers) if layers is not None else None,
            "edited_layers": sorted({matrix.layer for matrix in matrices}),
            "seed": seed,
            "chat": chat,
            "curvature": curvature is not None,
            "history_weight": history_weight,
        }

        def fill(building: Path) -> None:
            if curvature is not None:
                replace(curvature).save(building / BASE_CURVATURE)

        Store.create(directory, about, fill)

    @classmethod
    @contextmanager
    def reading(cls, directory: Path) -> Iterator["Session"]:
        """Opens a session for reading, also while another process writes; see :meth:`crispedit.store.Store.reading`."""
        with Store.reading(directory) as store:
            yield cls(store)

    @classmethod
    @contextmanager
    def writing(cls, directory: Path) -> Iterator["Session"]:
        """Opens a session for writing, alone; says what an interrupted command had left; see ``Store.writing``."""
        with Store.writing(directory) as store:
            if store.tidied:
                log.info("an interrupted command had left %s: removed", ", ".join(store.tidied))
            yield cls(store)

    # --- models ------------------------------------------------------------------------------------------------------
    def load(self, number: int | None = None, **options: Any) -> LoadedModel:
        """The model after a round.

        Args:
            number: The round; 0 is the base model, the newest when omitted.
            **options: For :func:`crispedit.models.load_model`; its dtype is that of the session.

        Returns:
            The model, bit for bit as it was then.

        Raises:
            ModelError: The base model is not the one that the session began with.
            ArtifactError: There is no such round, or a file is damaged.
        """
        head = self.head_of(number)
        loaded = load_model(self.about["model"], dtype=self.about["dtype"], **options)
        if fingerprint(loaded.model) != self.about["fingerprint"]:
            raise ModelError(f"the session's model '{self.about['model']}' has other weights now than when it began")
        if head is not None:
            apply_to(loaded.model, head, loaded.stored_dtype)
        return loaded

    def head_of(self, number: int | None = None) -> Patch | None:
        """The one patch from the base model to that after a round; ``None`` for the base model itself."""
        last = len(self.rounds)
        number = last if number is None else number
        if not 0 <= number <= last:
            raise ArtifactError(f"there is no round {number}; the session has {last}")
        if number == 0:
            return None
        try:
            return self._back_from_newest(number)
        except ArtifactError as error:  # a file is damaged; there are two ways, and the other may not need it
            head = reduce(Patch.then, map(self.patch, range(1, number + 1)))
            log.info("%s; the patches of all rounds up to %d were joined instead", error, number)
            return head

    def _back_from_newest(self, number: int) -> Patch:
        path = self.store.head
        assert path is not None
        taken_off = (self.patch(later).reversed() for later in range(len(self.rounds), number, -1))
        return reduce(Patch.then, taken_off, Patch.read(path))

    def patch(self, number: int) -> Patch:
        """The patch of a round."""
        return Patch.read(self.store.path(number, PATCH))

    def curvature(self, number: int | None = None) -> Curvature | None:
        """The curvature of the capabilities and of all rounds up to one, for the model after it."""
        if not self.about["curvature"]:
            return None
        base = self._curvature_at(f"{BASE_CURVATURE}/factors.safetensors")
        return with_history(base, self._curvature_of_rounds(number), self.about["history_weight"])

    def _curvature_of_rounds(self, number: int | None = None) -> Curvature | None:
        """What all rounds up to one have added; ``None`` before the first."""
        number = len(self.rounds) if number is None else number
        return self._curvature_at(self._in_round(number, f"{CURVATURE}/factors.safetensors")) if number else None

    def _in_round(self, number: int, name: str) -> str:
        return self.store.path(number, name).relative_to(self.store.directory).as_posix()

    def _curvature_at(self, name: str) -> Curvature:
        path = self.store.checked(name)
        self.store.checked(f"{Path(name).parent.as_posix()}/curvature.json")
        return Curvature.load(path.parent)

    # --- rounds ------------------------------------------------------------------------------------------------------
    def edit(
        self,
        edits: EditSet,
        *,
        keep_edits: bool = False,
        given: Sequence[EditSet] = (),
        pending: Sequence[Mapping[str, Any]] = (),
        progress: Progress = no_progress,
        **options: Any,
    ) -> EditResult:
        """Makes a round: edits the newest model, and keeps what came of it.

        Args:
            edits: Of the round.
            keep_edits: Whether the edits themselves are kept, so that later rounds can be checked against them and a
                round before them can be taken out.
            given: Edits of earlier rounds that the session has not kept, recognised by their hash; the model is asked
                about them too.
            pending: What is still to be replayed after this round.
            progress: Called during every longer step.
            **options: For :func:`crispedit.models.load_model`.

        Returns:
            The result; its round is in the session.

        Raises:
            EditFailed: Nothing changed or the loss did not fall; the session is as it was.
            ConfigError: Edits were given that are of no round.
        """
        self.check_given(given)
        loaded, curvature = self.load(**options), self.curvature()
        head, number = self.head_of(), len(self.rounds) + 1
        result = edit(
            loaded.model,
            loaded.tokenizer,
            edits,
            curvature=curvature,
            editor=self.about["editor"],
            layers=self.about["layers"],
            seed=self.about["seed"],
            chat=self.about["chat"],
            stored_dtype=loaded.stored_dtype,
            model_name=self.about["model"],
            progress=progress,
            **self.about["settings"],
        )
        _, config = configured(self.about["editor"], self.about["settings"])
        matrices = config.matrices(loaded.model, self.about["layers"])
        joined = head.then(result.patch) if head is not None else result.patch
        base = joined.reversed().applied(StoredTensors(loaded.model, loaded.stored_dtype))
        with self.store.new_round() as building:
            result.patch.write(building / PATCH)
            if keep_edits:
                write_json(building / EDITS, edits_as_json(edits))
            if curvature is not None and config.needs_curvature():
                self._with_round(curvature, result, matrices, edits, number).save(building / CURVATURE)
            record = {
                "number": number,
                "time": time.time(),
                "crispedit": __version__,
                "edits": result.provenance["edits"],
                "kept": keep_edits,
                "settings": result.settings,
                "metrics": result.metrics,
                "drift": self.drift(loaded, matrices, base, self.curvature(0), progress),
                "past": self._past(loaded, progress, given=given, newest=edits),
            }
            path = self.store.head_path()
            joined.write(path)
            self.store.commit(
                building,
                record,
                head=path,
                values={"pending": list(pending)},
                entry=f"round {number}: {len(edits)} edits from {edits.source}, by {self.about['editor']}",
            )
        self.rounds = self.store.rounds()
        return result

    def _with_round(
        self, curvature: Curvature, result: EditResult, matrices: Sequence[EditMatrix], edits: EditSet, number: int
    ) -> Curvature:
        """What all rounds have added, with that of this round's rows at the weights it made (Algorithm 2)."""
        model = result.model
        prompter = Prompter.of(model, result.tokenizer, chat=self.about["chat"], eos=result.settings["eos"])
        rows = [row.ids for row in prompter.rows(edits, context_length(model))]
        with frozen(model):
            own = curvature.of_rows(model, matrices, rows, self.about["seed"] + number)
        before = self._curvature_of_rounds()
        parts = [own] if before is None else [replace(before, model_fingerprint=own.model_fingerprint), own]
        return replace(merge(parts), model_fingerprint=fingerprint(model))  # it is for editing the model as it is now

    @staticmethod
    def drift(
        loaded: LoadedModel,
        matrices: Sequence[EditMatrix],
        base: Mapping[str, Tensor],
        curvature: Curvature | None,
        progress: Progress,
    ) -> dict[str, Any] | None:
        """Drift of a model from the session's base, on the held-out texts.

        Args:
            loaded: The model after a round.
            matrices: Those that are edited.
            base: What some of them were before the first round, by name, as they are stored.
            curvature: Of the base.
            progress: Called after every batch.

        Returns:
            The fields of :class:`crispedit.capability.Drift`, and what the curvature of the base predicts
            (``predicted``); ``None`` without held-out texts.
        """
        if curvature is None or not curvature.held_out:
            return None
        model = loaded.model
        changed = [matrix for matrix in matrices if matrix.name in base]
        originals = {matrix.name: matrix.as_weight(base[matrix.name]) for matrix in changed}
        batches = text_batches(model, loaded.tokenizer, curvature.held_out)
        with frozen(model):
            found: Drift = drift_from(originals, model, changed, batches, progress).means()
        known = {m.name: m.weight.float() - originals[m.name].float() for m in changed if m.name in curvature.factors}
        predicted = curvature.predicted_drift(known) if len(known) == len(changed) else None
        return {**asdict(found), "predicted": predicted}

    def _past(
        self,
        loaded: LoadedModel,
        progress: Progress,
        *,
        number: int | None = None,
        given: Sequence[EditSet] = (),
        newest: EditSet | None = None,
    ) -> dict[str, dict[str, Any]]:
        """By round up to one, what a model says of its edits; some :data:`ASKED` questions in all.

        Of more rounds than that leaves an edit for each, some are asked about: the newest, and others spread over all.
        """
        hashes = {edits.sha256 for edits in given}
        at_hand = [r for r in self.rounds[:number] if r["kept"] or r["edits"]["sha256"] in hashes]
        most = ASKED // KINDS
        sets = [(r["number"], self.edits_of(r, given)) for r in spread(at_hand, most - (newest is not None))]
        sets += [] if newest is None else [(len(self.rounds) + 1, newest)]
        found = {}
        for of_round, edits in sets:
            some = spread(tuple(edits or ()), most // len(sets))
            asked, answers = self._ask(loaded, some, progress)
            found[str(of_round)] = {"asked_edits": len(some), **score(asked, [answer.text for answer in answers])}
        return found

    def _ask(
        self, loaded: LoadedModel, edits: Sequence[Edit], progress: Progress
    ) -> tuple[list[Question], list[Answer]]:
        """What the model says of edits, without a context."""
        chat = self.about["chat"]
        prompter = Prompter.of(loaded.model, loaded.tokenizer, chat=chat, eos=loaded.tokenizer.eos_token_id is not None)
        asked = questions(edits)
        with frozen(loaded.model):
            return asked, ask(loaded.model, prompter, asked, "no_context", progress=progress)

    def check_given(self, given: Sequence[EditSet], number: int | None = None) -> None:
        """Raises :class:`ConfigError` for edits that are of none of the rounds up to one."""
        records = self.rounds[:number]
        hashes = {record["edits"]["sha256"] for record in records}
        for edits in given:
            if edits.sha256 not in hashes:
                raise ConfigError(
                    f"{edits.source} ({len(edits)} edits) is of none of the {len(records)} rounds; see status"
                )

    def kept_edits(self, number: int) -> EditSet:
        """The edits of a round that kept them."""
        return edits_from_json(read_json(self.store.path(number, EDITS)))

    def edits_of(self, record: Mapping[str, Any], given: Sequence[EditSet] = ()) -> EditSet | None:
        """The edits of a round: kept, or among those given again, recognised by their hash; else ``None``."""
        if record["kept"]:
            return self.kept_edits(record["number"])
        return next((edits for edits in given if edits.sha256 == record["edits"]["sha256"]), None)

    # --- taking back -------------------------------------------------------------------------------------------------
    def revert(self, number: int) -> None:
        """Takes back every round after one, and its curvature with it.

        Args:
            number: The last round that stays; 0 for the base model.

        Raises:
            ArtifactError: There is no such round, or a file is damaged.
        """
        head = self.head_of(number)
        path = None
        if head is not None:
            path = self.store.head_path()
            head.write(path)
        gone = len(self.rounds) - number
        self.store.rewind(
            number, head=path, values={"pending": []}, entry=f"reverted to round {number}: {gone} rounds taken back"
        )
        self.rounds = self.store.rounds()

    def remove(
        self, number: int, given: Sequence[EditSet] = (), *, progress: Progress = no_progress, **options: Any
    ) -> int:
        """Takes a round out of the middle, and makes the later ones again without it.

        Args:
            number: Of the round.
            given: Edits of later rounds that the session has not kept, recognised by their hash.
            progress: Called during every longer step.
            **options: For :func:`crispedit.models.load_model`.

        Returns:
            How many rounds were made again.

        Raises:
            ArtifactError: There is no such round, or the edits of a later one are not at hand; nothing has changed.
        """
        last = len(self.rounds)
        if not 1 <= number <= last:
            raise ArtifactError(f"there is no round {number}; the session has {last}")
        pending = []
        for record in self.rounds[number:]:
            edits = self.edits_of(record, given)
            if edits is None:
                raise ArtifactError(
                    f"round {record['number']} has to be made again, and its edits were not kept: give the file "
                    f"({record['edits']['source']}, {record['edits']['count']} edits)"
                )
            pending.append({"edits": edits_as_json(edits), "keep": record["kept"]})
        head = self.head_of(number - 1)
        path = None
        if head is not None:
            path = self.store.head_path()
            head.write(path)
        self.store.rewind(
            number - 1,
            head=path,
            values={"pending": pending},
            entry=f"round {number} taken out; {len(pending)} later rounds are to be made again",
        )
        self.rounds = self.store.rounds()
        return self.go_on(progress=progress, **options)

    @property
    def pending(self) -> list[dict[str, Any]]:
        """Rounds that are still to be made again, after one before them was taken out."""
        return list(self.store.value("pending", []))

    def go_on(self, *, progress: Progress = no_progress, **options: Any) -> int:
        """Makes the rounds again that are :attr:`pending`.

        Args:
            progress: Called during every longer step.
            **options: For :func:`crispedit.models.load_model`.

        Returns:
            How many.
        """
        todo = self.pending
        for number, one in enumerate(todo):
            self.edit(
                edits_from_json(one["edits"]),
                keep_edits=one["keep"],
                pending=todo[number + 1 :],
                progress=progress,
                **options,
            )
        return len(todo)

    # --- away from here ----------------------------------------------------------------------------------------------
    def write_merged(self, building: Path, number: int | None = None, **options: Any) -> None:
        """Writes the model after a round as a Hugging Face directory, reads it back and compares every tensor.

        Its ``crispedit.json`` names the base and the patches of all rounds.

        Args:
            building: Where its files go.
            number: The round; the newest when omitted.
            **options: For :func:`crispedit.models.load_model`.
        """
        head, loaded = self.head_of(number), self.load(0, **options)
        record = {"command": "session export", **origin(loaded.model, self.about["model"]), "patches": []}
        if head is not None:
            record["patches"] = head.about.get("stacked", [head.about])
            apply_to(loaded.model, head, loaded.stored_dtype)
        write_model(loaded.model, loaded.tokenizer, building, loaded.stored_dtype)
        read_back(loaded.model, building, loaded.stored_dtype)
        write_json(building / RECORD, record)

    def write_adapter(
        self,
        building: Path,
        number: int | None = None,
        *,
        rank: int | None = None,
        energy: float | None = None,
        progress: Progress = no_progress,
        **options: Any,
    ) -> dict[str, Any]:
        """Writes what all rounds changed as a LoRA adapter of the base model, and measures what that loses.

        Args:
            building: Where its files go.
            number: After this round; the newest when omitted.
            rank: Of every matrix, at most; or
            energy: the share of every ‖ΔW‖² that the adapter must hold.
            progress: Called while the model is asked.
            **options: For :func:`crispedit.models.load_model`.

        Returns:
            ``ranks`` and ``energy`` by matrix; ``exact`` and ``adapter``, each with ``past`` and ``drift``.

        Raises:
            ArtifactError: There is no round whose change could be written.
        """
        head = self.head_of(number)
        if head is None or not head.changes:
            raise ArtifactError("the base model itself needs no adapter; name a round")
        loaded, curvature = self.load(number, **options), self.curvature(0)
        _, config = configured(self.about["editor"], self.about["settings"])
        chosen = config.matrices(loaded.model, self.about["layers"])
        matrices = [matrix for matrix in chosen if matrix.name in head.changes]
        before = head.reversed().applied(StoredTensors(loaded.model, loaded.stored_dtype))

        def measured() -> dict[str, Any]:
            return {
                "past": self._past(loaded, progress, number=number),
                "drift": self.drift(loaded, matrices, before, curvature, progress),
            }

        exact, products = measured(), {}
        for matrix in matrices:
            original = matrix.as_weight(before[matrix.name]).float()
            products[matrix.name] = product = low_rank(matrix.weight.float() - original, rank=rank, energy=energy)
            stored = [factor.to(loaded.stored_dtype).float() for factor in (product.B, product.A)]
            matrix.weight.copy_(original + stored[0] @ stored[1])
        write_adapter(products, matrices, self.about["model"], building, loaded.stored_dtype)
        return {
            "ranks": {name: product.rank for name, product in products.items()},
            "energy": {name: product.energy for name, product in products.items()},
            "exact": exact,
            "adapter": measured(),
        }


def edits_as_json(edits: EditSet) -> dict[str, Any]:
    """An edit set as JSON, for :func:`edits_from_json`."""
    return {
        "schema": edits.schema,
        "source": edits.source,
        "sha256": edits.sha256,
        "edits": [asdict(one) for one in edits],
    }


def edits_from_json(value: Mapping[str, Any]) -> EditSet:
    """The edit set that :func:`edits_as_json` wrote.

    Args:
        value: The JSON.

    Returns:
        The edits, with the hash they had.

    Raises:
        ArtifactError: They are others than those that were written.
    """
    found = EditSet.of(
        (
            Edit(
                **{
                    **one,
                    "rephrases": tuple(one["rephrases"]),
                    "locality": tuple(Locality(**near) for near in one["locality"]),
                    "turns": tuple((role, content) for role, content in one["turns"]),
                }
            )
            for one in value["edits"]
        ),
        schema=value["schema"],
        source=value["source"],
    )
    if found.sha256 != value["sha256"]:
        raise ArtifactError(f"the kept edits of {value['source']} are damaged: their hash is another")
    return found
