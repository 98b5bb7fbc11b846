"""``crispedit session``: a model edited in rounds, in a directory that keeps what is needed to take them back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import ConfigError
from .options import (
    Chat,
    Conflicts,
    Device,
    Dtype,
    Edits,
    Json,
    Layers,
    Limit,
    Model,
    Overwrite,
    Samples,
    Seed,
    Set,
    Texts,
    TrustRemoteCode,
    bars,
    check_json,
    write_json_file,
)

if TYPE_CHECKING:  # torch and transformers take seconds to import: --help must not
    from .progress import Progress
    from .session import Session

app = typer.Typer(help="Edit a model in rounds, and take them back.", no_args_is_help=True, rich_markup_mode=None)

Directory = Annotated[Path, typer.Argument(help="The session.")]
KeepEdits = Annotated[
    bool, typer.Option("--keep-edits", help="Keep the edits themselves, to check them later and to replay them.")
]


@app.command()
def init(
    model: Model,
    directory: Annotated[Path, typer.Argument(help="A new directory for the session.")],
    editor: Annotated[str, typer.Option(help="The method, or METHOD:PRESET; see 'crispedit editors'.")] = "crispedit",
    curvature: Annotated[Path | None, typer.Option(help="A directory written by 'crispedit curvature'.")] = None,
    texts: Texts = None,
    samples: Samples = None,
    layers: Layers = None,
    set_: Set = None,
    history_weight: Annotated[
        str | None,
        typer.Option(help="What a token of earlier rounds weighs in the curvature, or equal-trace (the default)."),
    ] = None,
    seed: Seed = 0,
    chat: Chat = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Begin a session: the base model by name, the curvature of its capability loss, and how rounds are edited."""
    from .artifacts import check_writable
    from .console import out
    from .curvature import Curvature
    from .edit_job import EditJob
    from .editors import configured
    from .history import HISTORY_WEIGHT, parse_history_weight
    from .models import load_model, parse_layers
    from .session import Session
    from .settings import parse_settings

    check_writable(directory, overwrite=None)
    settings = parse_settings(set_ or [])
    weight = parse_history_weight(history_weight) if history_weight is not None else HISTORY_WEIGHT
    _, config = configured(editor, settings)
    chosen = parse_layers(layers) if layers is not None else None
    options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    found = Curvature.load(curvature) if curvature is not None else None
    with bars() as progress:
        if found is None and config.needs_curvature():
            job = EditJob(
                model=model,
                edits="",
                editor=editor,
                texts=texts,
                samples=samples,
                layers=layers,
                settings=settings,
                seed=seed,
            )
            found, _ = job.curvature_in_cache(progress=progress, **options)
        loaded = load_model(model, **options)
        Session.create(
            directory,
            loaded,
            found,
            editor=editor,
            settings=settings,
            layers=chosen,
            history_weight=weight,
            seed=seed,
            chat=chat,
        )
    out.print(f"the session is in {directory}: crispedit session edit {directory} EDITS", soft_wrap=True)


@app.command()
def edit(
    directory: Directory,
    edits: Edits,
    keep_edits: KeepEdits = False,
    earlier: Annotated[
        list[str] | None, typer.Option(help="Edits of an earlier round that were not kept, to ask about; repeatable.")
    ] = None,
    limit: Limit = None,
    conflicts: Conflicts = "error",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = None,
) -> None:
    """Make a round: edit the newest model, prove it, and keep it."""
    from .console import out
    from .console_edit import print_proof
    from .inputs import read_edits

    check_json(json)
    edit_set = read_edits(edits, limit=limit, conflicts=conflicts)
    given = [read_edits(name) for name in earlier or []]
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    with bars() as progress, _writing(directory, progress, options) as session:
        result = session.edit(edit_set, keep_edits=keep_edits, given=given, progress=progress, **options)
        record = session.rounds[-1]
    print_proof(result)
    out.print(f"round {record['number']} is in {directory}", soft_wrap=True)
    write_json_file(json, record)


@app.command()
def log(directory: Directory, json: Json = None) -> None:
    """Say what was done, when; no tensor is read."""
    from datetime import datetime

    from .console import out
    from .store import Store

    check_json(json)
    with Store.reading(directory) as store:
        entries = store.entries()
    for when, entry in entries:
        out.print(f"{datetime.fromtimestamp(when):%Y-%m-%d %H:%M:%S}  {entry}", soft_wrap=True)
    write_json_file(json, [{"time": when, "entry": entry} for when, entry in entries])


@app.command()
def status(
    directory: Directory,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its checksum.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what is left of every round, and drift, to this .png, .svg or .pdf.")
    ] = None,
    json: Json = None,
) -> None:
    """Say what the session is, and how its rounds went; no tensor is read."""
    from .console import out
    from .console_session import print_session
    from .errors import ArtifactError
    from .store import Store

    check_json(json)
    if plot is not None:
        from .plot import check_plot

        check_plot(plot)
    with Store.reading(directory) as store:
        found = {
            "directory": str(directory),
            **store.about,
            "bytes": store.num_bytes(),
            "pending": len(store.value("pending", [])),
            "rounds": store.rounds(),
        }
        if verify:
            with bars() as progress:
                found["damaged"] = store.damaged(progress)
    print_session(found)
    if plot is not None:
        from .session_plot import draw_session

        draw_session(found["rounds"], plot)
        out.print(f"the picture is in {plot}", soft_wrap=True)
    write_json_file(json, found)
    if found.get("damaged"):
        raise ArtifactError(f"{len(found['damaged'])} files are damaged or missing: {found['damaged'][0]}")


