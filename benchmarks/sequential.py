"""Editing in rounds: what is left of the first round after the last, at what drift, and in what time.

    python benchmarks/sequential.py --out out/rounds.jsonl --json sequential.json
    python benchmarks/sequential.py --out out/rounds.jsonl --methods crispedit-seq ft-seq --seeds 0 1 2
    python benchmarks/sequential.py --out out/rounds.jsonl --table

The bundled model, or another that ``crispedit.bundled.train`` has made, is edited in --rounds rounds of --size edits by
every method. After a third of them, two thirds, and all, the first round, the middle one and the newest are asked about
(WILD, exact match, both contexts), a hundred edits of all rounds so far, and the five abilities; drift is that of
held-out texts from the model before the first round. Runs that are in --out are not run again.

``--timing N`` measures, N times one after the other, what all rounds take over one batch edit of the same edits: at a
fixed learning rate, with as many edits per step in both, and as many steps; nothing stops early. The rounds do more
than the batch: they estimate each round's curvature and diagonalise the sum.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runs import read, record

import crispedit as ce
from crispedit.artifacts import write_json
from crispedit.capability import logits_of
from crispedit.console import progress_bars
from crispedit.curvature import Curvature
from crispedit.edits import Edit, spread
from crispedit.evaluation import measure
from crispedit.inputs import capability_texts, read_edits
from crispedit.models import load_model
from crispedit.texts import CapabilityTexts
from crispedit.tradeoff import measures

MASK = {"update": "auto"}
"""The mask of the paper in place of a price."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "crispedit-seq": ("crispedit-seq", {}),
    "without history": ("crispedit-seq", {"history_weight": 0}),
    "ft-seq": ("ft-seq", {}),
    "alphaedit": ("alphaedit", {}),
    "one batch": ("crispedit", {"update": "priced"}),  # of all edits: what the model has room for
    # variants
    **{f"price {price}": ("crispedit-seq", {"price": price}) for price in (0.003, 0.03, 0.1)},
    "mask": ("crispedit-seq", MASK),
    "mask, without history": ("crispedit-seq", {**MASK, "history_weight": 0}),
    "mask, γ 0.97": ("crispedit-seq", {**MASK, "energy": 0.97}),
    "mask, γ 0.99": ("crispedit-seq", {**MASK, "energy": 0.99}),
    "mask, token count": ("crispedit-seq", {**MASK, "history_weight": 1}),
    "mask, weight 10": ("crispedit-seq", {**MASK, "history_weight": 10}),
    "mask, weight 100": ("crispedit-seq", {**MASK, "history_weight": 100}),
    "mask, one Adam": ("crispedit-seq", {**MASK, "optimizer": "kept"}),
    "mask, refreshed at 25 %": ("crispedit-seq", {**MASK, "refresh": 0.25}),
    "mask, mix": ("crispedit-seq", {**MASK, "history": "mix"}),
    "mask, lr 3.5e-3": ("crispedit-seq", {**MASK, "lr": 3.5e-3}),
    "mask, lr 3.5e-3, token count": ("crispedit-seq", {**MASK, "lr": 3.5e-3, "history_weight": 1}),
    "published rule, one Adam": ("crispedit-seq", {"update": "projected-gradient", "optimizer": "kept"}),
    "ft-seq, lr 3.5e-3": ("ft-seq", {"lr": 3.5e-3}),
    "ft-seq, one Adam": ("ft-seq", {"optimizer": "kept"}),
}
"""By name, the editor and its settings."""
COMPARED = ("crispedit-seq", "without history", "ft-seq", "alphaedit")
RATE, EPOCHS = 2e-3, 25
"""Of the timing."""


