"""The program ``crispedit``. Every command prints progress on stderr and its result on stdout.

Exit status: 0 done; 1 an edit that failed, or a bug; 2 wrong input or environment, one line on stderr and
nothing written; 130 interrupted.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from . import (
    compare_cli,
    curvature_cli,
    edit_cli,
    evaluate_cli,
    lenet_cli,
    mend_cli,
    patch_cli,
    plan_cli,
    ranks,
    session_cli,
)
from .errors import ConfigError, CrispEditError
from .options import Chat, Device, Dtype, Json, Model, Seed, TrustRemoteCode, bars, check_json, write_json_file

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


app.command()(curvature_cli.curvature)
app.command()(plan_cli.plan)
app.command()(edit_cli.edit)
app.command()(compare_cli.compare)
app.command()(mend_cli.train_mend)


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
    from .checkpoint import load_edited
    from .generation import answers
    from .rows import Prompter

    given = {}
    options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    for name in dict.fromkeys([base, model] if base else [model]):
        loaded = load_edited(name, **options)
        tokenizer = loaded.tokenizer
        prompter = Prompter.of(loaded.model, tokenizer, chat=chat, eos=tokenizer.eos_token_id is not None)  # type: ignore[arg-type]
        given[name] = answers(loaded.model, prompter, [prompt])[0].text
    from .console import print_table

    print_table(prompt, ["model", "answer"], [[name, answer or "(empty)"] for name, answer in given.items()])
    write_json_file(json, {"prompt": prompt, "answers": given})


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
