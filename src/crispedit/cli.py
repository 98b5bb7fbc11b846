"""The program ``crispedit``. Every command prints progress on stderr and its result on stdout.

Exit status: 0 done; 1 an edit that failed, or a bug; 2 wrong input or environment, one line on stderr and
nothing written; 130 interrupted.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import evaluate_cli, lenet_cli, patch_cli, ranks, session_cli
from .errors import ConfigError, CrispEditError, EditFailed, TextsError
from .options import (
    BatchSize,
    Chat,
    Conflicts,
    Device,
    DeviceMap,
    Dtype,
    Edits,
    Epochs,
    FactorKind,
    FisherType,
    Json,
    Layers,
    Limit,
    Model,
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

if TYPE_CHECKING:  # torch and transformers take seconds to import: --help must not
    from .models import LoadedModel
    from .texts import CapabilityTexts

app = typer.Typer(
    help="Change what a language model says about chosen things, and leave everything else as it was.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(session_cli.app, name="session")
app.add_typer(patch_cli.app, name="patch")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the edited model goes.")] = Path("out/demo-model"),
    json: Json = None,
    seed: Seed = 0,
) -> None:
    """The main job on the bundled model: plain fine-tuning and CrispEdit on its 200 edits, no downloads."""
    check_json(json)
    from .demo import run_demo

    with bars() as progress:
        result = run_demo(out, seed=seed, progress=progress)
    from .console import out as stdout
    from .console_evaluation import print_evaluations

    print_evaluations("200 edits of the bundled model", result.columns)
    for line in result.verdict:
        stdout.print(line, soft_wrap=True)
    stdout.print(f'the edited model is in {out}: crispedit ask {out} "{result.example}" --base bundled', soft_wrap=True)
    write_json_file(json, result.columns)


@app.command()
def curvature(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for the curvature.")],
    texts: Texts = None,
    samples: Samples = None,
    layers: Layers = None,
    fisher: FisherType = "mc",
    factors: FactorKind = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    offload: Offload = None,
    shard: Shard = False,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    plot: Annotated[Path | None, typer.Option(help="Draw it to this .png, .svg or .pdf file.")] = None,
    energy: Annotated[float, typer.Option(help="γ in [0, 1), marked in the plot and in the table.")] = 0.9,
    json: Json = None,
) -> None:
    """Compute the curvature of a model's capability loss, for any number of later edits."""
    check_json(json)
    from .artifacts import check_writable
    from .curvature import Curvature
    from .factors import check_kind
    from .fisher import check_fisher
    from .models import edit_matrices, find_device, parse_layers
    from .sharding import check_shard, shard_model
    from .threshold import check_energy

    check_writable(out, overwrite=overwrite)
    check_fisher(fisher)
    check_kind(factors)
    check_energy(energy)
    check_shard(shard)
    if plot is not None:
        from .plot import check_plot

        check_plot(plot)
    chosen = parse_layers(layers) if layers is not None else None
    divided = _texts(model, texts, samples, seed)
    if divided is None:
        raise TextsError("no capability texts: give --texts FILE (.jsonl, .json or .txt)")
    from . import cache
    from .console_edit import print_curvature

    with bars() as progress:
        where = {"shard": shard, "offload": offload, "edited": partial(edit_matrices, layers=chosen)}
        loaded = _load(model, device, dtype, device_map, trust_remote_code, **where)
        if shard:
            shard_model(loaded.model, edit_matrices(loaded.model, chosen), find_device(device))
        found = Curvature.estimate(
            loaded.model,
            loaded.tokenizer,
            divided,
            layers=chosen,
            fisher=fisher,  # type: ignore[arg-type]  # checked above
            factors=factors,  # type: ignore[arg-type]  # checked above
            energy=energy,
            seed=seed,
            model_name=model,
            resume=cache.passes_directory(),
            progress=progress,
        )
    found.save(out, overwrite=overwrite)
    cache.keep(found)
    if not ranks.is_main():
        return  # the main process shows what all have found
    if plot is not None:
        from .plot import draw_curvature

        with ranks.alone():
            draw_curvature(found, energy, plot)
    print_curvature(found)
    from .console import out as stdout

    stdout.print(f"the curvature is in {out}" + (f", its picture in {plot}" if plot else ""), soft_wrap=True)
    write_json_file(json, found.manifest(with_texts=False))


@app.command()
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


AGAIN = (
    "model", "edits", "out", "curvature", "texts", "save", "plot", "device", "dtype", "device_map", "offload", "shard",
    "trust_remote_code", "overwrite", "json", "rerun",
)  # fmt: skip
"""What may be said anew of a run that is repeated."""


@app.command()
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
        int | None, typer.Option(help="Edit within so many budgets, each half of the next, and show what they buy.")
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


@app.command()
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


@app.command()
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


