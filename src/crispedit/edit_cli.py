"""``crispedit edit``: the edit, its proof, and what is saved."""

from pathlib import Path
from typing import Annotated

import typer

from . import ranks
from .errors import ConfigError
from .options import (
    Chat,
    Conflicts,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Layers,
    Limit,
    NoEos,
    Offload,
    Overwrite,
    Samples,
    Seed,
    Set,
    Shard,
    Texts,
    TrustRemoteCode,
    bars,
    check_json,
    write_json_file,
)
from .settings import parse_settings

AGAIN = (
    "model", "edits", "out", "curvature", "texts", "save", "plot", "device", "dtype", "device_map", "offload", "shard",
    "trust_remote_code", "overwrite", "json", "rerun",
)  # fmt: skip
"""What may be said anew of a run that is repeated."""


def edit(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A Hugging Face name, a local directory, or 'bundled'.")] = None,
    edits: Annotated[
        str | None, typer.Argument(help="A .json, .jsonl or .csv file, or bundled:demo|eval|train.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for the edited model.")] = None,
    editor: Annotated[str, typer.Option(help="The method, or METHOD:PRESET; see 'crispedit editors'.")] = "crispedit",
    curvature: Annotated[Path | None, typer.Option(help="A directory written by 'crispedit curvature'.")] = None,
    texts: Texts = None,
    samples: Samples = None,
    layers: Layers = None,
    energy: Annotated[float | None, typer.Option(help="γ in [0, 1), 0.9 by default; 0 is plain fine-tuning.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="The most drift, in nats per token, or of the base's loss (1%, or auto); in place of γ."),
    ] = None,
    frontier: Annotated[
        int | None,
        typer.Option(help="Edit within so many budgets, each half of the one before, and show what they buy."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the frontier: .png, .svg or .pdf.")] = None,
    lr: Annotated[str | None, typer.Option(help="Adam's learning rate, or auto (the default).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the edits, at most; 25 by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Edits per step, at most; 32 by default.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of the steps: auto, float32, bfloat16 (mixed, float32 masters).")
    ] = None,
    set_: Set = None,
    train_edits: Annotated[
        str | None, typer.Option(help="Other edits, for editors that learn how to edit (mend).")
    ] = None,
    limit: Limit = None,
    seed: Seed = 0,
    save: Annotated[str, typer.Option(help="model (a whole directory) or delta (only what changed).")] = "model",
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    offload: Offload = None,
    shard: Shard = False,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    no_eos: NoEos = False,
    chat: Chat = "auto",
    conflicts: Conflicts = "error",
    rerun: Annotated[Path | None, typer.Option(help="Repeat the run that a crispedit.json records.")] = None,
    json: Json = None,
) -> None:
    """Edit a model, prove what the edit did, and save what was proved."""
    from .edit_job import EditJob

    check_json(json)
    for option, value in (("energy", energy), ("lr", lr)):
        if budget is not None and value is not None:
            raise ConfigError(f"--budget takes the place of --{option}: give one or the other")
    named = {
        "energy": energy,
        "budget": budget,
        "frontier": frontier,
        "lr": None if lr is None else _rate(lr),
        "epochs": epochs,
        "batch_size": batch_size,
        "precision": precision,
        "eos": False if no_eos else None,
    }
    settings = {name: value for name, value in named.items() if value is not None} | parse_settings(set_ or [])
    if rerun is not None:
        for name in context.params:
            if name not in AGAIN and context.get_parameter_source(name).name == "COMMANDLINE":  # type: ignore[union-attr]
                option = name.rstrip("_").replace("_", "-")
                raise ConfigError(f"--rerun repeats a run with its own settings: leave out --{option}, or --rerun")
        job = EditJob.from_record(rerun, model=model, edits=edits, curvature=curvature, texts=texts)
    else:
        job = EditJob(
            model=_required(model, "MODEL"),
            edits=_required(edits, "EDITS"),
            editor=editor,
            curvature=curvature,
            texts=texts,
            samples=samples,
            layers=layers,
            settings=settings,
            limit=limit,
            seed=seed,
            chat=chat,
            conflicts=conflicts,
            train_edits=train_edits,
        )
    if out is None:
        raise ConfigError("--out is missing: name a directory for the edited model")
    if save not in ("model", "delta"):
        raise ConfigError(f"save is '{save}'; it must be model or delta")
    from .artifacts import check_writable
    from .checkpoint import check_room

    check_writable(out, overwrite=overwrite)
    if save == "model":
        check_room(job.model, out)
    if plot is not None:
        from .plot import check_plot

        if job.settings.get("frontier", 1) == 1:
            raise ConfigError("--plot draws a frontier: give --frontier N")
        check_plot(plot)
    with bars() as progress:
        options = {"device": device, "dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
        result = job.run(**options, offload=offload, shard=shard, progress=progress)  # type: ignore[arg-type]  # of several types
        result.save(out, form=save, overwrite=overwrite, progress=progress)  # type: ignore[arg-type]  # checked above
    from .console import out as stdout
    from .console_edit import print_proof

    print_proof(result)
    if plot is not None and ranks.is_main():
        from .frontier import draw_frontier

        draw_frontier(result.metrics["frontier"], plot)
        stdout.print(f"the picture is {plot}", soft_wrap=True)
    stdout.print(f"the edited model is in {out}" if save == "model" else f"the change is in {out}", soft_wrap=True)
    write_json_file(json, {"out": str(out), **result.record()})


def _required(value: str | None, name: str) -> str:
    if value is None:
        raise ConfigError(f"{name} is missing: crispedit edit MODEL EDITS --out DIR")
    return value


def _rate(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"lr is '{text}'; it must be a number above 0, or auto") from None
