"""Budgets against thresholds: what an edit gets for the drift that it may cause.

    python benchmarks/budget.py --out out/budget.jsonl --json budget.json
    python benchmarks/budget.py --out out/budget.jsonl --sizes 200 1000 --seeds 0 1 2 3 4
    python benchmarks/budget.py --out out/budget.jsonl --model benchmarks/gpt2 --edits benchmarks/gpt2/edits-train.json
    python benchmarks/budget.py --out out/budget.jsonl --model DIR --edits zsre.json --texts texts.jsonl --samples 250
    python benchmarks/budget.py --out out/budget.jsonl --mechanisms "trust region" priced mask filter "adam in the ball"
    python benchmarks/budget.py --table out/budget.jsonl

Every run edits a fresh copy of the bundled model, or of another with texts of its own, with a seeded sample of the
edits: within a budget (ten of them, by factors of two), by the trust region or by a mechanism that lost
(``mechanisms.py``); off a hard mask at an energy γ, with the rate that ``auto`` finds; and by plain fine-tuning.
Asked without context are 200 of the edits. Drift is measured on the held-out texts, which a budget is kept on, and
on others of the same kind, which nobody has seen. Finished runs are appended to --out and not repeated; the table
compares every budget's run with the best γ that drifts no more, and lines below it say what was kept and used.
--json has a list of the runs within budgets.
"""

import itertools
import math
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import runs
from mechanisms import KINDS, TRUST_REGION, mechanism

from crispedit import editing
from crispedit.artifacts import write_json
from crispedit.bundled import corpus, world
from crispedit.capability import bundled_tasks, logits_of, measure_drift
from crispedit.curvature import Curvature
from crispedit.edits import spread
from crispedit.generation import Ids
from crispedit.inputs import capability_texts, has_tasks, read_edits
from crispedit.models import frozen, load_model
from crispedit.rows import Prompter
from crispedit.texts import load_texts, text_batches
from crispedit.wild import Question, ask, expected_drafts, questions, score

BUDGETS = tuple(0.0005 * 2**power for power in range(10))
ENERGY = "energy"
"""The mechanism of a fixed γ; 0 is plain fine-tuning."""
ENERGIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999, 0.99999)
ASKED, FRESH = 200, 100
PROVED = 8
"""Edits that an edit's own proof asks about: what is asked here takes its place."""
PROBES = 200
"""Items per ability."""


