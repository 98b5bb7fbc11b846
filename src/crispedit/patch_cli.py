"""``crispedit patch``: shows patches, puts them on models, takes them off, makes and joins them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Json, Model, Overwrite, TrustRemoteCode, check_json, write_json_file

if TYPE_CHECKING:  # torch and transformers take seconds to import: --help must not
    from .patch import Patch

app = typer.Typer(help="Exact differences of models, in one file each.", no_args_is_help=True, rich_markup_mode=None)

Files = Annotated[list[Path], typer.Argument(help="Patches, in the order in which they were made.")]
Out = Annotated[Path, typer.Option(help="Directory for the model.")]
OutFile = Annotated[Path, typer.Option(help="File for the patch, .safetensors.")]


@app.command()
def show(file: Annotated[Path, typer.Argument(help="A patch.")], json: Json = None) -> None:
    """Say what a patch is for and what it changes; no tensor is read."""
    from .console_session import print_patch
    from .patch import read_manifest

    check_json(json)
    manifest = read_manifest(file)
    print_patch(str(file), manifest)
    write_json_file(json, manifest)


@app.command()
def apply(
    model: Model, files: Files, out: Out, overwrite: Overwrite = False, trust_remote_code: TrustRemoteCode = False
) -> None:
    """Put patches on a model, in their order, and write it: bit for bit what it was when they were made."""
    patches = [(file, _read(file)) for file in files]
    _put(model, "apply", patches, out, overwrite=overwrite, trust_remote_code=trust_remote_code)


@app.command()
def revert(
    model: Model, files: Files, out: Out, overwrite: Overwrite = False, trust_remote_code: TrustRemoteCode = False
) -> None:
    """Take patches off a model, the last first, and write it: bit for bit what it was before them."""
    undone = [(file, _read(file).reversed()) for file in reversed(files)]
    _put(model, "revert", undone, out, overwrite=overwrite, trust_remote_code=trust_remote_code)


@app.command()
def diff(
    model: Model,
    other: Annotated[str, typer.Argument(help="The model that it is to become.")],
    out: OutFile,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make the patch that turns one model into another."""
    from .artifacts import check_writable_file
    from .checkpoint import load_edited
    from .errors import ModelError
    from .patch import Patch, StoredTensors

    check_writable_file(out, "--out", overwrite=overwrite)
    one, two = (load_edited(name, device="cpu", trust_remote_code=trust_remote_code) for name in (model, other))
    if one.stored_dtype != two.stored_dtype:
        raise ModelError(f"'{model}' is stored as {one.stored_dtype} and '{other}' as {two.stored_dtype}")
    before, after = (StoredTensors(loaded.model, loaded.stored_dtype) for loaded in (one, two))
    about = {"model": model, "dtype": str(one.model.dtype).removeprefix("torch."), "result": other}
    _write(Patch.between(before, after, about), out)


@app.command()
def stack(files: Files, out: OutFile, overwrite: Overwrite = False) -> None:
    """Join patches of which each is for the result of the one before: one patch that does the same."""
    from functools import reduce

    from .artifacts import check_writable_file
    from .patch import Patch

    check_writable_file(out, "--out", overwrite=overwrite)
    _write(reduce(Patch.then, [_read(file) for file in files]), out)


def _read(file: Path) -> "Patch":
    from .patch import Patch

    return Patch.read(file)


def _put(
    model: str,
    command: str,
    patches: "list[tuple[Path, Patch]]",
    out: Path,
    *,
    overwrite: bool,
    trust_remote_code: bool,
) -> None:
    """Puts patches on a model, all of them or none, and writes it, read back and compared, with what was done."""
    from .artifacts import check_writable, write_directory, write_json
    from .checkpoint import RECORD, check_room, load_edited, read_back, write_model
    from .console import out as stdout
    from .editing import origin
    from .patch import apply_to

    check_writable(out, overwrite=overwrite)
    check_room(model, out)
    loaded = load_edited(model, device="cpu", trust_remote_code=trust_remote_code)
    told = [{"file": str(file), **patch.about} for file, patch in patches]
    record = {"command": f"patch {command}", **origin(loaded.model, model), "patches": told}
    for _, patch in patches:
        apply_to(loaded.model, patch, loaded.stored_dtype)
    with write_directory(out, overwrite=overwrite) as building:
        write_model(loaded.model, loaded.tokenizer, building, loaded.stored_dtype)
        read_back(loaded.model, building, loaded.stored_dtype)
        write_json(building / RECORD, record)
    stdout.print(f"the model is in {out}", soft_wrap=True)


def _write(patch: "Patch", out: Path) -> None:
    from .console import out as stdout
    from .console import size

    patch.write(out)
    stdout.print(f"{len(patch.changes)} tensors, {size(patch.num_bytes)}, in {out}", soft_wrap=True)
