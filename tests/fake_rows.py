"""Rows of a comparison without a model: what the orchestration does must not depend on what a row is.

A file ``EDITOR.kill``, ``EDITOR.raise``, ``EDITOR.bug`` or ``EDITOR.wait`` in the current directory says what is to
happen to it.
Nothing heavy is imported: every row has a process of its own.
"""

import os
import signal
import time
from pathlib import Path

from crispedit.errors import EditFailed

RIGHT = {"base": 0, "ft": 4, "ft-seq": 3, "locbf-ft": 2, "crispedit": 4}
KEPT = {"base": 10, "ft": 6, "ft-seq": 8, "locbf-ft": 10, "crispedit": 9}


def record(editor: str) -> dict:
    """A record with ``RIGHT`` of 4 edits and ``KEPT`` of 10 task items right."""
    edits = [1.0] * RIGHT[editor] + [0.0] * (4 - RIGHT[editor])
    hits = [1] * KEPT[editor] + [0] * (10 - KEPT[editor])
    drift = 0.0 if editor == "base" else 0.1 * (11 - KEPT[editor])
    scores = {"reliability": edits, "generalization": edits, "locality": [None] * 4}
    return {
        "fingerprint": "f",
        "evaluation": {"no_context": {"reliability": 25 * RIGHT[editor]}},
        "items": {
            "edits": {"no_context": scores, "qa_context": scores},
            "tasks": {"adding": {"hits": hits, "counts": [1] * 10}},
            "texts": {"drift": [drift, 2 * drift], "loss": [5.0, 7.0], "loss_base": [5.0, 7.0], "tokens": [5.0, 7.0]},
        },
        "seconds": {"edit": 1.0, "proof": 0.5, "evaluation": 2.0},
        "memory": {"process": 10**9, "gpu": None},
    }


def row(task: dict, progress) -> dict:
    """What :func:`crispedit.comparison_row.measure_row` is called with."""
    editor = task["job"]["editor"]
    with Path("runs.txt").open("a") as file:
        file.write(f"{editor}\n")
    progress("making rows up", 0, 1)
    if Path(f"{editor}.kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if Path(f"{editor}.raise").exists():
        raise EditFailed("the edit loss did not fall")
    if Path(f"{editor}.bug").exists():
        1 / 0  # noqa: B018
    if Path(f"{editor}.wait").exists():
        Path(f"{editor}.wait").write_text(str(os.getpid()))
        progress("waiting", 0, 1)
        time.sleep(60)
    return record(editor)