class Bench:
    """What runs of one model share.

    Args:
        model: Its name.
        edits: The edits' name.
        file: Of capability texts; the bundled ones when omitted.
        samples: How many of them are used; a fifth is held out.
    """

    def __init__(self, model: str, edits: str, file: Path | None = None, samples: int | None = None) -> None:
        self.model, self.base = model, load_model(model)
        if has_tasks(self.base.model):
            world.SEED = self.base.model.config.crispedit_world  # before anything is drawn from it
        self.edits = list(read_edits(edits))
        texts = capability_texts("bundled", file, samples, 0)
        assert texts is not None
        self.texts = texts
        known = {*texts.fit, *texts.held_out}
        count = corpus.NUM_CAPABILITY_TEXTS
        more = corpus.capability_texts(count + 2 * FRESH)[count:] if file is None else shuffled(load_texts(file))
        self.fresh = [text for text in dict.fromkeys(more) if text not in known][:FRESH]
        self.curvatures: dict[int, Curvature] = {}
        self.said: dict[tuple[Question, ...], list[Ids]] = {}

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """One edit, measured."""
        seed, loaded = case["seed"], load_model(self.model)
        if seed not in self.curvatures:
            self.curvatures = {seed: Curvature.estimate(loaded.model, loaded.tokenizer, self.texts, seed=seed)}
        chosen = random.Random(seed).sample(self.edits, case["size"])
        started = time.monotonic()
        few = mock.patch.object(editing, "questions", lambda edits: questions(edits[:PROVED]))
        with mechanism(case["mechanism"]), few:
            result = editing.edit(
                loaded.model,
                loaded.tokenizer,
                chosen,
                curvature=self.curvatures[seed],
                texts=self.texts,
                seed=seed,
                **{"energy" if case["mechanism"] == ENERGY else "budget": case["value"]},
            )
        seconds = time.monotonic() - started
        prompter = Prompter.of(loaded.model, loaded.tokenizer)
        asked = questions(spread(chosen, ASKED))
        right = expected_drafts(prompter, asked, "no_context")
        drafts = [[*known, own] for known, own in zip(right, self.base_says(prompter, asked), strict=True)]
        answers = ask(loaded.model, prompter, asked, "no_context", drafts=drafts)
        scores = score(asked, [answer.text for answer in answers])
        tasks = bundled_tasks(loaded.model, prompter, count=PROBES) if has_tasks(loaded.model) else {}
        batches = text_batches(loaded.model, loaded.tokenizer, self.fresh)
        with frozen(loaded.model), frozen(self.base.model):
            fresh = measure_drift(logits_of(self.base.model), logits_of(loaded.model), batches)
        training, certificate = result.metrics["training"], result.metrics.get("budget") or {}
        return {
            **case,
            **scores,
            "budget": certificate.get("budget"),
            "drift": result.metrics["capability"]["drift"],
            "fresh_drift": fresh.drift,
            "met": certificate.get("met"),
            "ratio": certificate.get("ratio"),
            "edit_loss": result.metrics["edit_loss"]["after"],
            "stopped_early": training["stopped_early"],
            "precision": training["forward"]["precision"],
            "lr": max(training["learning_rates"]),
            "epochs": len(training["epoch_losses"]),
            "abilities": statistics.mean(tasks.values()) if tasks else None,
            "tasks": tasks,
            "relative_change": max(change["relative"] for change in result.metrics["matrices"]),
            "seconds": round(result.metrics["seconds"]["edit"], 1),
            "seconds_in_all": round(seconds, 1),
        }

    def base_says(self, prompter: Prompter, asked: Sequence[Question]) -> list[Ids]:
        """The base model's answers: drafts of those of an edited one, where nothing was to change."""
        known = tuple(asked)
        if known not in self.said:
            with frozen(self.base.model):
                self.said = {known: [answer.ids for answer in ask(self.base.model, prompter, asked, "no_context")]}
        return self.said[known]


def shuffled(texts: list[str]) -> list[str]:
    """Texts in another order than those that are used were drawn in."""
    random.Random(1).shuffle(texts)
    return texts


