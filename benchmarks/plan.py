"""Is the plan right? ``crispedit plan`` against ``crispedit edit``, each in a process of its own.

    python benchmarks/plan.py --out plan.jsonl bundled 50M 180M
    python benchmarks/plan.py --table plan.jsonl

The cases are the bundled model with its own edits, and random Llamas with the bundled tokenizer, built in a temporary
directory. Measured are wall seconds and the largest resident set of every stage (the kernel's high-water mark is set
back between stages, so Linux only). What a stage gave back and the allocator kept counts for the stages after it;
the plan counts what is alive, so the peak of the whole is what should agree. Planned seconds are the mean of a plan
made before the edit and one made after it: each measures how fast the machine is at the moment. The plan supposes
answers of full length: models that stop earlier take less.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import runs

SIZES = {  # hidden, inner, blocks, heads
    "50M": (512, 1536, 12, 8),
    "100M": (768, 2048, 14, 12),
    "180M": (1024, 2816, 14, 16),
}


class Stages:
    """Wall seconds and the largest resident set of what runs under a name; what has none is the stage below it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self._current, self._since = "load", time.monotonic()

    def flush(self, following: str) -> None:
        """Ends the current stage, or a part of it."""
        now = time.monotonic()
        status = Path("/proc/self/status").read_text()
        high = 1024 * int(status.split("VmHWM:")[1].split()[0])
        Path("/proc/self/clear_refs").write_text("5")
        self.seconds[self._current] = self.seconds.get(self._current, 0.0) + now - self._since
        self.peak[self._current] = max(self.peak.get(self._current, 0), high)
        self._current, self._since = following, now

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Within, time and memory are this stage's."""
        outside = self._current
        self.flush(name)
        yield
        self.flush("proof" if outside == "load" else outside)  # nothing is loaded after the first stage

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Makes a stage of every call of a function."""
        function: Callable[..., Any] = getattr(owner, attribute)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            with self.stage(name):
                return function(*arguments, **options)

        setattr(owner, attribute, wrapped)


def edit_measured(arguments: list[str]) -> None:
    """``crispedit edit`` in this process; its stages and what it trained, as JSON in the last line of stdout."""
    stages = Stages()
    from crispedit import cli, editing
    from crispedit.curvature import Curvature
    from crispedit.editors import crispedit as editor

    stages.wrap(Curvature, "estimate", "curvature")
    stages.wrap(editing, "_subspaces", "diagonalise")
    edit = editor.edit

    def staged(*given: Any) -> Iterator[Any]:
        with stages.stage("edit"):  # with the rules and their bases, and not the loop alone
            yield from edit(*given)

    editor.edit = staged
    stages.wrap(editing.EditResult, "save", "save")
    status = cli._run(arguments)
    stages.flush("")
    if status:
        raise SystemExit(status)
    print(json.dumps({"seconds": stages.seconds, "bytes": stages.peak}))


def build(size: str, directory: Path) -> None:
    """Writes a random Llama of a size with the bundled tokenizer."""
    import torch
    import transformers

    from crispedit.models import BUNDLED, load_model, model_directory

    hidden, inner, blocks, heads = SIZES[size]
    tokenizer = load_model(BUNDLED).tokenizer
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    for file in Path(model_directory(BUNDLED)).glob("tokenizer*"):
        shutil.copy(file, directory)


def run(case: dict[str, Any], build: Callable[[str, Path], None] = build) -> dict[str, Any]:
    """Plans one edit and makes it, in two processes.

    Args:
        case: ``model``, ``edits`` and ``options`` of both commands.
        build: Writes the model of a name to a directory, with a tokenizer; not called for the bundled model.

    Returns:
        The case, with ``plan``, ``planned_after`` (the same again after the edit) and ``measured``.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        texts = []
        model = case["model"]
        if model != "bundled":
            build(model, work / "model")
            model = str(work / "model")
            texts = ["--texts", str(write_texts(work / "texts.jsonl"))]
        shared = [model, case["edits"], *texts, *case["options"], "--json", str(work / "found.json")]
        environment = {**os.environ, "CRISPEDIT_CACHE": str(work / "cache")}
        planned = [sys.executable, "-m", "crispedit", "plan", *shared]
        subprocess.run(planned, env=environment, check=True, stdout=subprocess.PIPE)
        before = json.loads((work / "found.json").read_text())
        rate = [] if "--budget" in case["options"] else ["--lr", "1e-4"]  # a budget finds its own
        command = ["edit", *shared, "--out", str(work / "edited"), *rate]
        said = subprocess.run(
            [sys.executable, __file__, "--child", *command], env=environment, check=True, stdout=subprocess.PIPE
        ).stdout
        subprocess.run(planned, env=environment, check=True, stdout=subprocess.PIPE)
        after = json.loads((work / "found.json").read_text())
    return {**case, "plan": before, "planned_after": after, "measured": json.loads(said.splitlines()[-1])}


def write_texts(path: Path) -> Path:
    """Writes the bundled capability texts, which other models know nothing of."""
    from crispedit.bundled import corpus

    path.write_text("\n".join(json.dumps({"text": text}) for text in corpus.capability_texts()))
    return path


def table(path: Path) -> None:
    """Prints plan and measurement, stage by stage, as a Markdown table."""
    print("| model | stage | GB planned | measured | ratio | s planned | measured | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for row in runs.read(path):
        plan, after, measured = row["plan"]["stages"], row["planned_after"]["stages"], row["measured"]
        lines = {
            name: (
                stage["bytes"],
                measured["bytes"][name],
                (stage["seconds"] + after[name]["seconds"]) / 2,
                measured["seconds"][name],
            )
            for name, stage in plan.items()
        }
        wholes = list(zip(*lines.values(), strict=True))
        lines["whole"] = (max(wholes[0]), max(wholes[1]), sum(wholes[2]), sum(wholes[3]))
        for name, (planned, high, seconds, took) in lines.items():
            print(
                f"| {row['model']} | {name} | {planned / 1e9:.2f} | {high / 1e9:.2f} | {planned / high:.2f} "
                f"| {seconds:.1f} | {took:.1f} | {seconds / took:.2f} |"
            )


def main() -> None:
    """The command line."""
    parser = runs.options(__doc__)
    parser.add_argument("cases", nargs="*", choices=["bundled", *SIZES])
    parser.add_argument("--options", default="--limit 100 --epochs 4", help="of both commands")
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments.table)
        return
    for name in arguments.cases:
        case = {"model": name, "edits": arguments.edits, "options": arguments.options.split()}
        runs.record(arguments.out, case, partial(run, case))
    table(arguments.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        edit_measured(sys.argv[2:])
    else:
        main()
