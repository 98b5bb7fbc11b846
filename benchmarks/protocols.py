"""The same models by every protocol: how much more teacher forcing says than what a model answers by itself.

    python benchmarks/protocols.py --json protocols.json
    python benchmarks/protocols.py --edits zsre_3k.json --editors ultraedit crispedit
    python benchmarks/protocols.py --editors ft,epochs=4 ft

The bundled model is edited by every editor that is named, NAME[,SETTING=VALUE…], with its defaults but for these
settings. It and the edited models are then asked about the edits: freely, without and with the question-answering
context, judged by ``exact`` and ``contains`` and by the published stop rule with ``exact``; and teacher-forced. Of
CounterFact, efficacy is measured too: the new target likelier than the old one.

Printed is a Markdown table of reliability / generalization / locality / agreement with the base, in percent. Agreement
is the share of locality prompts that get the base model's answer; teacher-forced, that of tokens with the same first
choice. Below it stands how much higher teacher-forced reliability and generalization are than those of free answers
(``exact``, without a context), in points, with paired intervals.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crispedit.console import percent, progress_bars
from crispedit.edit_job import EditJob
from crispedit.edits import Edit, EditSet
from crispedit.evaluation import Evaluation, measure
from crispedit.inputs import read_edits
from crispedit.judge import Judge, contains, exact, normalise
from crispedit.models import BUNDLED, frozen, load_model
from crispedit.progress import Progress
from crispedit.settings import parse_settings
from crispedit.statistics import Difference, Measure, Stratum, differences
from crispedit.teacher_forced import locality_choices
from crispedit.tradeoff import KINDS
from crispedit.wild import CONTEXTS, items_of, judge_answers, mean_scores, questions

CONTEXT_NAMES = {"no_context": "", "qa_context": ", QA context"}
Scores = dict[str, float | None]


@dataclass(frozen=True)
class Said:
    """What a model said of the edits: with our end of an answer, and teacher-forced; and with the published end."""

    own: Evaluation
    published: Evaluation


def ask(model: Any, tokenizer: Any, edits: EditSet, choices: Any, progress: Progress) -> Said:
    """Asks a model everything; ``choices`` are the base's, for agreement."""
    shared: dict[str, Any] = {"progress": progress}
    return Said(
        measure(model, tokenizer, edits, protocol="all", base_choices=choices, **shared),
        measure(model, tokenizer, edits, stop_at_period=True, **shared),
    )


def by_protocol(said: Said, base: Said, edits: Sequence[Edit]) -> dict[str, Scores]:
    """By protocol, the scores of a model and its agreement with the base on locality prompts, in percent."""
    rows = {}
    for rule, found, before, judge in (
        ("exact", said.own, base.own, exact),
        ("contains", said.own, base.own, contains),
        ("exact, published stop", said.published, base.published, exact),
    ):
        for context, scores in free_scores(found, before, edits, judge).items():
            rows[f"free, {rule}{CONTEXT_NAMES[context]}"] = scores
    assert said.own.forced is not None
    details = said.own.forced.details()
    by = f" (locality by {details['locality']})" if details["locality"] == "likelihood" else ""
    rows[f"teacher-forced{by}"] = mean_scores(said.own.forced.items) | {"agreement": details["agreement"]}
    if details["efficacy"] is not None:
        efficacy = {"reliability": details["efficacy"], "generalization": details["paraphrase_efficacy"]}
        rows["teacher-forced, new likelier than old"] = efficacy
    return rows


def free_scores(found: Evaluation, base: Evaluation, edits: Sequence[Edit], judge: Judge) -> dict[str, Scores]:
    """By context, scores of free answers, and how many locality prompts have the base's answer."""
    asked = questions(edits)
    verdicts, _ = judge_answers(asked, found.answers, judge, base.answers)
    near = [index for index, question in enumerate(asked) if question.kind == "locality"]
    rows: dict[str, Scores] = {}
    for context in CONTEXTS:
        given, its = found.answers[context], base.answers[context]
        same = items_of([asked[i] for i in near], [normalise(given[i]) == normalise(its[i]) for i in near])
        scores = mean_scores(items_of(asked, verdicts[context]))
        rows[context] = scores | {"agreement": mean_scores(same)["locality"]}
    return rows


def overstated(found: Evaluation) -> dict[str, Difference]:
    """Teacher-forced scores less those of free answers (exact, no context): points, paired edit by edit."""
    assert found.forced is not None
    more = {}
    for kind in ("reliability", "generalization"):
        both = [found.edits["no_context"][kind], found.forced.items[kind]]
        if not both[0]:  # edits without rephrases
            continue
        measures = [Measure((Stratum.of([100 * one[edit] for edit in sorted(one)]),), span=100) for one in both]
        more[kind] = differences(measures, 0)[1]
    return more


def cases(editors: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of every editor, what it is called in the table, its name and its settings."""
    for given in editors:
        name, *settings = given.split(",")
        yield " ".join([name, *settings]), name, parse_settings(settings)


def table(found: Mapping[str, Mapping[str, Scores]]) -> list[str]:
    """The lines of the Markdown table: a row for every protocol, a column for every model."""
    lines = [["protocol", *found], ["---"] * (1 + len(found))]
    for protocol in found["base"]:
        cells = [
            " / ".join(percent(rows[protocol].get(kind)) for kind in (*KINDS, "agreement")) for rows in found.values()
        ]
        lines.append([protocol, *cells])
    return ["| " + " | ".join(line) + " |" for line in lines]


def main() -> None:
    """Edits, asks, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", default="bundled:demo", help="a file of edits, or bundled:demo, bundled:eval")
    parser.add_argument("--limit", type=int, default=200, help="the first so many edits")
    parser.add_argument("--editors", nargs="+", default=["ultraedit", "crispedit"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the scores and the differences to this file too")
    options = parser.parse_args()
    edits = read_edits(options.edits, limit=options.limit, conflicts="first")
    loaded = load_model(BUNDLED)
    found: dict[str, dict[str, Scores]] = {}
    more: dict[str, dict[str, Difference]] = {}
    settings_of: dict[str, Any] = {}
    with progress_bars(keep=False) as progress:
        with frozen(loaded.model):
            choices = locality_choices(loaded.model, loaded.tokenizer, edits, progress=progress)
        base = ask(loaded.model, loaded.tokenizer, edits, choices, progress)
        found["base"], more["base"] = by_protocol(base, base, edits), overstated(base.own)
        for called, editor, settings in cases(options.editors):
            job = EditJob(
                model=BUNDLED,
                edits=options.edits,
                editor=editor,
                settings=settings,
                limit=options.limit,
                conflicts="first",
                seed=options.seed,
            )
            edited = job.run(progress=progress)
            settings_of[called] = edited.settings
            said = ask(edited.model, loaded.tokenizer, edits, choices, progress)
            found[called], more[called] = by_protocol(said, base, edits), overstated(said.own)
    print(f"{len(edits)} edits from {Path(options.edits).name}, seed {options.seed}", end="\n\n")
    print("\n".join(table(found)), end="\n\n")
    for called, kinds in more.items():
        said_more = (f"{kind} {d.value:+.1f} [{d.low:+.1f}, {d.high:+.1f}]" for kind, d in kinds.items())
        print(f"{called}, teacher-forced less free answers: {', '.join(said_more)}")
    if options.json is not None:
        record = {
            "edits": Path(options.edits).name,
            "count": len(edits),
            "settings": settings_of,
            "scores": found,
            "teacher_forced_less_free": {
                called: {kind: asdict(difference) for kind, difference in kinds.items()}
                for called, kinds in more.items()
            },
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
