"""The grids behind the defaults, on the bundled model: layers, rates, energies, and what curvature means.

    python benchmarks/defaults.py --out runs.jsonl --energies 0 0.9 --lrs auto 1e-3 3e-3 --layers 1-5 3-7
    python benchmarks/defaults.py --out runs.jsonl --study --seeds 0 1 2
    python benchmarks/defaults.py --table runs.jsonl

Every run edits a fresh copy of the bundled model with the same edits (by default 200 of the `eval` split: the
demo's are not looked at while defaults are chosen), asks everything without context, and measures drift on the
held-out capability texts and the five abilities. A finished run is appended to the file and not repeated.
"""

import itertools
import json
import random
import statistics
import time
from collections.abc import Iterable
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
from crispedit.inputs import capability_texts, read_edits
from crispedit.models import LoadedModel, load_model, parse_layers
from crispedit.rows import Prompter
from crispedit.texts import CapabilityTexts, split_texts
from crispedit.wild import ask, questions, score

PROBES = 200  # per ability: enough to see a point


def probe_like_texts(count: int) -> list[str]:
    """Capability texts that do share the ability probes' templates, for comparison."""
    rng = random.Random("shared templates")
    rows = [next(abilities.examples(f, rng)) for _ in range(count // 4) for f in abilities.PROMPTED]
    return [f"{prompt} {answer}" for prompt, answer in rows]


def chosen_texts(which: str) -> CapabilityTexts:
    """The bundled texts; with others like the probes; or so many of them, new ones where they do not suffice.

    The held-out texts, on which drift is measured, are the same ones always.
    """
    texts = capability_texts("bundled", None, None, 0)
    assert texts is not None
    if which == "bundled":
        return texts
    if which == "probe-like":
        return replace(texts, fit=(*texts.fit, *probe_like_texts(400)))
    count = int(which)
    more = corpus.capability_texts(corpus.NUM_CAPABILITY_TEXTS + 2 * count)[corpus.NUM_CAPABILITY_TEXTS :]
    fresh = [text for text in dict.fromkeys(more) if text not in {*texts.fit, *texts.held_out}]
    fit = [*texts.fit, *fresh][:count]
    if count > len(texts.fit):
        random.Random(0).shuffle(fit)  # stories and articles take turns: halves by turns would have one kind each
    return replace(texts, fit=tuple(fit))


def curvature_of(case: dict[str, Any], loaded: LoadedModel, kept: dict[Any, Curvature]) -> Curvature:
    """The curvature of a case, estimated once."""
    texts = chosen_texts(case["texts"])
    layers = parse_layers(case["layers"]) if case["layers"] else None
    options = {"fisher": case["fisher"], "factors": case["factors"], "seed": case["seed"]}
    key = (layers, case["texts"], *options.values())
    if key not in kept:
        kept[key] = Curvature.estimate(loaded.model, loaded.tokenizer, texts, layers=layers, **options)
    if case["settings"].get("constraint") == "ekfac" and not kept[key].spectra.second_moments:
        kept[key].measure_second_moments(loaded.model, loaded.tokenizer, texts.fit)
    return kept[key]


def run(case: dict[str, Any], edits: EditSet, curvatures: dict[Any, Curvature]) -> dict[str, Any]:
    """One edit with one set of settings, measured."""
    loaded = load_model("bundled")
    curvature = curvature_of(case, loaded, curvatures) if case["energy"] else None
    started = time.monotonic()
    settings = {name: case[name] for name in ("energy", "lr", "epochs") if case[name] is not None}
    result = edit(
        loaded.model,
        loaded.tokenizer,
        edits,
        curvature=curvature,
        texts=split_texts(corpus.capability_texts(), seed=0),
        layers=parse_layers(case["layers"]) if case["layers"] else None,
        seed=case["seed"],
        **settings,
        **case["settings"],
    )
    seconds = time.monotonic() - started
    prompter = Prompter.of(loaded.model, loaded.tokenizer)
    asked = questions(edits)
    given = ask(loaded.model, prompter, asked, "no_context")
    scores = score(asked, [answer.text for answer in given])
    tasks = bundled_tasks(loaded.model, prompter, count=PROBES)
    training = result.metrics["training"]
    outside = [of_matrix["outside"] for of_matrix in result.metrics["matrices"]]
    return {
        **case,
        **scores,
        "drift": result.metrics["capability"]["drift"],
        "abilities": sum(tasks.values()) / len(tasks),
        "tasks": tasks,
        "tokens": curvature.num_tokens if curvature else None,
        "overlap": _mean_of(curvature, "overlap"),
        "transfer": _mean_of(curvature, "transfer"),
        "outside": None if None in outside else max(outside),
        "lr_max": max(training["learning_rates"]),
        "epochs_run": len(training["epoch_losses"]),
        "losses": [round(loss, 4) for loss in training["epoch_losses"]],
        "seconds": round(seconds, 1),
    }


def _mean_of(curvature: Curvature | None, name: str) -> float | None:
    """A number of a curvature's descriptions, averaged over its matrices."""
    values = [getattr(d, name) for d in curvature.description.values()] if curvature else []
    return statistics.mean(values) if values and None not in values else None


CASE = {
    "layers": "",
    "energy": 0.9,
    "lr": "auto",
    "epochs": None,
    "fisher": "mc",
    "texts": "bundled",
    "settings": {},
    "factors": "dense",
}


def curvature_study() -> list[dict[str, Any]]:
    """What curvature means: energies, constraints, update rules, Fisher types, numbers of texts; each apart."""

    def cases(energies: Iterable[float], **changes: Any) -> list[dict[str, Any]]:
        return [{**CASE, **changes, "energy": energy} for energy in energies]

    constraints = [
        *cases((0.9, 0.95), settings={"constraint": "cross"}),
        *cases((0.8, 0.9, 0.95, 0.99), settings={"constraint": "ekfac"}),
        *cases((0.9, 0.95, 0.99), settings={"constraint": "inputs"}),
    ]
    updates = [
        *cases((1e-9,)),  # one pair of half a million is left out: Adam in the eigenbasis, and little else
        *cases((0.8, 0.9), settings={"update": "projected-gradient"}),
        *cases((0.9,), settings={"update": "projected"}),
        *cases((0.8, 0.9), settings={"update": "filter"}),
        *cases((0.9,), settings={"constraint": "ekfac", "update": "filter"}),
        *cases((0.9,), settings={"update": "update-projected"}),
        *cases((0.9,), settings={"constraint": "cross", "update": "update-projected"}),
        *cases((0.8, 0.9), settings={"constraint": "cross", "update": "projected"}),
        *cases((0.8, 0.9), settings={"constraint": "cross", "update": "leading", "rotation": 1.3}),
        *cases((0.9,), factors="sketch", settings={"update": "projected"}),
        *cases((0.9,), factors="sketch", settings={"update": "leading", "rotation": 1.3}),
    ]
    return [
        *cases((0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999)),
        *constraints,
        *updates,
        *cases((0.9,), fisher="empirical"),
        *(case for count in (10, 30, 100, 1000, 3000, 10000) for case in cases((0.9,), texts=str(count))),
    ]


def table(path: Path) -> None:
    """Prints the runs as a Markdown table, means over seeds, with the standard deviation of the drift."""
    names = tuple(CASE)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in runs.read(path):
        groups.setdefault(json.dumps([row.get(name) for name in names]), []).append(row)
    tasks = (*abilities.PROMPTED, "prose")
    print(
        f"| γ | other | rel | gen | loc | drift | {' | '.join(t.replace('_', ' ') for t in tasks)} | epochs | seeds |"
    )
    print("|---" * (8 + len(tasks)) + "|")
    for rows in groups.values():
        r = rows[0]
        shown = {name: r.get(name) for name in names if name != "energy" and r.get(name) != CASE[name]}
        other = ", ".join(f"{v}" if isinstance(v, str) else " ".join(map(str, v.values())) for v in shown.values() if v)
        mean = {n: statistics.mean(row[n] for row in rows) for n in ("reliability", "generalization", "locality")}
        drifts = [row["drift"] for row in rows]
        spread = f" ± {statistics.stdev(drifts):.4f}" if len(drifts) > 1 else ""
        print(
            f"| {r['energy']} | {other} | {mean['reliability']:.1f} | {mean['generalization']:.1f} "
            f"| {mean['locality']:.1f} | {statistics.mean(drifts):.4f}{spread} | "
            + " | ".join(f"{statistics.mean(row['tasks'][task] for row in rows):.1f}" for task in tasks)
            + f" | {statistics.mean(row['epochs_run'] for row in rows):.0f} | {len(rows)} |"
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
    parser.add_argument("--texts", nargs="+", default=["bundled"], help="bundled, probe-like, or a number of texts")
    parser.add_argument("--study", action="store_true", help="the study of curvature in place of the grid: hours")
    parser.add_argument("--factors", nargs="+", default=["dense"], help="dense or sketch")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments.table)
        return
    edits = read_edits(arguments.edits, limit=arguments.limit)
    done = runs.read(arguments.out)
    curvatures: dict[Any, Curvature] = {}
    grid = itertools.product(
        arguments.layers,
        arguments.energies,
        [r if r == "auto" else float(r) for r in arguments.lrs],
        arguments.epochs,
        arguments.fisher,
        arguments.texts,
        [json.loads(s) for s in arguments.set],
        arguments.factors,
    )
    cases = curvature_study() if arguments.study else [dict(zip(CASE, values, strict=True)) for values in grid]
    for seed, case in itertools.product(arguments.seeds, cases):
        case = {**case, "seed": seed}
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
