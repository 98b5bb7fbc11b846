"""Is the plan right? ``crispedit plan`` against ``crispedit edit``, each in a process of its own: memory and time by stage.

    python benchmarks/plan.py bundled 50M 180M --out plan.jsonl

The cases are the bundled model with its own edits, and random Llamas with the bundled tokenizer, built in a temporary
directory. Measured are wall seconds and the largest resident set of every stage (the kernel's high-water mark is set
back between stages, so Linux only). The edit stage ends as early as the loss lets it, where the plan counts all
epochs: its time is compared per step.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIZES = {  # hidden, inner, blocks, heads
    "20M": (384, 1024, 8, 6),
    "50M": (512, 1536, 12, 8),
    "100M": (768, 2048, 14, 12),
    "180M": (1024, 2816, 14, 16),
}
TABLE = "| {:<10} | {:<12} | {:>9} | {:>9} | {:>6} | {:>9} | {:>9} | {:>6} |"


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
        self.flush(outside)

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Makes a stage of every call of a function."""
        function: Callable[..., Any] = getattr(owner, attribute)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            with self.stage(name):
                return function(*arguments, **options)

        setattr(owner, attribute, wrapped)


def edit_measured(arguments: list[str]) -> None:
    """``crispedit edit`` in this process; its stages, the whole peak, and what it trained, as JSON on stdout."""
    stages = Stages()
    from crispedit import cli, editing, jobs
    from crispedit.curvature import Curvature
    from crispedit.editors import crispedit as editor

    stages.wrap(Curvature, "estimate", "curvature")
    stages.wrap(editing, "_subspaces", "diagonalise")
    stages.wrap(editing, "_edit_and_prove", "proof")
    stages.wrap(editor, "fine_tune", "edit")
    stages.wrap(editing.EditResult, "save", "save")
    out = Path(arguments[arguments.index("--json") + 1])
    with contextlib.redirect_stdout(sys.stderr):
        status = cli._run(arguments)
    stages.flush("")
    if status:
        raise SystemExit(status)
    training = json.loads(out.read_text())["metrics"]["training"]
    assert jobs
    print(
        json.dumps(
            {
                "seconds": stages.seconds,
                "peak": stages.peak,
                "whole": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                "epochs": len(training["epoch_losses"]) + sum(len(t["epoch_losses"]) for t in training["trials"][1:]),
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        edit_measured(sys.argv[2:])
