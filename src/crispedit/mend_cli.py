"""``crispedit train-mend``: the hypernetwork of editor mend."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Chat,
    Conflicts,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Layers,
    Limit,
    Model,
    NoEos,
    Overwrite,
    Seed,
    Set,
    Texts,
    TrustRemoteCode,
    bars,
    check_json,
    write_json_file,
)
from .settings import parse_settings


def train_mend(
    model: Model,
    train_edits: Annotated[str, typer.Argument(help="Edits to learn from, not those to be made; as for 'edit'.")],
    out: Annotated[Path, typer.Option(help="Directory for the hypernetwork; the same command goes on in it.")],
    layers: Layers = None,
    texts: Texts = None,
    set_: Set = None,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    no_eos: NoEos = False,
    chat: Chat = "auto",
    conflicts: Conflicts = "first",
    json: Json = None,
) -> None:
    """Train the hypernetwork of editor mend, once per model; interrupted, the same command goes on."""
    check_json(json)
    from .mend_job import train_mend_job

    with bars() as progress:
        record = train_mend_job(
            model,
            train_edits,
            out,
            settings=parse_settings(set_ or []) | ({"eos": False} if no_eos else {}),
            layers=layers,
            texts=texts,
            limit=limit,
            seed=seed,
            chat=chat,
            conflicts=conflicts,
            overwrite=overwrite,
            options={
                "device": device, "dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code,
            },
            progress=progress,
        )  # fmt: skip
    from .console import out as stdout
    from .console_edit import print_training

    print_training(record)
    stdout.print(f"the hypernetwork is in {out}: crispedit edit … --editor mend --set network={out}", soft_wrap=True)
    write_json_file(json, record)