def cases(args: Any) -> list[dict[str, Any]]:
    """All that is asked for."""
    values = [
        *((ENERGY, energy) for energy in args.energies),
        *((name, budget) for name in args.mechanisms for budget in args.budgets),
    ]
    return [
        {"model": args.model, "edits": args.edits, "size": size, "seed": seed, "mechanism": mechanism, "value": value}
        for seed in args.seeds
        for size in args.sizes
        for mechanism, value in values
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, per model and number of edits; beside every budget the best γ that drifts no more."""
    lines = [
        "| model | edits | | drift | on other texts | reliability | generalization | locality | abilities | seconds | "
        "best γ within it: reliability, generalization |",
        "|---" * 11 + "|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["size"], row["mechanism"], row["value"]), []).append(row)
    for (model, size, name_of_it, value), some in groups.items():
        names = ("drift", "fresh_drift", "reliability", "generalization", "locality", "abilities", "seconds")
        mean = {name: statistics.mean(math.nan if row[name] is None else row[name] for row in some) for name in names}
        rivals = [_rival(row, rows) for row in some] if name_of_it != ENERGY else []
        beside = ""
        if rivals and None not in rivals:
            best = [rival for rival in rivals if rival is not None]
            beside = ", ".join(
                f"{statistics.mean(row[name] for row in best):.1f}" for name in ("reliability", "generalization")
            )
        said = f"{name_of_it}, {value:g}" if name_of_it != ENERGY else "fine-tuning" if value == 0 else f"γ {value}"
        lines.append(
            f"| {Path(model).name} | {size} | {said} | {mean['drift']:.4f} | {mean['fresh_drift']:.4f} | "
            f"{mean['reliability']:.1f} | {mean['generalization']:.1f} | {mean['locality']:.1f} | "
            f"{mean['abilities']:.2f} | {mean['seconds']:.0f} | {beside} |"
        )
    return "\n".join(lines)


def _rival(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The run at a fixed γ, else the same, that says most edits and drifts no more than a budget."""
    same = ("model", "size", "seed")
    others = [
        other
        for other in rows
        if other["mechanism"] == ENERGY
        and all(other[name] == row[name] for name in same)
        and other["drift"] <= row["drift"]
    ]
    return max(others, key=lambda other: other["reliability"] + other["generalization"], default=None)


def beside_energies(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs within budgets, each with the best run at a fixed γ that drifts no more, ``best_energy``, if any."""
    names = ("value", "drift", "reliability", "generalization", "locality")
    found = []
    for row in rows:
        if row["mechanism"] != ENERGY:
            rival = _rival(row, rows)
            found.append({**row, "best_energy": rival and {name: rival[name] for name in names}})
    return found


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the trust region's runs show, per model and number of edits, in a line each."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["mechanism"] == TRUST_REGION:
            groups.setdefault((row["model"], row["size"]), []).append(row)
    return [f"{Path(model).name}, {size} edits: {_verdict(some, rows)}" for (model, size), some in groups.items()]


def _verdict(some: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """Of the runs of a model within budgets: what is kept, what is used, and how a fixed γ compares."""
    within = sum(row["drift"] <= row["value"] for row in some)
    fresh = max(row["fresh_drift"] / row["value"] for row in some)
    used = [row["drift"] / row["value"] for row in some if row["reliability"] < 100]
    by_budget: dict[float, list[float]] = {}
    for row in some:
        by_budget.setdefault(row["value"], []).append(row["reliability"] + row["generalization"])
    success = [statistics.mean(by_budget[budget]) / 2 for budget in sorted(by_budget)]
    falls = max((one - other for one, other in itertools.pairwise(success)), default=0.0)
    rivals = [(row, rival) for row in some if (rival := _rival(row, rows)) is not None]
    lost = [
        row["reliability"] + row["generalization"] - rival["reliability"] - rival["generalization"]
        for row, rival in rivals
    ]
    worse = sum(gap < 0 for gap in lost)
    return (
        f"{within} of {len(some)} within their budget, at most {fresh:.2f} of it on other texts; "
        + (f"{min(used):.0%} to {max(used):.0%} used in the {len(used)} with unmet edits; " if used else "")
        + f"from one budget to the next success (means over seeds) falls by {max(0.0, falls):.2f} at most; "
        f"in {worse} of {len(rivals)} a fixed γ that drifts no more does better"
        + (f" (by {-min(lost) / 2:.2f} at most)" if worse else "")
    )


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = runs.options(__doc__)
    parser.set_defaults(edits="bundled:train")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--texts", type=Path, help="capability texts of another model")
    parser.add_argument("--samples", type=int, help="so many of the texts")
    parser.add_argument("--sizes", nargs="+", type=int, default=[200])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--budgets", nargs="*", type=float, default=list(BUDGETS))
    parser.add_argument("--mechanisms", nargs="+", default=[TRUST_REGION], choices=[TRUST_REGION, *KINDS])
    parser.add_argument("--energies", nargs="*", type=float, default=list(ENERGIES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.table is not None:
        found = runs.read(args.table)
        print("\n".join([table(found), "", *verdicts(found)]))
        return
    bench = Bench(args.model, args.edits, args.texts, args.samples)
    for case in cases(args):
        if not any(case.items() <= row.items() for row in runs.read(args.out)):
            runs.record(args.out, case, lambda case=case: bench.run(case))  # type: ignore[misc]
    found = runs.read(args.out)
    print("\n".join([table(found), "", *verdicts(found)]))
    if args.json is not None:
        write_json(args.json, beside_energies(found))


if __name__ == "__main__":
    main()
