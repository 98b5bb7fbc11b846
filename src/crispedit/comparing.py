"""``crispedit compare``: editors side by side, from the same base, on the same questions.

Every row, the base model first, runs in a process of its own (:mod:`crispedit.isolated`) and is kept in
``DIR/rows/KEY.json`` once it is finished; KEY is a hash of all that the row depends on, so that the same command again
runs only what is missing. Rows of other commands in the same directory are shown with those of this one: they are of
the same model, edits, texts and protocol, or the directory is refused.

Curvatures are estimated before the rows that need them, once per set of layers and in a process of their own as well,
and come to the rows through the cache: no row's memory or time depends on which came first.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import __version__
from .artifacts import check_writable, read_json, write_json, write_text
from .comparison_row import measure_row, prepare_curvature
from .editors import configured, editor_names
from .editors.base import EditorConfig
from .edits import EditSet
from .errors import (
    ArtifactError,
    ConfigError,
    CrispEditError,
    EditFailed,
    Interrupted,
    TextsError,
    did_you_mean,
)
from .inputs import capability_texts, read_edits
from .isolated import Work, run_isolated
from .judge import find_judge
from .models import (
    BUNDLED,
    context_length,
    find_device,
    load_skeleton,
    model_directory,
    parse_layers,
)
from .progress import Progress, log, no_progress
from .rows import Prompter
from .scatter import draw_comparison
from .texts import CapabilityTexts
from .tradeoff import BASE, Comparison, Row

ABOUT, ROWS, TABLE, RESULTS, PLOT = "comparison.json", "rows", "table.md", "results.json", "tradeoff.png"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A row that is to be in the table.

    Args:
        editor: ``EDITOR``, ``EDITOR:PRESET`` or ``base``.
        settings: Those that the user gave.
        layers: As the user gave them.
        config: The editor's, validated; ``None`` for the base model.
        blocks: The decoder blocks that are edited.
        key: Of everything that the row depends on.
        reason: Why it cannot run, if that is known already.
    """

    editor: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    layers: str | None = None
    config: EditorConfig | None = None
    blocks: tuple[int, ...] = ()
    key: str = ""
    reason: str = ""

    @property
    def given(self) -> dict[str, Any]:
        """What the user set, layers included."""
        return {**self.settings, **({"layers": self.layers} if self.layers is not None else {})}


