"""The grid behind the defaults: layers, learning rates and energies on the bundled model.

    python benchmarks/defaults.py --out runs.jsonl --energies 0 0.9 --lrs auto 1e-3 3e-3 --layers 1-5 3-7
    python benchmarks/defaults.py --table runs.jsonl

Every run edits a fresh copy of the bundled model with the same edits (by default 200 of the `eval` split: the
demo's are not looked at while defaults are chosen), asks everything without context, and measures drift on the
held-out capability texts and the five abilities. A finished run is appended to the file and not repeated.
"""

import itertools
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import runs

from crispedit.bundled import abilities, corpus
from crispedit.capability import bundled_tasks
from crispedit.curvature import Curvature
from crispedit.editing import edit
from crispedit.edits import EditSet
from crispedit.jobs import capability_texts, read_edits
from crispedit.models import load_model, parse_layers
from crispedit.rows import Prompter
from crispedit.texts import split_texts
from crispedit.wild import ask, questions, score

PROBES = 200  # per ability: enough to see a point


def probe_like_texts(count: int) -> list[str]:
    """Capability texts that do share the ability probes' templates, for comparison."""
    import random

    rng = random.Random("shared templates")
    rows = [next(abilities.examples(f, rng)) for _ in range(count // 4) for f in abilities.PROMPTED]
    return [f"{prompt} {answer}" for prompt, answer in rows]


def run(case: dict[str, Any], edits: EditSet, curvatures: dict[Any, Curvature]) -> dict[str, Any]:
    """One edit with one set of settings, measured."""
    loaded = load_model("bundled")
    layers = parse_layers(case["layers"]) if case["layers"] else None
    texts = capability_texts("bundled", None, None, 0)
    assert texts is not None
    if case["texts"] == "probe-like":
        texts = replace(texts, fit=(*texts.fit, *probe_like_texts(400)))
    key = (layers, case["fisher"], case["texts"], case["seed"])
    if case["energy"] and key not in curvatures:
        curvatures[key] = Curvature.estimate(
            loaded.model, loaded.tokenizer, texts, layers=layers, fisher=case["fisher"], seed=case["seed"]
        )
    started = time.monotonic()
    settings = {name: case[name] for name in ("energy", "lr", "epochs") if case[name] is not None}
    settings |= case.get("settings", {})
    result = edit(
        loaded.model,
        loaded.tokenizer,
        edits,
        curvature=curvatures[key] if case["energy"] else None,
        texts=split_texts(corpus.capability_texts(), seed=0),
        layers=layers,
        seed=case["seed"],
        **settings,
    )
    seconds = time.monotonic() - started
    prompter = Prompter.of(loaded.model, loaded.tokenizer)
    asked = questions(edits)
    scores = score(asked, ask(loaded.model, prompter, asked, "no_context"))
    tasks = bundled_tasks(loaded.model, prompter, count=PROBES)
    training = result.metrics["training"]
    return {
        **case,
        **scores,
        "drift": result.metrics["capability"]["drift"],
        "abilities": sum(tasks.values()) / len(tasks),
        "tasks": tasks,
        "lr_max": max(training["learning_rates"]),
        "epochs_run": len(training["epoch_losses"]),
        "losses": [round(loss, 4) for loss in training["epoch_losses"]],
        "seconds": round(seconds, 1),
    }


def table(path: Path) -> None:
    """Prints the runs as a Markdown table, means over seeds."""
    names = ("layers", "energy", "lr", "epochs", "fisher", "texts", "settings")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in runs.read(path):
        groups.setdefault(json.dumps([row.get(name) for name in names]), []).append(row)
    print("| layers | γ | lr | epochs | other | rel | gen | loc | drift | abilities | ran | seeds |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for rows in groups.values():
        r = rows[0]
        other = " ".join(
            str(r.get(n)) for n in ("fisher", "texts", "settings") if r.get(n) not in ("mc", "bundled", {}, None)
        )
        means = {
            n: sum(row[n] for row in rows) / len(rows)
            for n in ("reliability", "generalization", "locality", "drift", "abilities", "epochs_run")
        }
        print(
            f"| {r['layers'] or 'default'} | {r['energy']} | {r['lr']} | {r['epochs'] or 'default'} | {other} "
            f"| {means['reliability']:.1f} | {means['generalization']:.1f} | {means['locality']:.1f} "
            f"| {means['drift']:.4f} | {means['abilities']:.1f} | {means['epochs_run']:.0f} | {len(rows)} |"
        )


def main() -> None:
    """The command line."""
    parser = runs.options(__doc__)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--layers", nargs="+", default=[""])
    parser.add_argument("--energies", nargs="+", type=float, default=[0.0, 0.9])
    parser.add_argument("--lrs", nargs="+", default=["auto"])
    parser.add_argument("--epochs", nargs="+", type=int, default=[None])
    parser.add_argument("--fisher", nargs="+", default=["mc"])
    parser.add_argument("--texts", nargs="+", default=["bundled"], help="bundled or probe-like")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments.table)
        return
    edits = read_edits(arguments.edits, limit=arguments.limit)
    done = runs.read(arguments.out)
    curvatures: dict[Any, Curvature] = {}
    names = ("layers", "energy", "lr", "epochs", "fisher", "texts", "settings", "seed")
    grid = itertools.product(
        arguments.layers,
        arguments.energies,
        [r if r == "auto" else float(r) for r in arguments.lrs],
        arguments.epochs,
        arguments.fisher,
        arguments.texts,
        [json.loads(s) for s in arguments.set],
        arguments.seeds,
    )
    for values in grid:
        case = dict(zip(names, values, strict=True))
        if any(all(row.get(name) == value for name, value in case.items()) for row in done):
            continue
        row = runs.record(arguments.out, case, partial(run, case, edits, curvatures))
        if row is None:
            continue
        shown = ("reliability", "generalization", "locality", "drift", "abilities", "lr_max", "epochs_run", "seconds")
        print(
            {k: v for k, v in case.items() if v not in (None, {}, "")}, {k: round(row[k], 4) for k in shown}, flush=True
        )


if __name__ == "__main__":
    main()
