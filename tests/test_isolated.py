"""Work in a process of its own: results and progress come back, and whatever ends it is said."""

import os
import signal
import time
from pathlib import Path

import pytest

from crispedit.errors import ConfigError
from crispedit.isolated import run_isolated


def add(task, progress):
    for number in range(3):
        progress("adding", number + 1, 3)
    print("said in the child")
    return {"sum": task["a"] + task["b"], "pid": os.getpid()}


def raise_ours(task, progress):
    raise ConfigError("lr is 0; it must be above 0")


def raise_theirs(task, progress):
    raise RuntimeError("out of\n memory")


def die(task, progress):
    os.kill(os.getpid(), task["signal"])


def leave(task, progress):
    os._exit(3)


def wait_long(task, progress):
    Path(task["file"]).write_text(str(os.getpid()))
    progress("waiting", 0, 1)
    time.sleep(60)


def test_results_and_progress_come_back(tmp_path, capfd):
    reported = []
    outcome = run_isolated(add, {"a": 2, "b": 3}, tmp_path / "log", progress=lambda *step: reported.append(step))
    assert outcome.value["sum"] == 5
    assert outcome.value["pid"] != os.getpid()
    assert reported[0][0] == "adding"
    assert reported[-1] == ("adding", 3, 3)
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("work", "task", "reason"),
    [
        (raise_ours, {}, "lr is 0; it must be above 0"),
        (raise_theirs, {}, "RuntimeError: out of memory"),
        (die, {"signal": signal.SIGKILL}, "killed by SIGKILL; too little memory is the usual reason"),
        (die, {"signal": signal.SIGSEGV}, "killed by SIGSEGV"),
        (leave, {}, "its process ended with status 3 and without a result"),
    ],
)
def test_what_ended_it_is_said(work, task, reason, tmp_path):
    outcome = run_isolated(work, task, tmp_path / "log")
    assert outcome.value is None
    assert outcome.reason == reason
    assert (tmp_path / "log").exists() == (work is raise_theirs)
    if work is raise_theirs:
        assert "in raise_theirs" in (tmp_path / "log").read_text()


def peak(task, progress):
    from crispedit.memory import peak_bytes

    return {"bytes": peak_bytes()}


def test_the_memory_of_a_child_is_its_own(tmp_path):
    """400 MB were taken here once: a child's peak (torch takes some 250 MB) knows nothing of it."""
    from crispedit.memory import peak_bytes

    taken = bytearray(400_000_000)
    assert peak_bytes() > len(taken)
    parents = peak_bytes()
    outcome = run_isolated(peak, {}, tmp_path / "log")
    assert 20_000_000 < outcome.value["bytes"] < parents - 200_000_000


def ended(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_ends_the_child(error, tmp_path):
    def interrupted(*step):
        raise error

    started = time.monotonic()
    with pytest.raises(error):
        run_isolated(wait_long, {"file": str(tmp_path / "pid")}, tmp_path / "log", progress=interrupted)
    assert ended(int((tmp_path / "pid").read_text()))
    assert time.monotonic() - started < 30
