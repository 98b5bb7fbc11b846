"""The same search for every editor: nine settings each, three values of its two most sensitive ones.

    python benchmarks/editors.py --out out/search
    python benchmarks/editors.py --out out/search --editors crispedit memit --json search.json
    python benchmarks/editors.py --out out/search --confirm out/confirmed

A comparison in which one method was tuned and others were not says nothing. Every editor gets nine settings here, on
the bundled model and edits that the comparison itself does not use (``bundled:eval``, ``--limit`` of them), the same
protocol, the same seed. What counts is the mean of three: edit success (reliability and generalization), locality, and
the share of the base model's abilities that is left. ``--model``, ``--edits``, ``--texts`` and ``--train-edits`` name
another model that ``crispedit.bundled.train`` has made. ``--confirm`` then compares the editors on edits that nothing
was chosen on (``--confirm-edits``), each at the best of its settings, as ``crispedit compare`` does.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crispedit.artifacts import write_json
from crispedit.comparing import TABLE, CompareJob, write_comparison
from crispedit.console import progress_bars
from crispedit.tradeoff import Comparison, Row, measures

ROUNDS = {"round_size": (25,)}  # of the hundred edits: four, as a hundred are of four hundred
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "ft": {"lr": ("auto", 1e-3, 3e-3), "layers": ("1-5", "3-5", "3-7")},
    "crispedit": {"energy": (0.8, 0.9, 0.97), "layers": ("1-5", "3-5", "3-7")},
    "ft-seq": {"lr": ("auto", 1e-3, 3e-3), "layers": ("1-5", "3-5", "3-7"), **ROUNDS},
    "crispedit-seq": {"energy": (0.8, 0.9, 0.97), "layers": ("1-5", "3-5", "3-7"), **ROUNDS},
    "locbf-ft": {"lr": ("auto", 1e-3, 3e-3), "layers": ("3", "5", "6")},
    "adam-nscl": {"energy": (0.5, 0.7, 0.9), "layers": ("1-5", "3-5", "3-7")},
    "lora": {"lr": ("auto", 1e-3, 3e-3), "parts": ("query+value", "down", "query+value+down")},
    "lora:adalora": {"lr": ("auto", 3e-3, 1e-2), "parts": ("query+value", "down", "query+value+down")},
    "lora:osf": {"lr": ("auto", 1e-3, 3e-3), "parts": ("query+value", "down", "query+value+down")},
    "lora:corda": {"lr": ("auto", 1e-3, 3e-3), "parts": ("query+value", "down", "query+value+down")},
    "lora-seq": {"lr": ("auto", 1e-3, 3e-3), "parts": ("query+value", "down", "query+value+down"), **ROUNDS},
    "memit": {"mom2_weight": (57.6, 172.8, 576), "clamp": (0.75, 1.5, 4)},
    "alphaedit": {"energy": (0.9, 0.99, 0.999), "clamp": (0.75, 1.5, 4)},
    "ultraedit": {"strength": (1, 2, 4), "layers": ("1-5", "3-5", "3-7")},
    "mend": {"edit_weight": (0.03, 0.1, 0.3), "steps": (50, 100, 200)},
}
"""By editor, the two settings and their values, and what all nine have in common."""


def score(row: Row, base: Row) -> float:
    """What the search goes by, of 100: the mean of edit success, locality, and abilities in parts of the base's."""
    found, before = measures(row.record["items"]), measures(base.record["items"])
    kept = min(100.0, 100 * found["abilities"].value / before["abilities"].value)
    return (found["success"].value + found["locality"].value + kept) / 3


def compare(args: argparse.Namespace, editor: str, settings: Mapping[str, Sequence[Any]], **where: Any) -> Comparison:
    """The rows of an editor, one for every combination of settings."""
    job = CompareJob(
        model=args.model,
        editors=editor,
        sweeps=[f"{name}={','.join(map(str, values))}" for name, values in settings.items()],
        texts=args.texts,
        train_edits=args.train_edits,
        **where,
    )
    with progress_bars() as progress:
        return job.run(progress=progress)


def confirm(args: argparse.Namespace, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Every editor at the best of its settings, on other edits; rounds are again of the default size."""
    where = {"out": args.confirm, "edits": args.confirm_edits}
    compare(args, "crispedit,ft", {}, **where)  # the defaults, to see what the search was worth
    for editor, rows in found.items():
        best = {name: value for name, value in rows[0]["settings"].items() if name not in ROUNDS}
        comparison = compare(args, editor, {name: (value,) for name, value in best.items()}, **where)
    write_comparison(comparison, args.confirm)
    print(f"the editors at their best settings on {args.confirm_edits}: {args.confirm / TABLE}")


def main() -> None:
    """Searches for every editor, and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where rows are kept")
    parser.add_argument("--editors", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--edits", default="bundled:eval")
    parser.add_argument("--train-edits", default="bundled:train")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--confirm", type=Path, metavar="DIR", help="compare the editors at their best settings")
    parser.add_argument("--confirm-edits", default="bundled:demo")
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for editor in args.editors:
        comparison = compare(args, editor, GRIDS[editor], out=args.out, edits=args.edits, limit=args.limit)
        base, *rows = comparison.rows
        own = [row for row in rows if row.editor == editor and row.given.keys() == GRIDS[editor].keys()]
        ranked = sorted((row for row in own if row.done), key=lambda row: -score(row, base))
        found[editor] = [
            {
                "settings": dict(row.given),
                "score": round(score(row, base), 2),
                **{name: round(measure.value, 4) for name, measure in measures(row.record["items"]).items()},
                "seconds": row.record["seconds"],
            }
            for row in ranked
        ] + [{"settings": dict(row.given), "failed": row.record["reason"]} for row in own if not row.done]
        print(f"{editor}:")
        for row in found[editor]:
            names = ("score", "success", "locality", "abilities", "drift")
            numbers = ", ".join(f"{name} {row[name]}" for name in names if name in row)
            print(f"  {row['settings']}: {numbers or row['failed']}", flush=True)
    if args.json is not None:
        write_json(args.json, found)
    if args.confirm is not None:
        confirm(args, found)


if __name__ == "__main__":
    main()
