"""The program ``crispedit``. Every command prints progress on stderr and its result on stdout.

Exit status: 0 done; 1 an edit that failed, or a bug; 2 wrong input or environment, one line on stderr and
nothing written; 130 interrupted.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import patch_cli, session_cli
from .errors import ConfigError, CrispEditError, EditFailed, TextsError
from .settings import parse_settings

if TYPE_CHECKING:  # torch and transformers take seconds to import: --help must not
    from .jobs import Evaluated
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

Model = Annotated[str, typer.Argument(help="A Hugging Face name, a local directory, or 'bundled'.")]
Edits = Annotated[str, typer.Argument(help="A .json, .jsonl or .csv file of edits, or bundled:demo|eval|train.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file as JSON.")]
Seed = Annotated[int, typer.Option(help="Same seed, same machine, same result.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.")]
DeviceMap = Annotated[str | None, typer.Option(help="Spread the model over devices, e.g. auto (needs accelerate).")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code shipped with the model.")]
Texts = Annotated[Path | None, typer.Option(help="Capability texts: .jsonl or .json with 'text', or .txt.")]
Samples = Annotated[int | None, typer.Option(help="How many of the texts to use; all by default.")]
Layers = Annotated[str | None, typer.Option(help="Decoder blocks to edit, e.g. 19-23 or 4,5,6.")]
FisherType = Annotated[str, typer.Option(help="mc (labels sampled from the model) or empirical.")]
FactorKind = Annotated[str, typer.Option(help="dense, sketch, or auto: by the memory that is free.")]
Chat = Annotated[str, typer.Option(help="Prompts through the chat template: auto, on, off.")]
Limit = Annotated[int | None, typer.Option(help="Take the first N edits.")]
Epochs = Annotated[int, typer.Option(help="Passes over the edits, at most.")]
BatchSize = Annotated[int, typer.Option(help="Edits per step, at most.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE, a setting of the editor; repeatable.")]
NoEos = Annotated[bool, typer.Option("--no-eos", help="Targets without end-of-sequence, as published.")]
Conflicts = Annotated[str, typer.Option(help="Same prompt, other target: error, first, last, drop.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output directory that is not empty.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the edited model goes.")] = Path("out/demo-model"),
    json: Json = None,
    seed: Seed = 0,
) -> None:
    """The main job on the bundled model: plain fine-tuning and CrispEdit on its 200 edits, no downloads."""
    _check_json(json)
    from .demo import run_demo

    with _bars() as progress:
        result = run_demo(out, seed=seed, progress=progress)
    from .console import out as stdout
    from .console import print_evaluations

    print_evaluations("200 edits of the bundled model", result.columns)
    for line in result.verdict:
        stdout.print(line, soft_wrap=True)
    stdout.print(f'the edited model is in {out}: crispedit ask {out} "{result.example}" --base bundled', soft_wrap=True)
    _write_json(json, result.columns)


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
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    plot: Annotated[Path | None, typer.Option(help="Draw it to this .png, .svg or .pdf file.")] = None,
    energy: Annotated[float, typer.Option(help="γ in [0, 1), marked in the plot and in the table.")] = 0.9,
    json: Json = None,
) -> None:
    """Compute the curvature of a model's capability loss, for any number of later edits."""
    _check_json(json)
    from .artifacts import check_writable
    from .curvature import Curvature
    from .factors import check_fisher, check_kind
    from .models import parse_layers
    from .threshold import check_energy

    check_writable(out, overwrite=overwrite)
    check_fisher(fisher)
    check_kind(factors)
    check_energy(energy)
    if plot is not None:
        from .plot import check_plot

        check_plot(plot)
    chosen = parse_layers(layers) if layers is not None else None
    divided = _texts(model, texts, samples, seed)
    if divided is None:
        raise TextsError("no capability texts: give --texts FILE (.jsonl, .json or .txt)")
    from . import cache
    from .console import print_curvature

    with _bars() as progress:
        loaded = _load(model, device, dtype, device_map, trust_remote_code)
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
    if plot is not None:
        from .plot import draw_curvature

        draw_curvature(found, energy, plot)
    print_curvature(found)
    from .console import out as stdout

    stdout.print(f"the curvature is in {out}" + (f", its picture in {plot}" if plot else ""), soft_wrap=True)
    _write_json(json, found.manifest(with_texts=False))


