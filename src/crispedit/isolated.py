"""Work in a process of its own: its memory is its own, and what kills it does not kill this one.

The child tells of its progress through a pipe. It does not listen to Ctrl-C: this process does, and ends it. What the
child prints goes to a file, which is kept only if it failed and said something.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .errors import CrispEditError
from .progress import Progress, no_progress

Work = Callable[[dict[str, Any], Progress], dict[str, Any]]
"""A function of a module, from what is to be done to its result; both can be pickled."""

EVERY = 0.05
"""Seconds between two progress messages of one step."""
GRACE = 5.0
"""Seconds that a child has to end when it is told to."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How it went.

    Args:
        value: What the work returned; ``None`` if it failed.
        reason: Why it failed, in a line; empty if it did not.
    """

    value: dict[str, Any] | None = None
    reason: str = ""


def run_isolated(work: Work, task: dict[str, Any], output: Path, *, progress: Progress = no_progress) -> Outcome:
    """Runs ``work(task, progress)`` in a fresh process and waits for it.

    Args:
        work: What to run.
        task: Its argument.
        output: The file for what the child prints, tracebacks included; removed if it is empty or the work does not
            fail.
        progress: Called with what the child reports.

    Returns:
        The result, or why there is none: what was raised, or the signal that ended the process. If this process is
        interrupted, the child is ended first.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_child, args=(sender, work, task, str(output)), daemon=True)
    try:
        process.start()
        sender.close()
        outcome = _listen(receiver, process.sentinel, progress)
        if outcome is not None:
            process.join(GRACE)
    finally:
        _end(process)
        receiver.close()
    if outcome is None:
        outcome = Outcome(reason=_ended(process.exitcode))
    if outcome.value is not None or (output.exists() and not output.stat().st_size):
        output.unlink(missing_ok=True)
    return outcome


def _listen(receiver: Connection, ended: int, progress: Progress) -> Outcome | None:
    """Passes messages on until the result comes; ``None`` if the child ends without one."""
    while True:
        ready = wait([receiver, ended])
        if receiver not in ready:
            return None
        try:
            kind, *content = receiver.recv()
        except (EOFError, ConnectionError):
            return None
        if kind == "progress":
            progress(*content)
        else:
            return Outcome(value=content[0]) if kind == "done" else Outcome(reason=content[0])


def _end(process: Any) -> None:
    """Ends a process, kindly first."""
    if process.pid is None:
        return
    if process.is_alive():
        process.terminate()
        process.join(GRACE)
    if process.is_alive():
        process.kill()
    process.join()


def _ended(status: int | None) -> str:
    """Why a process that said nothing ended."""
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + ("; too little memory is the usual reason" if name == "SIGKILL" else "")
    return f"its process ended with status {status} and without a result"


def _child(sender: Connection, work: Work, task: dict[str, Any], output: str) -> None:
    """What the child runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    last: dict[str, float] = {}

    def progress(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - last.get(what, -EVERY) >= EVERY:
            last[what] = now
            try:
                sender.send(("progress", what, done, total))
            except OSError:  # nobody listens any more
                os._exit(1)

    answer: tuple[str, Any]
    try:
        answer = ("done", work(task, progress))
    except CrispEditError as error:
        answer = ("failed", str(error))
    except BaseException as error:
        traceback.print_exc()
        said = " ".join(str(error).split())
        answer = ("failed", f"{type(error).__name__}: {said[:200]}" if said else type(error).__name__)
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        sender.send(answer)
    sender.close()
