"""What the default budget keeps: five abilities after an edit within ``--budget auto`` and after plain fine-tuning.

    python benchmarks/default_budget.py --out default-budget.jsonl --seeds 0 1 2 3 4
    python benchmarks/default_budget.py --out default-budget.jsonl --model DIR --edits DIR/edits-train.json
    python benchmarks/default_budget.py --table default-budget.jsonl

Every run edits a fresh copy of the bundled model, or of one like it (``python -m crispedit.bundled.train --world …``),
with a seeded sample of its edits, and asks 400 items of every ability, the same of all models. Losses are points of
percent, means of the abilities over all seeds, and then of each. Their 95 % intervals are paired, over items: what is
resampled is an item with its answers by the base model and by the models of all seeds.
"""

import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import runs

from crispedit.bundled import world
from crispedit.capability import TaskItems, bundled_items
from crispedit.curvature import Curvature
from crispedit.editing import edit
from crispedit.edits import spread
from crispedit.inputs import capability_texts, read_edits
from crispedit.models import load_model
from crispedit.rows import Prompter
from crispedit.statistics import Measure, Stratum, differences
from crispedit.wild import ask, questions, score

WAYS: dict[str, dict[str, Any]] = {"budget": {"budget": "auto"}, "fine-tuning": {"energy": 0.0}}
ITEMS, ASKED = 400, 200


def items_of(loaded: Any) -> dict[str, dict[str, list[float]]]:
    """Hits and counts of every item, by ability."""
    prompter = Prompter.of(loaded.model, loaded.tokenizer)
    found = bundled_items(loaded.model, prompter, count=ITEMS)
    return {name: {"hits": list(items.hits), "counts": list(items.counts)} for name, items in found.items()}


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One edit, or none, measured."""
    loaded = load_model(case["model"])
    world.SEED = loaded.model.config.crispedit_world  # before anything is drawn from it
    if case["way"] == "base":
        return {**case, "items": items_of(loaded)}
    texts = capability_texts("bundled", None, None, 0)
    assert texts is not None
    curvature = Curvature.estimate(loaded.model, loaded.tokenizer, texts, seed=case["seed"])
    chosen = random.Random(case["seed"]).sample(list(read_edits(case["edits"])), case["size"])
    result = edit(
        loaded.model, loaded.tokenizer, chosen, curvature=curvature, texts=texts, seed=case["seed"], **WAYS[case["way"]]
    )
    asked = questions(spread(chosen, ASKED))
    prompter = Prompter.of(loaded.model, loaded.tokenizer)
    scores = score(asked, [answer.text for answer in ask(loaded.model, prompter, asked, "no_context")])
    drift = result.metrics["capability"]["drift"]
    certificate = result.metrics.get("budget") or {}
    kept = {name: certificate.get(name) for name in ("budget", "unseen")}
    return {**case, **scores, "drift": drift, **kept, "items": items_of(loaded)}


def measure(rows: Sequence[dict[str, Any]], abilities: Sequence[str]) -> Measure:
    """The mean of some abilities, each over items, each item over runs."""
    strata = []
    for name in abilities:
        every = [TaskItems(**row["items"][name]) for row in rows]
        hits = [statistics.mean(values) for values in zip(*(items.hits for items in every), strict=True)]
        strata.append(Stratum.of([100 * hit for hit in hits], every[0].counts))
    return Measure(tuple(strata), span=100)


def table(path: Path) -> None:
    """Prints losses with their intervals, and what was learned."""
    every = runs.read(path)
    print("| model | edits | | drift | reliability | generalization | locality | abilities lost (95 %) | of each |")
    print("|---" * 9 + "|")
    for model in dict.fromkeys(row["model"] for row in every):
        _print_rows(Path(model).name, [row for row in every if row["model"] == model])


def _print_rows(model: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints those of one model."""
    base = [row for row in rows if row["way"] == "base"]
    abilities = list(base[0]["items"])
    for size in sorted({row["size"] for row in rows if row["way"] != "base"}):
        for way in WAYS:
            some = [row for row in rows if row["way"] == way and row["size"] == size]
            if not some:
                continue
            found, *each = (
                differences([measure(base, names), measure(some, names)], 0)[1]
                for names in (abilities, *([name] for name in abilities))
            )
            mean = {
                n: statistics.mean(r[n] for r in some) for n in ("drift", "reliability", "generalization", "locality")
            }
            print(
                f"| {model} | {size} | {way}, {len(some)} seeds | {mean['drift']:.4f} | {mean['reliability']:.1f} | "
                f"{mean['generalization']:.1f} | {mean['locality']:.1f} | "
                f"{-found.value:.2f} ({-found.high:.2f} to {-found.low:.2f}) | "
                + ", ".join(f"{name} {-one.value:.2f}" for name, one in zip(abilities, each, strict=True))
                + " |"
            )


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = runs.options(__doc__)
    parser.set_defaults(edits="bundled:train")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--sizes", nargs="+", type=int, default=[200])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    if args.table is not None:
        table(args.table)
        return
    cases = [{"way": "base", "size": 0, "seed": 0}]
    cases += [{"way": way, "size": n, "seed": seed} for seed in args.seeds for n in args.sizes for way in WAYS]
    cases = [{"model": args.model, "edits": args.edits, **case} for case in cases]
    for case in cases:
        if not any(case.items() <= row.items() for row in runs.read(args.out)):
            runs.record(args.out, case, lambda case=case: run(case))  # type: ignore[misc]
    table(args.out)


if __name__ == "__main__":
    main()
