"""Every kind of judge through the command line, and what a killed evaluation asks again.

    python benchmarks/judges.py --json judges.json
    python benchmarks/judges.py --edits zsre_3k.json counterfact_3k.json --limit 300

For every file of edits, ``crispedit edit`` edits the bundled model (``--editor``), and ``crispedit evaluate`` asks the
edited model about the same rows, with the judges ``exact``, ``contains``, and a server with OpenAI's chat completions
at the loopback address. Behind that server is no language model: it reads question, target and answer back from the
prompt and says ``A`` where the answer contains the target, ``B`` elsewhere, so that its scores must be those of
``contains``; this is asserted.

The evaluation with the server is killed (SIGKILL) when the server has answered half of the calls that were announced,
and the same command is then run again. Counted is, at the server, how many of all cases were asked more than once;
asserted is that these are no more than the calls that were under way, which are at most eight.
"""

import argparse
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from crispedit.grading import PROMPT
from crispedit.judge import Case, contains
from crispedit.llm_judge import CONCURRENCY

CONTEXTS = ("no_context", "qa_context")
DELAY = 0.02
"""Seconds that every reply takes, so that several calls are under way at a kill."""
_ANY = "((?:.|\n)*)"
_SHOWN = re.compile(re.escape(PROMPT.format(question="\0", target="\0", answer="\0")).replace(re.escape("\0"), _ANY))


class Grader:
    """A judge that answers by a rule, and counts how often it was asked what.

    Args:
        asked: Calls by case, answered or not.
        answered: Calls whose reply was sent.
    """

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self._lock = threading.Lock()

    def reply(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The chat completion for a request."""
        prompt = body["messages"][-1]["content"]
        with self._lock:
            self.asked[prompt] += 1
        shown = _SHOWN.fullmatch(prompt)
        assert shown is not None
        time.sleep(DELAY)
        verdict = "A" if contains.is_right(Case(*shown.groups())) else "B"
        with self._lock:
            self.answered[prompt] += 1
        return {"choices": [{"index": 0, "message": {"role": "assistant", "content": verdict}}]}


@contextmanager
def serving(grader: Grader) -> Iterator[str]:
    """A server at the loopback address for as long as the block lasts; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            """Nothing is logged."""

        def do_GET(self) -> None:
            self.send({"object": "list", "data": []})

        def do_POST(self) -> None:
            self.send(grader.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def send(self, reply: dict[str, Any]) -> None:
            found = json.dumps(reply).encode()
            try:
                self.send_response(200)
                self.send_header("Content-Length", str(len(found)))
                self.end_headers()
                self.wfile.write(found)
            except OSError:  # who asked was killed
                pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def crispedit(*arguments: str, cache: Path) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "crispedit", *arguments]
    environment = {**os.environ, "CRISPEDIT_CACHE": str(cache)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def run(*arguments: str, cache: Path) -> None:
    """The same, until it is done."""
    process = crispedit(*arguments, cache=cache)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"crispedit {' '.join(arguments)} ended with {process.returncode}: {said}")


def killed_half_way(*arguments: str, grader: Grader, cache: Path) -> int:
    """Runs an evaluation until half of the calls that it announces are answered, and kills it; returns their number."""
    process = crispedit(*arguments, cache=cache)
    assert process.stderr is not None
    announced = (re.search(r"; ([\d,]+) calls, about", line) for line in process.stderr)
    calls = next(int(found[1].replace(",", "")) for found in announced if found)
    while process.poll() is None and sum(grader.answered.values()) < calls // 2:
        time.sleep(DELAY / 4)
    process.kill()
    process.communicate()
    assert process.returncode == -9, "it ended before it was killed"
    return calls


def kept(cache: Path) -> int:
    """How many replies are on disk."""
    with sqlite3.connect(cache / "judges" / "replies.sqlite") as connection:
        return int(connection.execute("SELECT count(*) FROM replies").fetchone()[0])


def measure(edits: str, limit: int, editor: str, work: Path) -> dict[str, Any]:
    """All judges on one file of edits."""
    cache, name = work / "cache", Path(edits).name
    rows = ["--limit", str(limit), "--conflicts", "first"]
    method, *settings = editor.split(",")
    given = [option for setting in settings for option in ("--set", setting)]
    run("edit", "bundled", edits, *rows, "--editor", method, *given, "--out", str(work / "edited"), cache=cache)
    evaluate = ["evaluate", str(work / "edited"), edits, *rows]
    found: dict[str, Any] = {}
    seconds: dict[str, float] = {}

    def timed(judge: str, *options: str) -> None:
        started = time.monotonic()
        path = work / f"{judge}.json"
        run(*evaluate, *options, "--json", str(path), cache=cache)
        found[judge] = json.loads(path.read_text())
        seconds[judge] = round(time.monotonic() - started, 1)

    for judge in ("exact", "contains"):
        timed(judge, "--judge", judge)
    grader = Grader()
    with serving(grader) as url:
        asking = ["--judge", url, "--judge-model", "contains"]
        calls = killed_half_way(*evaluate, *asking, grader=grader, cache=cache)
        on_disk = kept(cache)
        timed("server", *asking)
    again = sum(count > 1 for count in grader.asked.values())
    by_rule, by_server = ({c: found[judge][c] for c in CONTEXTS} for judge in ("contains", "server"))
    assert by_rule == by_server, (by_rule, by_server)
    assert len(grader.asked) == calls == kept(cache), (len(grader.asked), calls, kept(cache))
    assert again <= CONCURRENCY, again
    judged = found["server"]["judge"]
    return {
        "edits": name,
        "limit": limit,
        "editor": editor,
        "answers": judged["cases"],
        "unjudged": judged["unjudged"],
        "calls": calls,
        "kept_at_kill": on_disk,
        "asked_again": again,
        "calls_of_second_run": judged["calls"],
        "agreement_with_exact": judged["agreement_with_exact"],
        "beside_exact": judged["beside_exact"],
        "scores": {judge: {c: found[judge][c] for c in CONTEXTS} for judge in ("exact", "contains")},
        "seconds": seconds,
    }


HEADER = "edits, answers, different cases, kept at the kill, asked twice, not judged, agreement with exact %".split(
    ", "
)


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table."""
    names = ("edits", "answers", "calls", "kept_at_kill", "asked_again", "unjudged")
    rows = [[*(str(row[name]) for name in names), f"{row['agreement_with_exact']:.1f}"] for row in found]
    return ["| " + " | ".join(line) + " |" for line in (HEADER, ["---", *["---:"] * (len(HEADER) - 1)], *rows)]


def main() -> None:
    """Measures every file, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", nargs="+", default=["bundled:demo"], help="files of edits, or bundled:demo")
    parser.add_argument("--limit", type=int, default=300, help="the first so many rows of each")
    parser.add_argument("--editor", default="crispedit", help="NAME[,SETTING=VALUE…], as in protocols.py")
    parser.add_argument("--json", type=Path, help="write all that was found to this file too")
    options = parser.parse_args()
    found = []
    for edits in options.edits:
        with tempfile.TemporaryDirectory() as directory:
            found.append(measure(edits, options.limit, options.editor, Path(directory)))
        print(json.dumps(found[-1], indent=1), file=sys.stderr, flush=True)
    print("\n".join(table(found)))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written to {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
