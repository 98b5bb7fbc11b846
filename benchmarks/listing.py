"""How long ``crispedit session status`` and ``log`` take on a large session, the start of Python and imports included.

    python benchmarks/listing.py --rounds 100 --gigabytes 10 --json listing.json

The session has as many rounds as is said, each with a record as long as a real one, and tensors of that size in all:
files without content, which take no room on most file systems, and to read would take as long as others.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from crispedit.artifacts import write_json
from crispedit.store import Store

ABOUT = {
    "model": "some/model",
    "editor": "crispedit",
    "edited_layers": [19, 20, 21, 22, 23],
}


def record(number: int) -> dict[str, Any]:
    """A record as long as that of a round of five matrices."""
    scores = {"reliability": 99.0, "generalization": 88.0, "locality": 77.0}
    metrics = {
        "after": scores,
        "training": {"epoch_losses": [0.123456789] * 25, "learning_rates": [2e-4] * 25},
        "matrices": [
            {"name": f"model.layers.{n}.mlp.down_proj.weight", "norm": 1.23, "outside": 1e-7} for n in range(5)
        ],
    }
    return {
        "number": number,
        "edits": {"source": f"{number}.json", "schema": "zsre", "sha256": "0" * 64, "count": 100},
        "kept": True,
        "metrics": metrics,
        "drift": {"drift": 0.01, "loss_base": 2.0, "loss": 2.01},
        "past": {str(earlier): scores for earlier in range(1, number + 1)},
    }


def make(directory: Path, rounds: int, num_bytes: int) -> None:
    """A session of so many rounds and bytes."""
    Store.create(directory, ABOUT)
    # a checksum would read all of it
    with patch("crispedit.store._checksum", lambda path: "0" * 64), Store.writing(directory) as store:
        for number in range(1, rounds + 1):
            with store.new_round() as building:
                for name in ("patch", "factors"):
                    (building / f"{name}.safetensors").touch()
                    os.truncate(building / f"{name}.safetensors", num_bytes // rounds // 2)
                head = store.head_path()
                head.touch()
                store.commit(building, record(number), head=head, values={"pending": []}, entry=f"round {number}")


def seconds(command: list[str], times: int = 5) -> dict[str, float]:
    """What a command takes, by the clock and of a processor: the least of a few times each."""
    walls, processor = [], []
    for _ in range(times):
        began, before = time.monotonic(), os.times()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        walls.append(time.monotonic() - began)
        processor.append(after[2] + after[3] - before[2] - before[3])  # of children
    return {"wall": round(min(walls), 3), "processor": round(min(processor), 3)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        directory = Path(work) / "session"
        make(directory, args.rounds, int(args.gigabytes * 1e9))
        with Store.reading(directory) as store:
            num_bytes = store.num_bytes()
        program = [sys.executable, "-m", "crispedit", "session"]
        found = {
            "rounds": args.rounds,
            "bytes": num_bytes,
            "python": seconds([sys.executable, "-c", ""]),
            **{name: seconds([*program, name, str(directory)]) for name in ("status", "log")},
        }
    print(json.dumps(found, indent=1))
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
