"""``crispedit plan``: what an edit will take."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    BatchSize,
    Chat,
    Conflicts,
    Device,
    Dtype,
    Epochs,
    FactorKind,
    Json,
    Layers,
    Limit,
    NoEos,
    Offload,
    Samples,
    Set,
    Texts,
    TrustRemoteCode,
    check_json,
    write_json_file,
)
from .settings import parse_settings


def plan(
    model: Annotated[str, typer.Argument(help="As for edit; or a shape by name, such as Llama-3-70B, without EDITS.")],
    edits: Annotated[
        str | None, typer.Argument(help="A file of edits; when left out, 1,000 of typical length are assumed.")
    ] = None,
    curvature: Annotated[Path | None, typer.Option(help="A directory written by 'crispedit curvature'.")] = None,
    texts: Texts = None,
    samples: Samples = None,
    layers: Layers = None,
    factors: FactorKind = "auto",
    energy: Annotated[float | None, typer.Option(help="γ in (0, 1), 0.9 by default.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Plan an edit within a budget, as that of edit; what it is changes no number.")
    ] = None,
    epochs: Epochs = 25,
    batch_size: BatchSize = 32,
    set_: Set = None,
    limit: Limit = None,
    memory: Annotated[str | None, typer.Option(help="What there is, e.g. 24GB; what is free by default.")] = None,
    devices: Annotated[
        str | None, typer.Option(help="Memory of devices, e.g. 24GB,80GB,141GB: which methods fit on which.")
    ] = None,
    processes: Annotated[int, typer.Option(help="How many there will be: numbers are those of one.")] = 1,
    shard: Annotated[bool, typer.Option("--shard", help="The model divided among the processes, as by edit.")] = False,
    offload: Offload = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    no_eos: NoEos = False,
    chat: Chat = "auto",
    conflicts: Conflicts = "error",
    json: Json = None,
) -> None:
    """Say what an edit will take before a weight is loaded: matrices, memory, disk, time, and what would fit."""
    check_json(json)
    from .plan_job import PlanJob

    named = {"energy": energy, "budget": budget, "epochs": epochs, "batch_size": batch_size}
    settings = {name: value for name, value in named.items() if value is not None} | parse_settings(set_ or [])
    job = PlanJob(
        model=model,
        edits=edits,
        curvature=curvature,
        texts=texts,
        samples=samples,
        layers=layers,
        factors=factors,
        settings=settings,
        limit=limit,
        memory=memory,
        devices=devices,
        processes=processes,
        shard=shard,
        offload=offload,
        eos=not no_eos,
        chat=chat,
        conflicts=conflicts,
    )
    found = job.run(device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    from .console_plan import print_plan

    print_plan(found, f"{model} edited" + (f" with {edits}" if edits else ""))
    write_json_file(json, found.record())
