"""What the benchmarks that run many cases share: their first options, and the file of finished runs."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every such benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append finished runs to this file, one JSON object per line")
    parser.add_argument("--table", type=Path, help="print the table of such a file")
    parser.add_argument("--edits", default="bundled:eval")
    parser.add_argument("--set", nargs="+", default=["{}"], help="settings of the editor, as JSON objects")
    return parser


def read(path: Path) -> list[dict[str, Any]]:
    """The finished runs in a file; none where there is no file yet."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(path: Path, case: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Runs a case and appends what it found; a run that fails is printed, and is a result too."""
    try:
        row = run()
    except Exception as error:
        print({**case, "error": str(error)}, flush=True)
        return None
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row