@app.command()
def plan(
    model: Model,
    edits: Edits,
    curvature: Annotated[Path | None, typer.Option(help="A directory written by 'crispedit curvature'.")] = None,
    texts: Texts = None,
    samples: Samples = None,
    layers: Layers = None,
    epochs: Epochs = 25,
    batch_size: BatchSize = 32,
    limit: Limit = None,
    memory: Annotated[str | None, typer.Option(help="What there is, e.g. 24GB; what is free by default.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    no_eos: NoEos = False,
    chat: Chat = "auto",
    conflicts: Conflicts = "error",
    json: Json = None,
) -> None:
    """Say what an edit will take before a weight is loaded: matrices, memory, disk, time, and what would fit."""
    _check_json(json)
    from .jobs import PlanJob

    job = PlanJob(
        model=model,
        edits=edits,
        curvature=curvature,
        texts=texts,
        samples=samples,
        layers=layers,
        epochs=epochs,
        batch_size=batch_size,
        limit=limit,
        memory=memory,
        eos=not no_eos,
        chat=chat,
        conflicts=conflicts,
    )
    found = job.run(device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    from .console import print_plan

    print_plan(found, f"{model} edited with {edits}")
    _write_json(json, found.record())


@app.command()
def edit(
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
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    no_eos: NoEos = False,
    chat: Chat = "auto",
    conflicts: Conflicts = "error",
    rerun: Annotated[Path | None, typer.Option(help="Repeat the run that a crispedit.json records.")] = None,
    json: Json = None,
) -> None:
    """Edit a model, prove what the edit did, and save what was proved."""
    from .jobs import EditJob

    _check_json(json)
    named = {
        "energy": energy,
        "lr": None if lr is None else _rate(lr),
        "epochs": epochs,
        "batch_size": batch_size,
        "precision": precision,
        "eos": False if no_eos else None,
    }
    settings = {name: value for name, value in named.items() if value is not None} | parse_settings(set_ or [])
    if rerun is not None:
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
    with _bars() as progress:
        result = job.run(
            device=device, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, progress=progress
        )
        result.save(out, form=save, overwrite=overwrite, progress=progress)  # type: ignore[arg-type]  # checked above
    from .console import out as stdout
    from .console import print_proof

    print_proof(result)
    stdout.print(f"the edited model is in {out}" if save == "model" else f"the change is in {out}", soft_wrap=True)
    _write_json(json, {"out": str(out), **result.record()})


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
    _check_json(json)
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
    with _bars(keep=False) as progress:
        found = job.run(progress=progress)
    from .console import err, print_comparison
    from .console import out as stdout

    written = [TABLE, RESULTS, *([PLOT] if write_comparison(found, out) else [])]
    print_comparison(found)
    if PLOT not in written and found.kept:
        err.print("the picture needs matplotlib: pip install 'crispedit[plot]', and the same command again")
    stdout.print(f"{', '.join(written)} are in {out}", soft_wrap=True)
    _write_json(json, found.record())
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
    _check_json(json)
    from .jobs import train_mend_job

    with _bars() as progress:
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
    from .console import print_training

    print_training(record)
    stdout.print(f"the hypernetwork is in {out}: crispedit edit … --editor mend --set network={out}", soft_wrap=True)
    _write_json(json, record)


@app.command()
def editors(
    editor: Annotated[str | None, typer.Argument(help="One of them, for its settings.")] = None,
    json: Json = None,
) -> None:
    """List the editors, or the settings and presets of one."""
    _check_json(json)
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
        _write_json(json, about)
        return
    every = {name: describe_editor(name) for name in editor_names()}
    print_texts(
        "Editors",
        ["editor", "what it does", "presets", "needs"],
        [[name, about["summary"], ", ".join(about["presets"]), about["needs"]] for name, about in every.items()],
    )
    _write_json(json, every)


@app.command()
def evaluate(
    model: Model,
    edits: Edits,
    base: Annotated[str | None, typer.Option(help="The model before editing, for drift.")] = None,
    protocol: Annotated[str, typer.Option(help="wild (free greedy answers), teacher-forced, or all.")] = "wild",
    judge: Annotated[str, typer.Option(help="exact, contains, or URL of an OpenAI-compatible server.")] = "exact",
    judge_model: Annotated[str | None, typer.Option(help="With a URL, the judge's name at that server.")] = None,
    judge_key_variable: Annotated[
        str | None, typer.Option(help="Environment variable with the judge's key; OPENAI_API_KEY by default.")
    ] = None,
    judge_concurrency: Annotated[int | None, typer.Option(help="Calls of the judge at once; 8 by default.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Ask a live OpenAI-compatible server; MODEL is the model's name there.")
    ] = None,
    endpoint_api: Annotated[
        str | None, typer.Option(help="How it is asked: completions (the default) or chat.")
    ] = None,
    endpoint_key_variable: Annotated[
        str | None, typer.Option(help="Environment variable with its key; OPENAI_API_KEY by default.")
    ] = None,
    endpoint_concurrency: Annotated[int | None, typer.Option(help="Calls to it at once; 8 by default.")] = None,
    texts: Texts = None,
    stop_at_period: Annotated[
        bool, typer.Option("--stop-at-period", help="End answers at the first '.' or line break, as published.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, NAME[:SHOTS],…, or paper (needs lm-eval).")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="The first N documents of every task.")] = None,
    task_batch_size: Annotated[int | None, typer.Option(help="Rows at once in tasks; by default what fits.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A directory with further tasks, as lm_eval has it.")
    ] = None,
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    chat: Chat = "auto",
    conflicts: Conflicts = "error",
    report: Annotated[
        list[Path] | None, typer.Option(help="A report to this .html, .md or .json file; repeatable.")
    ] = None,
    curvature: Annotated[
        Path | None, typer.Option(help="Drawn in the report; the one the model was edited with by default.")
    ] = None,
    json: Json = None,
) -> None:
    """Evaluate a model on edits and on its capabilities; with --base, against the model before editing."""
    _check_json(json)
    live_options: dict[str, Any] = {
        "api": endpoint_api,
        "key_variable": endpoint_key_variable,
        "concurrency": endpoint_concurrency,
    }
    _check_endpoint(endpoint, live_options, texts, chat)
    if endpoint is not None and (tasks is not None or protocol != "wild"):
        raise ConfigError("a live server can only be asked freely: leave out --tasks and --protocol")
    _check_reports(report or [], curvature)
    if report and protocol == "teacher-forced":
        raise ConfigError("--report is of free answers: give --protocol wild or all")
    from .harness_job import HarnessJob
    from .jobs import evaluate_job, evaluate_live_job
    from .live import LiveModel
    from .llm_judge import make_judge

    harness = HarnessJob.of(tasks, limit=task_limit, batch_size=task_batch_size, include_path=include_path)
    with _bars() as progress:
        decide = make_judge(judge, model=judge_model, key_variable=judge_key_variable, concurrency=judge_concurrency)
        shared: dict[str, Any] = {
            "base": base,
            "judge": decide,
            "limit": limit,
            "conflicts": conflicts,
            "stop_at_period": stop_at_period,
            "options": {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code},
            "progress": progress,
        }
        if endpoint is None:
            found = evaluate_job(model, edits, protocol=protocol, texts=texts, chat=chat, harness=harness, **shared)
        else:
            found = evaluate_live_job(LiveModel.at(endpoint, model, **live_options), edits, **shared)
    from .console import print_evaluations, print_judged, print_tasks

    result = found.summary()
    judged = "" if result["no_context"] is None else f", judge: {decide.name}"
    print_evaluations(f"{model} on {edits}{judged}", {"model": result})
    if result["judge"] is not None:
        print_judged(result["judge"])
    if "harness" in result:
        print_tasks(result["harness"])
    _write_json(json, result)
    if report:
        _write_reports(report, found, curvature)


@app.command()
def tasks() -> None:
    """Print where the tasks about edits for lm-evaluation-harness are: lm_eval --include_path $(crispedit tasks)."""
    typer.echo(Path(__file__).parent / "tasks")


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
    _check_json(json)
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
    _write_json(json, {"prompt": prompt, "answers": given})


def _check_endpoint(endpoint: str | None, options: dict[str, Any], texts: Path | None, chat: str) -> None:
    """Refuses options that would do nothing, with a live server and without one."""
    if endpoint is None:
        for name, value in options.items():
            if value is not None:
                raise ConfigError(f"--endpoint-{name.replace('_', '-')} is for a live server: give --endpoint URL")
    elif texts is not None:
        raise ConfigError("--texts is for drift, which a live server cannot be measured for; leave it out")
    elif chat != "auto":
        raise ConfigError(
            f"--chat is '{chat}', but a live server has its own template: give --endpoint-api chat or not"
        )


def _load(name: str, device: str, dtype: str, device_map: str | None, trust_remote_code: bool) -> "LoadedModel":
    from .checkpoint import load_edited

    return load_edited(name, device=device, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)


def _texts(model: str, path: Path | None, samples: int | None, seed: int) -> "CapabilityTexts | None":
    from .jobs import capability_texts

    return capability_texts(model, path, samples, seed)


def _bars(**options: Any) -> Any:
    from .console import progress_bars

    return progress_bars(**options)


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


def _check_reports(paths: list[Path], curvature: Path | None) -> None:
    """Refuses reports that cannot be written, before any work is done."""
    from .artifacts import check_writable

    if curvature is not None:
        if not paths:
            raise ConfigError("--curvature is drawn in a report: give --report FILE.html too")
        from .curvature import read_manifest

        read_manifest(curvature)
    for path in paths:
        if path.suffix.lower() not in (".html", ".md", ".json"):
            raise ConfigError(f"cannot write the report '{path}'; its name must end in .html, .md or .json")
        if path.is_dir():
            raise ConfigError(f"--report '{path}' is a directory; name a file")
        check_writable(path.parent, overwrite=True)


def _write_reports(paths: list[Path], found: "Evaluated", curvature: Path | None) -> None:
    from .artifacts import write_json, write_text
    from .console import out as stdout
    from .report import report_data
    from .report_curvature import find_curvature
    from .report_html import html
    from .report_markdown import markdown

    with _bars() as progress:
        data = report_data(found, curvature=find_curvature(found.record, curvature), progress=progress)
    for path in paths:
        suffix = path.suffix.lower()
        if suffix == ".json":
            write_json(path, data)
        else:
            write_text(path, html(data) if suffix == ".html" else markdown(data))
    stdout.print(data["verdict"]["sentence"], soft_wrap=True)
    stdout.print(f"the report is in {', '.join(map(str, paths))}", soft_wrap=True)


def _check_json(path: Path | None) -> None:
    """Refuses a --json file that cannot be written, before any work is done."""
    from .artifacts import check_writable_file

    check_writable_file(path, "--json")


def _write_json(path: Path | None, value: Any) -> None:
    if path is not None:
        from .artifacts import write_json

        write_json(path, value)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the program and exits with its status; the only place that exits."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet_libraries()
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    debug = bool(os.environ.get("CRISPEDIT_DEBUG"))
    try:
        status = app(arguments, standalone_mode=False, prog_name="crispedit")
        if status == 130:  # how Typer returns from a KeyboardInterrupt
            print("crispedit: interrupted; no result was written", file=sys.stderr)
        return status if isinstance(status, int) else 0
    except CrispEditError as error:
        if debug:
            raise
        print(f"crispedit: {error}", file=sys.stderr)
        return error.exit_status
    except Exception as error:
        if hasattr(error, "format_message"):  # how Typer reports a wrong command line
            message = " ".join(error.format_message().split())
            print(f"crispedit: {message.rstrip('.')}; see 'crispedit --help'", file=sys.stderr)
            return 2
        raise


def _quiet_libraries() -> None:
    """Keeps other libraries' progress bars and advice off our stderr."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    main()