@app.command()
def editors(
    editor: Annotated[str | None, typer.Argument(help="One of them, for its settings.")] = None,
    json: Json = None,
) -> None:
    """List the editors, or the settings and presets of one."""
    check_json(json)
    from .console import print_texts
    from .editors import describe_editor, editor_names

    if editor is not None:
        about = describe_editor(editor)
        print_texts(
            f"{editor}: {about['summary']}",
            ["setting", "default", "what it is", *about["presets"]],
            [
                [name, str(default), meaning, *(str(values.get(name, "")) for values in about["presets"].values())]
                for name, (default, meaning) in about["settings"].items()
            ],
        )
        write_json_file(json, about)
        return
    every = {name: describe_editor(name) for name in editor_names()}
    print_texts(
        "Editors",
        ["editor", "what it does", "presets", "needs"],
        [[name, about["summary"], ", ".join(about["presets"]), about["needs"]] for name, about in every.items()],
    )
    write_json_file(json, every)


@app.command()
def tasks() -> None:
    """Print where the tasks about edits for lm-evaluation-harness are: lm_eval --include_path $(crispedit tasks)."""
    typer.echo(Path(__file__).parent / "tasks")


app.command()(evaluate_cli.evaluate)
app.command()(lenet_cli.lenet)


@app.command()
def ask(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    base: Annotated[str | None, typer.Option(help="Another model to put beside it.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    chat: Chat = "auto",
    json: Json = None,
) -> None:
    """Ask a model one thing, and its base beside it."""
    check_json(json)
    if not prompt.strip():
        raise ConfigError("the prompt is empty; ask something")
    from .generation import answers
    from .rows import Prompter

    given = {}
    for name in dict.fromkeys([base, model] if base else [model]):
        loaded = _load(name, device, dtype, None, trust_remote_code)
        tokenizer = loaded.tokenizer
        prompter = Prompter.of(loaded.model, tokenizer, chat=chat, eos=tokenizer.eos_token_id is not None)  # type: ignore[arg-type]
        given[name] = answers(loaded.model, prompter, [prompt])[0].text
    from .console import print_table

    print_table(prompt, ["model", "answer"], [[name, answer or "(empty)"] for name, answer in given.items()])
    write_json_file(json, {"prompt": prompt, "answers": given})


def _load(
    name: str, device: str, dtype: str, device_map: str | None, trust_remote_code: bool, **where: Any
) -> "LoadedModel":
    from .checkpoint import load_edited

    options = {"device": device, "dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
    return load_edited(name, **options, **where)


def _texts(model: str, path: Path | None, samples: int | None, seed: int) -> "CapabilityTexts | None":
    from .inputs import capability_texts

    return capability_texts(model, path, samples, seed)


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


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the program and exits with its status; the only place that exits."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet_libraries()
    sys.exit(_run(arguments) if ranks.launched() == 1 else _run_together(arguments))


TOGETHER = ("curvature", "edit", "evaluate", "ask", "editors", "tasks")
"""The commands that several processes may run together; of the others, some would write a file twice."""


def _run_together(arguments: list[str] | None) -> int:
    """Runs the program as one of several processes (:mod:`crispedit.distributed`); the status."""
    from . import distributed

    names = [name for name in (sys.argv[1:] if arguments is None else arguments) if not name.startswith("-")]
    try:
        distributed.start()
        if names and names[0] not in TOGETHER:
            raise ConfigError(f"'crispedit {names[0]}' runs in one process: start it without a launcher")
    except CrispEditError as error:
        _say(str(error))
        return error.exit_status
    if not ranks.is_main():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    status = _run(arguments)
    if status == 0:
        distributed.stop()
    return status


def _say(message: str) -> None:
    """A line on stderr; of several processes only the first that fails says why."""
    if ranks.joined():
        from .distributed import may_speak

        if not may_speak():
            return
    print(f"crispedit: {message}", file=sys.stderr, flush=True)


def _interruption() -> str:
    if not ranks.joined():
        return "interrupted; no result was written"
    from .distributed import interruption

    return interruption()


def _run(arguments: list[str] | None) -> int:
    debug = bool(os.environ.get("CRISPEDIT_DEBUG"))
    try:
        status = app(arguments, standalone_mode=False, prog_name="crispedit")
        if status == 130:  # how Typer returns from a KeyboardInterrupt
            _say(_interruption())
        return status if isinstance(status, int) else 0
    except CrispEditError as error:
        if debug:
            raise
        _say(str(error))
        return error.exit_status
    except Exception as error:
        if hasattr(error, "format_message"):  # how Typer reports a wrong command line
            message = " ".join(error.format_message().split())
            _say(f"{message.rstrip('.')}; see 'crispedit --help'")
            return 2
        if type(error).__name__ == "OutOfMemoryError" and not debug:  # torch's, which may not be imported yet
            _say(f"out of memory: {' '.join(str(error).split())[:150]}…; 'crispedit plan' says what would fit")
            return 1
        raise


def _quiet_libraries() -> None:
    """Keeps other libraries' progress bars and advice off our stderr."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("ACCELERATE_LOG_LEVEL", "error")
    if ranks.launched() > 1:  # that a connection broke is said in one line, by us
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


if __name__ == "__main__":
    main()
