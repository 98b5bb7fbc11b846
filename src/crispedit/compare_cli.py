"""``crispedit compare``: editors side by side."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import EditFailed
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
    NoEos,
    Samples,
    Seed,
    Set,
    Texts,
    TrustRemoteCode,
    bars,
    check_json,
    write_json_file,
)
from .settings import parse_settings


def compare(
    model: Model,
    edits: Edits,
    editors: Annotated[str, typer.Option(help="Names with commas between: ft,lora:adalora,crispedit; or all.")],
    out: Annotated[Path, typer.Option(help="Directory of the comparison; one that was begun is gone on with.")],
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE,VALUE: a row per value for editors with that setting; repeatable."),
    ] = None,
    set_: Set = None,
    layers: Layers = None,
    texts: Texts = None,
    samples: Samples = None,
    train_edits: Annotated[
        str | None, typer.Option(help="Other edits, for editors that learn how to edit (mend).")
    ] = None,
    judge: Annotated[str, typer.Option(help="exact or contains.")] = "exact",
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    no_eos: NoEos = False,
    chat: Chat = "auto",
    conflicts: Conflicts = "error",
    json: Json = None,
) -> None:
    """Compare editors from the same base on the same questions: a table, a picture, intervals of all differences."""
    check_json(json)
    from .comparing import PLOT, RESULTS, TABLE, CompareJob, write_comparison

    job = CompareJob(
        model=model,
        edits=edits,
        editors=editors,
        out=out,
        sweeps=sweep or (),
        settings=parse_settings(set_ or []) | ({"eos": False} if no_eos else {}),
        layers=layers,
        texts=texts,
        samples=samples,
        limit=limit,
        seed=seed,
        chat=chat,
        conflicts=conflicts,
        train_edits=train_edits,
        judge=judge,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    with bars(keep=False) as progress:
        found = job.run(progress=progress)
    from .console import err
    from .console import out as stdout
    from .console_evaluation import print_comparison

    written = [TABLE, RESULTS, *([PLOT] if write_comparison(found, out) else [])]
    print_comparison(found)
    if PLOT not in written and found.kept:
        err.print("the picture needs matplotlib: pip install 'crispedit[plot]', and the same command again")
    stdout.print(f"{', '.join(written)} are in {out}", soft_wrap=True)
    write_json_file(json, found.record())
    if found.failed:
        raise EditFailed(f"{len(found.failed)} of {len(found.rows)} rows failed; the same command runs them again")