@app.command()
def evaluate(
    directory: Directory,
    edits: Annotated[list[str] | None, typer.Option(help="Edits of a round that were not kept; repeatable.")] = None,
    number: Annotated[int | None, typer.Option("--round", help="After this round; the newest by default.")] = None,
    judge: Annotated[str, typer.Option(help="exact or contains.")] = "exact",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = None,
) -> None:
    """Ask the model about the edits of all rounds, and measure what the rounds cost together."""
    from .console_session import print_session_evaluation
    from .inputs import read_edits
    from .judge import find_judge
    from .session import Session
    from .session_evaluation import evaluate_session

    check_json(json)
    find_judge(judge)
    given = [read_edits(name) for name in edits or []]
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    with bars() as progress, Session.reading(directory) as session:
        found = evaluate_session(session, given, number, judge=judge, progress=progress, **options)
    print_session_evaluation(str(directory), found)
    write_json_file(json, found)


@app.command()
def revert(
    directory: Directory,
    to: Annotated[int | None, typer.Option(help="The last round that stays; 0 for the base model.")] = None,
    round_: Annotated[
        int | None, typer.Option("--round", help="Take out this round and make the later ones again.")
    ] = None,
    edits: Annotated[
        list[str] | None, typer.Option(help="Edits of a later round that were not kept; repeatable.")
    ] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Take rounds back: the last ones, or one from the middle."""
    from .console import out
    from .inputs import read_edits

    if (to is None) == (round_ is None):
        raise ConfigError("give --to N (the last round that stays) or --round N (the one that goes)")
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    given = [read_edits(name) for name in edits or []]
    with bars() as progress, _writing(directory, progress, options) as session:
        if to is not None:
            session.revert(to)
            said = f"the session is at round {to}"
        else:
            assert round_ is not None
            again = session.remove(round_, given, progress=progress, **options)
            said = f"round {round_} is out, and {again} later rounds were made again without it"
    out.print(f"{said}, in {directory}", soft_wrap=True)


@app.command()
def export(
    directory: Directory,
    out: Annotated[Path, typer.Option(help="Directory for the model or the adapter, or with --patch a file.")],
    number: Annotated[int | None, typer.Option("--round", help="After this round; the newest by default.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="A whole Hugging Face directory (the default).")] = False,
    patch: Annotated[bool, typer.Option("--patch", help="Only one patch from the base model.")] = False,
    lora_rank: Annotated[int | None, typer.Option(help="A LoRA adapter of this rank; approximate.")] = None,
    lora_energy: Annotated[float | None, typer.Option(help="A LoRA adapter that holds this share of ‖ΔW‖².")] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Write the model of a round: merged, as one patch, or as a LoRA adapter whose loss is measured."""
    from .adapter import serving_line
    from .artifacts import check_writable, check_writable_file, write_directory
    from .console import out as stdout
    from .console_session import print_adapter
    from .errors import ArtifactError
    from .session import Session

    check_json(json)
    lora = lora_rank is not None or lora_energy is not None
    if merged + patch + (lora_rank is not None) + (lora_energy is not None) > 1:
        raise ConfigError("give one of --merged, --patch, --lora-rank R, --lora-energy E")
    if lora_rank is not None and lora_rank < 1:
        raise ConfigError(f"--lora-rank is {lora_rank}; it must be 1 or more")
    if lora_energy is not None and not 0 < lora_energy <= 1:
        raise ConfigError(f"--lora-energy is {lora_energy:g}; it must be above 0 and at most 1")
    check_writable_file(out, "--out", overwrite=overwrite) if patch else check_writable(out, overwrite=overwrite)
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    record: dict[str, Any] = {"out": str(out)}
    with Session.reading(directory) as session:
        if patch:
            head = session.head_of(number)
            if head is None:
                raise ArtifactError("the base model itself needs no patch; name a round")
            head.write(out)
        elif lora:
            with bars() as progress, write_directory(out, overwrite=overwrite) as building:
                record |= session.write_adapter(
                    building, number, rank=lora_rank, energy=lora_energy, progress=progress, **options
                )
            print_adapter(record)
            stdout.print(serving_line(session.about["model"], out, max(record["ranks"].values())), soft_wrap=True)
        else:
            with write_directory(out, overwrite=overwrite) as building:
                session.write_merged(building, number, **options)
    stdout.print(f"the {'patch' if patch else 'adapter' if lora else 'model'} is in {out}", soft_wrap=True)
    write_json_file(json, record)


@contextmanager
def _writing(directory: Path, progress: "Progress", options: dict[str, Any]) -> "Iterator[Session]":
    """A session that is open for writing, with rounds made again that an interrupted command had still to make."""
    from .progress import log
    from .session import Session

    with Session.writing(directory) as session:
        if session.pending:
            log.info("%d rounds are still to be made again: going on with them", len(session.pending))
            session.go_on(progress=progress, **options)
        yield session