class Bench:
    """What all runs share: the edits, the texts, and the model before the first round.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        texts = capability_texts(args.model, args.texts, None, 0)
        assert texts is not None, "give --texts"
        self.texts: CapabilityTexts = texts
        self.edits = read_edits(args.edits, limit=args.rounds * args.size)
        assert len(self.edits) == args.rounds * args.size, f"{args.edits} has only {len(self.edits)} edits"
        self.base = load_model(args.model)
        self.curvatures: dict[int, Curvature] = {}

    def curvature(self, seed: int) -> Curvature:
        """Of the model before the first round."""
        if seed not in self.curvatures:
            base = self.base
            self.curvatures[seed] = Curvature.estimate(base.model, base.tokenizer, self.texts, seed=seed)
        return self.curvatures[seed]

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """All rounds by one method, measured three times on the way."""
        editor, settings = METHODS[method]
        loaded, rounds, size = load_model(self.args.model), self.args.rounds, self.args.size
        in_rounds = {} if editor == "crispedit" else {"round_size": size}
        marks = sorted({max(1, rounds * third // 3) for third in (1, 2, 3)})
        found: dict[str, Any] = {}

        def after_round(done: Any) -> None:
            number = -(-done.num_edits // size)
            if number in marks:
                found[str(number)] = self.measured(loaded, number)

        with progress_bars() as progress:
            result = ce.edit(
                loaded.model,
                loaded.tokenizer,
                self.edits,
                editor=editor,
                curvature=self.curvature(seed),
                texts=self.texts,
                seed=seed,
                after_round=after_round,
                progress=progress,
                **{**settings, **in_rounds},
            )
        metrics = result.metrics
        return {
            "method": method,
            "seed": seed,
            "model": self.args.model,
            "edits": self.args.edits,
            "rounds": rounds,
            "size": size,
            "settings": {"editor": editor, **settings},
            "learning_rate": next(iter(metrics["training"]["learning_rates"]), None),
            "steps": metrics["training"]["steps"],
            "refreshed": sum(bool(done.get("refreshed")) for done in metrics["rounds"]),
            "relative_change": max(change["relative"] for change in metrics["matrices"]),
            "seconds": metrics["seconds"]["edit"],
            "after": found,
        }

    def measured(self, loaded: Any, number: int) -> dict[str, Any]:
        """Drift and abilities after a round, and what the model says of some rounds and of all so far."""
        size = self.args.size
        asked: dict[str, Sequence[Edit]] = {
            name: tuple(self.edits)[(of_round - 1) * size : of_round * size]
            for name, of_round in (("first", 1), ("middle", (number + 1) // 2), ("newest", number))
        }
        asked["all"] = spread(tuple(self.edits)[: number * size], 100)
        scores = {name: self._scores(loaded, edits) for name, edits in asked.items()}
        found = measure(
            loaded.model,
            loaded.tokenizer,
            asked["all"][:1],
            base=logits_of(self.base.model),
            texts=self.texts.held_out,
            tasks=True,
        ).summary()["capability"]
        return {"scores": scores, "drift": found["drift"], "tasks": found["tasks"]}

    @staticmethod
    def _scores(loaded: Any, edits: Sequence[Edit]) -> dict[str, float]:
        """Reliability, generalization and locality, of both contexts."""
        found = measure(loaded.model, loaded.tokenizer, edits)
        of_both = measures(found.items(len(edits)))
        return {name: round(of_both[name].value, 2) for name in ("reliability", "generalization", "locality")}

    def timed(self) -> dict[str, Any]:
        """Seconds of all rounds and of one batch, one pair after the other."""
        size, rounds = self.args.size, self.args.rounds
        per_step = max(1, size // 8)
        steps_of_round = -(-size // per_step) * EPOCHS
        epochs = round(rounds * steps_of_round / -(-len(self.edits) // per_step))
        fixed = {"lr": RATE, "batch_size": per_step, "stop_loss": 0.0}
        cases: dict[str, tuple[str, dict[str, Any]]] = {
            "sequential": ("crispedit-seq", {**fixed, "epochs": EPOCHS, "round_size": size}),
            "batch": ("crispedit", {**fixed, "epochs": epochs}),
        }
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        steps: dict[str, int] = {}
        for _ in range(self.args.timing):
            for name, (editor, settings) in cases.items():
                loaded = load_model(self.args.model)
                curvature = Curvature.estimate(loaded.model, loaded.tokenizer, self.texts)  # nothing is known of it yet
                started = time.monotonic()
                result = ce.edit(
                    loaded.model, loaded.tokenizer, self.edits, editor=editor, curvature=curvature, **settings
                )
                took = time.monotonic() - started - result.metrics["seconds"]["proof"]
                seconds[name].append(round(took, 2))
                steps[name] = result.metrics["training"]["steps"]
                print(f"{name}: {took:.1f} s, {steps[name]} steps", flush=True)
        ratios = [one / other for one, other in zip(seconds["sequential"], seconds["batch"], strict=True)]
        return {"seq_time_over_batch": round(statistics.median(ratios), 3), "seconds": seconds, "steps": steps}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is left of rounds, and what they cost, as Markdown; means over seeds."""
    header = "method,after round,reliability: first,middle,newest,of all,generalization of all,locality of all,drift"
    columns = [*header.split(","), "abilities (mean of five)", "seconds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    for method, runs in by_method.items():
        for mark in runs[0]["after"]:
            after = [run["after"][mark] for run in runs]

            def mean(values: Sequence[float]) -> float:
                return sum(values) / len(values)

            cells = [
                *(
                    mean([one["scores"][name]["reliability"] for one in after])
                    for name in ("first", "middle", "newest")
                ),
                *(
                    mean([one["scores"]["all"][kind] for one in after])
                    for kind in ("reliability", "generalization", "locality")
                ),
            ]
            drift = mean([one["drift"] for one in after])
            abilities = mean([mean(list(one["tasks"].values())) for one in after])
            last = mark == list(runs[0]["after"])[-1]
            seconds = f"{mean([run['seconds'] for run in runs]):.0f}" if last else ""
            shown = " | ".join(f"{cell:.1f}" for cell in cells)
            lines.append(f"| {method} | {mark} | {shown} | {drift:.4f} | {abilities:.1f} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="finished runs, one JSON object per line")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(COMPARED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--size", type=int, default=50)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--edits", default="bundled:train")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--timing", type=int, default=0, metavar="N")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if not args.table:
        bench = Bench(args)
        same = {name: getattr(args, name) for name in ("model", "edits", "rounds", "size")}
        for seed in args.seeds:
            for method in args.methods:
                case = {"method": method, "seed": seed, **same}
                if not any(case.items() <= row.items() for row in read(args.out)):
                    record(args.out, case, lambda method=method, seed=seed: bench.run(method, seed))  # type: ignore[misc]
        if args.timing:
            found = bench.timed()
            print(f"seq_time_over_batch {found['seq_time_over_batch']}")
    print(table(read(args.out)))
    if args.json is not None:
        write_json(args.json, {**found, "runs": read(args.out)})


if __name__ == "__main__":
    main()
