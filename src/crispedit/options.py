"""What the commands have in common: options that mean the same everywhere, the progress bars, the --json file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import check_choice


def _one_of(name: str, *known: str) -> Any:
    """A callback that refuses other values, before anything is loaded."""

    def check(value: str) -> str:
        check_choice(name, value, known)
        return value

    return check


Model = Annotated[str, typer.Argument(help="A Hugging Face name, a local directory, or 'bundled'.")]
Edits = Annotated[str, typer.Argument(help="A .json, .jsonl or .csv file of edits, or bundled:demo|eval|train.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file as JSON.")]
Seed = Annotated[int, typer.Option(help="Same seed, same machine, same result.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.")]
DeviceMap = Annotated[str | None, typer.Option(help="Spread the model over devices, e.g. auto (needs accelerate).")]
Offload = Annotated[
    str | None, typer.Option(help="Blocks below the first edited one wait on the cpu or disk (needs accelerate).")
]
Shard = Annotated[bool, typer.Option("--shard", help="Divide the model among the processes of torchrun (FSDP2).")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code shipped with the model.")]
Texts = Annotated[Path | None, typer.Option(help="Capability texts: .jsonl or .json with 'text', or .txt.")]
Samples = Annotated[int | None, typer.Option(help="How many of the texts to use; all by default.")]
Layers = Annotated[str | None, typer.Option(help="Decoder blocks to edit, e.g. 19-23 or 4,5,6.")]
FisherType = Annotated[str, typer.Option(help="mc (labels sampled from the model) or empirical.")]
FactorKind = Annotated[str, typer.Option(help="dense, sketch, or auto: by the memory that is free.")]
Chat = Annotated[
    str,
    typer.Option(
        help="Prompts through the chat template: auto, on, off.", callback=_one_of("chat", "auto", "on", "off")
    ),
]
Limit = Annotated[int | None, typer.Option(help="Take the first N edits.")]
Epochs = Annotated[int, typer.Option(help="Passes over the edits, at most.")]
BatchSize = Annotated[int, typer.Option(help="Edits per step, at most.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE, a setting of the editor; repeatable.")]
NoEos = Annotated[bool, typer.Option("--no-eos", help="Targets without end-of-sequence, as published.")]
Conflicts = Annotated[
    str,
    typer.Option(
        help="Same prompt, other target: error, first, last, drop.",
        callback=_one_of("conflicts", "error", "first", "last", "drop"),
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output directory that is not empty.")]


def bars(**options: Any) -> Any:
    """Progress on stderr, as a context that gives the callback."""
    from .console import progress_bars

    return progress_bars(**options)


def check_json(path: Path | None) -> None:
    """Refuses a --json file that cannot be written, before any work is done."""
    from .artifacts import check_writable_file

    check_writable_file(path, "--json")


def write_json_file(path: Path | None, value: Any) -> None:
    """Writes the --json file, where one is wanted."""
    if path is not None:
        from .artifacts import write_json

        write_json(path, value)
