"""``crispedit evaluate``: what a model says of edits and what it still can, whoever edited it, wherever it is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import ranks
from .errors import ConfigError
from .options import (
    Chat,
    Conflicts,
    Device,
    Dtype,
    Edits,
    Json,
    Limit,
    Model,
    Shard,
    Texts,
    TrustRemoteCode,
    bars,
    check_json,
    write_json_file,
)

if TYPE_CHECKING:  # torch and transformers take seconds to import: --help must not
    from .evaluate_job import Evaluated


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
    shard: Shard = False,
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
    check_json(json)
    live_options: dict[str, Any] = {
        "api": endpoint_api,
        "key_variable": endpoint_key_variable,
        "concurrency": endpoint_concurrency,
    }
    _check_endpoint(endpoint, live_options, texts, chat)
    if endpoint is not None and ranks.joined():
        raise ConfigError(
            "a live server is asked by one process: start 'crispedit evaluate --endpoint' without a launcher"
        )
    if endpoint is not None and shard:
        raise ConfigError("--shard divides a model among processes, and a live server has its own: leave it out")
    if endpoint is not None and (tasks is not None or protocol != "wild"):
        raise ConfigError("a live server can only be asked freely: leave out --tasks and --protocol")
    _check_reports(report or [], curvature)
    if report and protocol == "teacher-forced":
        raise ConfigError("--report is of free answers: give --protocol wild or all")
    from .evaluate_job import evaluate_job, evaluate_live_job
    from .harness_job import HarnessJob
    from .live import LiveModel
    from .llm_judge import make_judge
    from .paired import differences_record, measure_rows

    harness = HarnessJob.of(tasks, limit=task_limit, batch_size=task_batch_size, include_path=include_path)
    with bars() as progress:
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
            found = evaluate_job(
                model, edits, protocol=protocol, texts=texts, chat=chat, harness=harness, shard=shard, **shared
            )
        else:
            found = evaluate_live_job(LiveModel.at(endpoint, model, **live_options), edits, **shared)
        rows = measure_rows(found, progress=progress) if found.before is not None or report else []
    if not ranks.is_main():
        return  # the main process shows what all have found
    from .console_evaluation import print_budget, print_differences, print_evaluations, print_judged, print_tasks

    result = found.summary()
    judged = "" if result["no_context"] is None else f", judge: {decide.name}"
    print_evaluations(f"{model} on {edits}{judged}", {"model": result})
    if found.before is not None:
        result["differences"] = differences_record(rows)
        print_differences(rows)
    print_budget(result["capability"].get("budget"))
    if result["judge"] is not None:
        print_judged(result["judge"])
    if "harness" in result:
        print_tasks(result["harness"])
    write_json_file(json, result)
    if report:
        _write_reports(report, found, rows, curvature)


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


def _check_reports(paths: list[Path], curvature: Path | None) -> None:
    """Refuses reports that cannot be written, before any work is done."""
    from .artifacts import check_writable

    if curvature is not None:
        if not paths:
            raise ConfigError("--curvature is drawn in a report: give --report FILE.html too")
        from .curvature_file import read_manifest

        read_manifest(curvature)
    for path in paths:
        if path.suffix.lower() not in (".html", ".md", ".json"):
            raise ConfigError(f"cannot write the report '{path}'; its name must end in .html, .md or .json")
        if path.is_dir():
            raise ConfigError(f"--report '{path}' is a directory; name a file")
        check_writable(path.parent, overwrite=True)


def _write_reports(paths: list[Path], found: "Evaluated", rows: list[dict[str, Any]], curvature: Path | None) -> None:
    from .artifacts import write_json, write_text
    from .console import out as stdout
    from .report import report_data
    from .report_curvature import find_curvature
    from .report_html import html
    from .report_markdown import markdown

    with bars() as progress:
        data = report_data(found, rows=rows, curvature=find_curvature(found.record, curvature), progress=progress)
    for path in paths:
        suffix = path.suffix.lower()
        if suffix == ".json":
            write_json(path, data)
        else:
            write_text(path, html(data) if suffix == ".html" else markdown(data))
    stdout.print(data["verdict"]["sentence"], soft_wrap=True)
    stdout.print(f"the report is in {', '.join(map(str, paths))}", soft_wrap=True)
