"""Sessions that are killed again and again: what is left of them, against one that was left alone.

    python benchmarks/crash.py --kills 100 --json crash.json

A session of --rounds rounds is made through the command line, every round by ``crispedit session edit`` in a process of
its own, with --keep-edits on every other one. Then the same session is made again by processes that are sent SIGKILL:
which round is next is read from ``crispedit session status --json``, as a script would, and its command is given again
until the round is there; a new session is begun as long as there were fewer kills than --kills. Moments are drawn with
--seed: one of the stages of a round is chosen, its beginning is waited for in the directory of the session, and the
kill comes after a random share of what the stage takes when nothing happens, and a little more. One attempt in ten is
left alone.

At the end of a session its model, the tensors of every round's patch and curvature, the joined patch and the log are
compared with those of the session that was left alone; every file must count, and have its checksum.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from crispedit.artifacts import write_json
from crispedit.bundled import world
from crispedit.store import HEADS, INDEX, LOCK, ROUNDS, Store

STAGES = ("loading and editing", "files of the round", "joined patch", "commit", "after the commit")
"""What a round goes through; each begins with a sign in the directory, see :func:`stage`."""
WEIGHTS = 2, 3, 2, 3, 1
"""How often each is chosen for a kill; the last is mostly the end of Python."""
LONGER = 1.1
"""Kills come up to so much later than a stage usually takes."""


class Stages:
    """Which stage of a round a process is in, as the directory of the session shows it.

    Args:
        session: The session.
    """

    def __init__(self, session: Path) -> None:
        self.rounds, self.heads = session / ROUNDS, session / HEADS
        self.known = self._names()
        with Store.reading(session) as store:
            self.head = {Path(name).name for name in store.files() if name.startswith(HEADS)}

    def _names(self) -> tuple[set[str], set[str]]:
        return set(os.listdir(self.rounds)), set(os.listdir(self.heads))

    def now(self) -> int:
        """The index of the stage in :data:`STAGES`."""
        rounds, heads = self._names()
        if self.head - heads:
            return 4  # the old joined patch goes when the round counts
        new = rounds - self.known[0]
        if any(not name.startswith(".") for name in new):
            return 3
        if heads - self.known[1]:
            return 2
        return 1 if new else 0


class Crashes:
    """The benchmark.

    Args:
        args: The command line.
        work: A directory for everything.
    """

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.random = random.Random(args.seed)
        self.typical = [0.0] * len(STAGES)
        self.killed: Counter[str] = Counter()
        self.found: list[dict[str, Any]] = []
        rows = world.edit_rows("eval")
        for number in range(1, args.rounds + 1):
            some = rows[(number - 1) * args.size : number * args.size]
            (work / f"{number}.json").write_text(json.dumps(some))

    def program(self, *arguments: str) -> subprocess.Popen[bytes]:
        """The program, started."""
        command = [sys.executable, "-m", "crispedit", *arguments]
        return subprocess.Popen(command, cwd=self.work, stdout=subprocess.DEVNULL, start_new_session=True)

    def done(self, *arguments: str) -> None:
        """Runs the program to its end."""
        assert self.program(*arguments).wait() == 0, arguments

    def num_rounds(self, name: str) -> int:
        """How many rounds a session has, as a script finds out."""
        self.done("session", "status", name, "--json", "status.json")
        return len(json.loads((self.work / "status.json").read_text())["rounds"])

    def round(self, name: str, number: int) -> subprocess.Popen[bytes]:
        """The command that makes a round, started."""
        keep = ["--keep-edits"] if number % 2 else []
        return self.program("session", "edit", name, f"{number}.json", *keep)

    def alone(self, name: str) -> None:
        """Makes a session without kills, and measures what the stages of a round take."""
        for number in range(1, self.args.rounds + 1):
            stages, process = Stages(self.work / name), self.round(name, number)
            taken, before, stage = [0.0] * len(STAGES), time.monotonic(), 0
            while process.poll() is None:
                now, stage = time.monotonic(), max(stage, stages.now())
                taken[stage] += now - before
                before = now
                time.sleep(0.0005)
            assert process.returncode == 0, f"round {number} failed"
            if number > 1:  # the first has no patch to be joined with, and fills the system's caches
                self.typical = [
                    old + new / (self.args.rounds - 1) for old, new in zip(self.typical, taken, strict=True)
                ]
            print(f"round {number} alone: {', '.join(f'{one:.3f}' for one in taken)} s", flush=True)

    def killed_again_and_again(self, name: str) -> dict[str, Any]:
        """Makes a session by processes that are killed.

        Args:
            name: Of the session.

        Returns:
            What happened.
        """
        attempts, kills, left, journals = 0, Counter[str](), set[str](), 0
        while (number := self.num_rounds(name) + 1) <= self.args.rounds:
            attempts += 1
            stages, process = Stages(self.work / name), self.round(name, number)
            if self.random.random() >= 0.1:
                chosen = self.random.choices(range(len(STAGES)), WEIGHTS)[0]
                delay = self.random.uniform(0, LONGER) * self.typical[chosen]
                while process.poll() is None and stages.now() < chosen:
                    time.sleep(0.0005)
                time.sleep(delay)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                kills[STAGES[stages.now()]] += 1
                self.killed[STAGES[stages.now()]] += 1
                journals += (self.work / name / f"{INDEX}-journal").exists()
                left.update(self._strays(name))
            else:
                assert process.returncode == 0, f"round {number} failed: {process.returncode}"
            print(f"{name} {number}: {STAGES[stages.now()]}; {sum(self.killed.values())} kills", flush=True)
        with Store.writing(self.work / name):  # as the next command that writes: it tidies
            pass
        said = [entry for entry in self._log(name) if "removed what an interrupted command had left" in entry]
        return {
            "attempts": attempts,
            "kills": dict(kills),
            "journals_left": journals,
            "left_behind": len(left),
            "left_behind_and_not_said": sorted(one for one in left if not any(one in entry for entry in said)),
        }

    def _strays(self, name: str) -> list[str]:
        with Store.reading(self.work / name) as store:
            return store.strays()

    def _log(self, name: str) -> list[str]:
        with Store.reading(self.work / name) as store:
            return [entry for _, entry in store.entries()]

    def compare(self, alone: str, name: str) -> dict[str, bool]:
        """What of a session is as it is in the one that was left alone.

        Args:
            alone: That one.
            name: The other.

        Returns:
            By what, whether it is.
        """
        for one in (alone, name):
            self.done("session", "export", one, "--merged", "--out", f"{one}-model", "--overwrite")
        self.done("session", "status", name, "--verify")
        logs = [[entry for entry in self._log(one) if entry.startswith("round ")] for one in (alone, name)]
        with Store.reading(self.work / name) as store:
            counted = {*store.files(), INDEX, LOCK}
        present = {p.relative_to(self.work / name).as_posix() for p in (self.work / name).rglob("*") if p.is_file()}
        same: dict[str, Callable[[Path], Iterator[Path]]] = {
            "model": lambda session: (self.work / f"{session.name}-model").glob("*.safetensors"),
            "patches": lambda session: session.glob(f"{ROUNDS}/*/patch.safetensors"),
            "curvatures": lambda session: session.glob(f"{ROUNDS}/*/curvature/factors.safetensors"),
            "joined patch": lambda session: session.glob(f"{HEADS}/*"),
            "kept edits": lambda session: session.glob(f"{ROUNDS}/*/edits.json"),
        }
        sessions = self.work / alone, self.work / name
        found = {what: _same(*(sorted(files(session)) for session in sessions)) for what, files in same.items()}
        return {
            **found,
            "log": logs[0] == logs[1] and len(logs[0]) == self.args.rounds,
            "no stray file": present == counted,
        }

    def run(self) -> dict[str, Any]:
        """The whole benchmark."""
        started = time.monotonic()
        settings = [f"--set={one}" for one in ("epochs=3", "lr=0.002")]
        self.done("session", "init", "bundled", "begun", "--layers", "6", "--samples", "20", *settings)
        shutil.copytree(self.work / "begun", self.work / "alone")
        self.alone("alone")
        print("typical: " + ", ".join(f"{s} {t:.3f} s" for s, t in zip(STAGES, self.typical, strict=True)), flush=True)
        while sum(self.killed.values()) < self.args.kills:
            name = f"session{len(self.found) + 1}"
            shutil.copytree(self.work / "begun", self.work / name)
            about = self.killed_again_and_again(name)
            self.found.append({**about, "same": self.compare("alone", name)})
            print(json.dumps(self.found[-1]), flush=True)
        return {
            "rounds": self.args.rounds,
            "edits_per_round": self.args.size,
            "seed": self.args.seed,
            "kills": sum(self.killed.values()),
            "by_stage": {name: self.killed[name] for name in STAGES},
            "stage_seconds": {name: round(taken, 4) for name, taken in zip(STAGES, self.typical, strict=True)},
            "sessions": self.found,
            "all_same": all(all(one["same"].values()) and not one["left_behind_and_not_said"] for one in self.found),
            "seconds": round(time.monotonic() - started),
        }


def _same(one: list[Path], other: list[Path]) -> bool:
    """Whether files have the same tensors, bit for bit, or, where they have none, the same bytes."""
    return len(one) == len(other) > 0 and all(_content(a) == _content(b) for a, b in zip(one, other, strict=True))


def _content(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118  # not a mapping


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at least so many, in sessions that are finished")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", type=int, default=10, help="edits per round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as work:
        os.environ["CRISPEDIT_CACHE"] = f"{work}/cache"
        found = Crashes(args, Path(work)).run()
    print(json.dumps(found, indent=1))
    if args.json:
        write_json(args.json, found)
    sys.exit(0 if found["all_same"] else 1)


if __name__ == "__main__":
    main()