@dataclass(frozen=True, kw_only=True)
class CompareJob:
    """One ``crispedit compare``: what the command line says.

    Args:
        model: Of all rows.
        edits: Of all rows.
        editors: Names with commas between them, each ``EDITOR`` or ``EDITOR:PRESET``, or ``all``.
        out: The directory of the comparison.
        sweeps: ``NAME=VALUE,VALUE,…`` each; of editors that have the setting there is a row per value.
        settings: For all editors that have them.
        layers: Decoder blocks to edit.
        texts: File of capability texts.
        samples: How many of them.
        limit: The first N edits.
        seed: Of everything drawn at random.
        chat: Whether prompts go through the chat template.
        conflicts: What to do with one prompt and several targets.
        train_edits: Other edits, for editors that learn how to edit.
        judge: ``exact`` or ``contains``.
        device: As in :func:`crispedit.models.load_model`, like the next two.
        dtype: See there.
        trust_remote_code: See there.
    """

    model: str
    edits: str
    editors: str
    out: Path
    sweeps: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    layers: str | None = None
    texts: Path | None = None
    samples: int | None = None
    limit: int | None = None
    seed: int = 0
    chat: str = "auto"
    conflicts: str = "error"
    train_edits: str | None = None
    judge: str = "exact"
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False

    def run(self, *, work: Work | None = None, progress: Progress = no_progress) -> Comparison:
        """Runs what is missing, and compares all rows of the directory.

        Args:
            work: Makes a row in its process; :func:`measure_row` when omitted.
            progress: Called during every longer step.

        Returns:
            The comparison; nothing of it is written but the rows.

        Raises:
            Interrupted: By Ctrl-C; finished rows are kept.
            EditFailed: The base model could not be evaluated.
        """
        shared, planned = self.plan()
        runner = _Runner(self, shared, work or measure_row, progress)
        try:
            rows = runner.run(planned)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; {runner.finished} of {len(planned)} rows are finished and kept in {self.out}; the same "
                "command goes on from there"
            ) from None
        return Comparison.of([*rows, *_others(self.out, {row.key for row in planned})], shared)

    def plan(self) -> tuple[dict[str, Any], list[Planned]]:
        """Checks everything that can be checked before a weight is loaded.

        Returns:
            What all rows have in common, and the rows, the base model first.

        Raises:
            ArtifactError: The directory holds another comparison, or something else.
            ConfigError: No row could run.
            TextsError: There are no capability texts.
        """
        chosen = [
            Planned(editor=name, settings=settings, layers=layers, config=configured(name, dict(settings))[1])
            for name, settings, layers in self._settings_by_row()
        ]
        find_judge(self.judge)
        edit_set = read_edits(self.edits, limit=self.limit, conflicts=self.conflicts)
        train = read_edits(self.train_edits, conflicts="first").sha256 if self.train_edits is not None else None
        texts = capability_texts(self.model, self.texts, self.samples, self.seed)
        if texts is None:
            raise TextsError("without capability texts nothing can be said of what is kept: give --texts FILE")
        skeleton = load_skeleton(
            self.model, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
        eos = bool(self.settings.get("eos", True))
        prompter = Prompter.of(skeleton.model, skeleton.tokenizer, chat=self.chat, eos=eos)  # type: ignore[arg-type]
        prompter.rows(edit_set, context_length(skeleton.model))
        shared = self._shared(edit_set, texts, str(skeleton.model.dtype).removeprefix("torch."))
        _check_directory(self.out, shared)
        rows = [_with_blocks(row, skeleton.model) for row in chosen]
        if all(row.reason for row in rows):
            raise ConfigError(rows[0].reason)
        return shared, [replace(row, key=_key(shared, row, train)) for row in (Planned(editor=BASE), *rows)]

    def _settings_by_row(self) -> Iterator[tuple[str, dict[str, Any], str | None]]:
        """Editor, settings and layers of every row, in the order of the command line."""
        names = [name.strip() for name in self.editors.split(",") if name.strip()]
        if names == ["all"]:
            names = list(editor_names())
        if not names:
            raise ConfigError("no editors are named: give --editors a,b,c, or all; see 'crispedit editors'")
        configs = {name: configured(name, {})[1] for name in dict.fromkeys(names)}
        known = set().union(*(type(config).model_fields for config in configs.values()))
        sweeps = _parse_sweeps(self.sweeps)
        if "layers" in self.settings:
            raise ConfigError("layers are no setting; give --layers, or --sweep layers=…")
        for name in (*self.settings, *(sweeps.keys() - {"layers"})):
            if name not in known:
                raise ConfigError(f"none of these editors has a setting '{name}'{did_you_mean(name, known)}")
        for name in sweeps:
            if name in self.settings or (name == "layers" and self.layers is not None):
                raise ConfigError(f"{name} is given twice: swept, and as one value")
        for editor, config in configs.items():
            fields = type(config).model_fields
            own = {name: value for name, value in self.settings.items() if name in fields}
            axes = {name: values for name, values in sweeps.items() if name in fields or name == "layers"}
            for values in itertools.product(*axes.values()):
                swept = dict(zip(axes, values, strict=True))
                layers = swept.pop("layers", self.layers)
                yield editor, {**own, **swept}, layers

    def _shared(self, edits: EditSet, texts: CapabilityTexts, dtype: str) -> dict[str, Any]:
        """What all rows of a directory have in common; JSON-ready."""
        return {
            "model": self.model,
            "files": _files(self.model),
            "edits": {"source": self.edits, "sha256": edits.sha256, "count": len(edits)},
            "texts": texts.manifest(),
            "judge": self.judge,
            "chat": self.chat,
            "dtype": dtype,
            "device": find_device(self.device).type,
            "seed": self.seed,
        }

    def task(self, row: Planned) -> dict[str, Any]:
        """What a row's process is given."""
        return {
            "job": {
                "model": self.model,
                "edits": self.edits,
                "editor": row.editor,
                "texts": self.texts,
                "samples": self.samples,
                "layers": row.layers,
                "settings": dict(row.settings),
                "limit": self.limit,
                "seed": self.seed,
                "chat": self.chat,
                "conflicts": self.conflicts,
                "train_edits": self.train_edits,
            },
            "judge": self.judge,
            "options": {
                "device": self.device,
                "dtype": self.dtype,
                "trust_remote_code": self.trust_remote_code,
            },
        }


class _Runner:
    """Runs the rows of a job one after the other, and keeps those that are finished."""

    def __init__(self, job: CompareJob, shared: dict[str, Any], work: Work, progress: Progress) -> None:
        self.job, self.shared, self.work, self.progress = job, shared, work, progress
        self.finished = 0
        self.curvatures: dict[tuple[int, ...], dict[str, Any]] = {}
        self.known: dict[tuple[int, ...], dict[str, Any]] = {}

    def run(self, planned: Sequence[Planned]) -> list[Row]:
        """All rows, finished before or now, or failed."""
        directory = self.job.out / ROWS
        directory.mkdir(parents=True, exist_ok=True)
        write_json(self.job.out / ABOUT, {"crispedit": __version__, **self.shared})
        kept = [_read_row(directory / f"{row.key}.json") for row in planned]
        self.finished = sum(record is not None for record in kept)
        for record in kept:
            if record is not None and record["curvature"]["memory"] is not None and not record["curvature"]["cached"]:
                self.known[tuple(record["blocks"])] = record["curvature"]
        if self.finished:
            log.info("%d of %d rows are finished already", self.finished, len(planned))
        rows: list[Row] = []
        base: dict[str, Any] = {}
        for number, (row, record) in enumerate(zip(planned, kept, strict=True)):
            self.progress("rows", number, len(planned))
            name = Row(editor=row.editor, given=row.given, record={}).full_name
            self.progress(name, 0, 1)
            found = record or self._row(row, base)
            self.progress(name, 1, 1)
            base = base or found
            rows.append(Row(editor=row.editor, given=row.given, record=found))
            if row.editor == BASE and "reason" in found:
                raise EditFailed(f"the base model could not be evaluated: {found['reason']}")
        self.progress("rows", len(planned), len(planned))
        return rows

    def _row(self, row: Planned, base: dict[str, Any]) -> dict[str, Any]:
        """A row's record, or why there is none."""
        if row.reason:
            return self._failed(row, row.reason)
        task = self.job.task(row) | {"fingerprint": base.get("fingerprint"), "base_answers": base.get("answers")}
        curvature: dict[str, Any] = {"seconds": 0.0, "cached": False, "memory": None}
        if row.config is not None and row.config.needs_curvature():
            curvature = self._curvature(row, task)
            if "reason" in curvature:
                return self._failed(row, f"its curvature could not be estimated: {curvature['reason']}")
        started = time.monotonic()
        record = self._isolated(self.work, row, task)
        if "reason" in record:
            return self._failed(row, record["reason"])
        record = {
            **record,
            "seconds": {**record["seconds"], "row": round(time.monotonic() - started, 2)},
            "crispedit": __version__,
            "editor": row.editor,
            "given": row.given,
            "blocks": list(row.blocks),
            "curvature": curvature,
        }
        write_json(self.job.out / ROWS / f"{row.key}.json", record)
        self.finished += 1
        log.info("%s", Row(editor=row.editor, given=row.given, record=record).line())
        return record

    def _curvature(self, row: Planned, task: dict[str, Any]) -> dict[str, Any]:
        """What estimating a row's curvature took: once per set of layers, and then from the cache."""
        if row.blocks not in self.curvatures:
            found = self._isolated(prepare_curvature, row, task)
            # this comparison itself may have put it into the cache, before it was interrupted
            self.curvatures[row.blocks] = self.known.get(row.blocks, found) if found.get("cached") else found
        return self.curvatures[row.blocks]

    def _isolated(self, work: Work, row: Planned, task: dict[str, Any]) -> dict[str, Any]:
        """The result of work in a process of its own, or the reason why there is none."""
        output = self.job.out / ROWS / f"{row.key}.log"
        outcome = run_isolated(work, task, output, progress=self.progress)
        if outcome.value is not None:
            return outcome.value
        return {"reason": outcome.reason + (f"; see {output}" if output.exists() else "")}

    def _failed(self, row: Planned, reason: str) -> dict[str, Any]:
        log.info("%s failed: %s", Row(editor=row.editor, given=row.given, record={}).full_name, reason)
        return {"reason": reason}


def write_comparison(found: Comparison, out: Path) -> bool:
    """Writes the table, the results as JSON, and the picture where matplotlib is installed.

    Args:
        found: The comparison.
        out: Its directory.

    Returns:
        Whether there is a picture: a new one, of what is in the table.
    """
    write_text(out / TABLE, found.markdown())
    write_json(out / RESULTS, found.record())
    (out / PLOT).unlink(missing_ok=True)
    if not found.kept or all(not row.done for row in found.rows[1:]) or find_spec("matplotlib") is None:
        return False
    draw_comparison(found, out / PLOT)
    return True


def _parse_sweeps(sweeps: Sequence[str]) -> dict[str, list[Any]]:
    """``NAME=VALUE,VALUE`` each; values are JSON where they can be read so, else text; layers are layer lists."""
    found: dict[str, list[Any]] = {}
    for sweep in sweeps:
        name, equals, text = sweep.partition("=")
        values = [value.strip() for value in text.split(",")]
        if not equals or not name.isidentifier() or not all(values):
            raise ConfigError(f"--sweep is '{sweep}'; it must be NAME=VALUE,VALUE, such as energy=0.5,0.9")
        if name in found:
            raise ConfigError(f"{name} is swept twice: give all its values in one --sweep")
        found[name] = [_layer_list(value) if name == "layers" else _value(value) for value in dict.fromkeys(values)]
    return found


def _layer_list(text: str) -> str:
    """Layers of a sweep, where a comma is between values: ``3``, ``4-6``, ``2+4-6``."""
    layers = text.replace("+", ",")
    parse_layers(layers)
    return layers


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _with_blocks(row: Planned, model: Any) -> Planned:
    """A row with the blocks that it edits, or with the reason why it cannot."""
    assert row.config is not None
    try:
        layers = parse_layers(row.layers) if row.layers is not None else None
        blocks = tuple(sorted({matrix.layer for matrix in row.config.matrices(model, layers)}))
    except CrispEditError as error:
        return replace(row, reason=str(error))
    return replace(row, blocks=blocks)


def _key(shared: dict[str, Any], row: Planned, train_edits: str | None) -> str:
    """A name for everything that a row depends on: readable, and a hash."""
    settings = row.config.model_dump() if row.config is not None else {}
    common = {name: _identity(name, value) for name, value in shared.items()}
    content = [__version__, common, row.editor, settings, row.layers, row.blocks, train_edits]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return f"{row.editor.replace(':', '-')}-{digest[:12]}"


def _files(model: str) -> str | None:
    """A hash of names, sizes and times of a local model's weights and configuration; ``None`` of another model."""
    directory = Path(model_directory(model))
    if model == BUNDLED or not directory.is_dir():
        return None
    files = [f for f in directory.iterdir() if f.suffix == ".safetensors" or f.name == "config.json"]
    found = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _check_directory(out: Path, shared: dict[str, Any]) -> None:
    """Refuses a directory that cannot be written, holds something else, or another comparison."""
    check_writable(out, overwrite=True)
    if not (out / ABOUT).is_file():
        check_writable(out, overwrite=None)
        return
    about = read_json(out / ABOUT)
    for name, said in (
        ("model", "the model"),
        ("edits", "the edits"),
        ("texts", "the capability texts"),
        ("judge", "the judge"),
        ("chat", "--chat"),
        ("dtype", "the dtype"),
        ("device", "the device"),
        ("seed", "the seed"),
        ("files", "the model's files"),
    ):
        old, new = (_identity(name, known.get(name)) for known in (about, shared))
        if old != new:
            shown = [_shown(name, known.get(name)) for known in (about, shared)]
            what = (
                f"{said} {shown[0]}, not {shown[1]}" if shown[0] != shown[1] else f"{said} as they were before a change"
            )
            raise ArtifactError(f"'{out}' holds a comparison with {what}; name another --out")


def _identity(name: str, value: Any) -> Any:
    """What of a shared property must agree: of edits and texts their content, not where it came from."""
    return value.get("sha256") if name in ("edits", "texts") and isinstance(value, dict) else value


def _shown(name: str, value: Any) -> str:
    """A shared property in a message."""
    if name == "files":
        return ""
    if name == "edits" and isinstance(value, dict):
        return f"{value.get('source')} ({value.get('count')} edits)"
    if name == "texts" and isinstance(value, dict):
        return f"{value.get('source')}" + (f" ({value['samples']} samples)" if value.get("samples") else "")
    return str(value)


def _read_row(path: Path) -> dict[str, Any] | None:
    """A finished row; one that is damaged is as good as none."""
    try:
        record = read_json(path)
    except ArtifactError:
        return None
    return record if isinstance(record, dict) and {"evaluation", "items", "seconds"} <= record.keys() else None


def _others(out: Path, known: set[str]) -> list[Row]:
    """Rows that other commands of this version left in the directory."""
    rows = []
    for path in sorted((out / ROWS).glob("*.json")):
        record = _read_row(path) if path.stem not in known else None
        if record is not None and record.get("crispedit") == __version__ and record["editor"] != BASE:
            rows.append(Row(editor=record["editor"], given=record["given"], record=record))
    return rows
