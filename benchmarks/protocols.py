"""The same models by every protocol: how much more teacher forcing says than what a model answers by itself.

    python benchmarks/protocols.py --json protocols.json
    python benchmarks/protocols.py --edits zsre_3k.json --editors ultraedit crispedit
    python benchmarks/protocols.py --editors ft,epochs=4 ft

The bundled model is edited by every editor that is named, NAME[,SETTING=VALUE…], with its defaults but for these
settings. It and the edited models are then asked about the edits: freely, without and with the question-answering
context, judged by ``exact`` and ``contains`` and by the published stop rule with ``exact``; and teacher-forced. Of
CounterFact, efficacy is measured too: the new target likelier than the old one.

Printed is a Markdown table, scores in percent; *as the base* is the share of locality prompts with the base model's
answer, and of teacher forcing its agreement with the base model's first choices. Below it stands how much higher
teacher-forced reliability is than that of free answers without a context, in points, with a paired interval.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crispedit.console import progress_bars
from crispedit.edits import Edit, EditSet
from crispedit.evaluation import Evaluation, measure
from crispedit.jobs import EditJob, read_edits
from crispedit.judge import Judge, contains, exact, normalise
from crispedit.models import BUNDLED, frozen, load_model
from crispedit.progress import Progress
from crispedit.settings import parse_settings
from crispedit.statistics import Difference, Measure, Stratum, differences
from crispedit.teacher_forced import locality_choices
from crispedit.tradeoff import KINDS
from crispedit.wild import CONTEXTS, items_of, judge_answers, mean_scores, questions

CONTEXT_NAMES = {"no_context": "", "qa_context": ", QA context"}
HEADER = ["model", "protocol", *(f"{kind}, %" for kind in KINDS), "as the base, %"]
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


def overstated(found: Evaluation) -> Difference:
    """Teacher-forced reliability less that of free answers (exact, no context): points, paired edit by edit."""
    assert found.forced is not None
    both = [found.edits["no_context"]["reliability"], found.forced.items["reliability"]]
    measures = [Measure((Stratum.of([100 * one[edit] for edit in sorted(one)]),), span=100) for one in both]
    return differences(measures, 0)[1]


def cases(editors: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of every editor, what it is called in the table, its name and its settings."""
    for given in editors:
        name, *settings = given.split(",")
        yield " ".join([name, *settings]), name, parse_settings(settings)


def table(found: Mapping[str, Mapping[str, Scores]]) -> list[str]:
    """The lines of the Markdown table."""
    lines = [HEADER, ["---", "---", *["---:"] * (len(HEADER) - 2)]]
    for model, rows in found.items():
        for protocol, scores in rows.items():
            values = [scores.get(kind) for kind in (*KINDS, "agreement")]
            lines.append([model, protocol, *("–" if value is None else f"{value:.1f}" for value in values)])
    return ["| " + " | ".join(line) + " |" for line in lines]


def main() -> None:
    """Edits, asks, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", default="bundled:demo", help="a file of edits, or bundled:demo, bundled:eval")
    parser.add_argument("--limit", type=int, default=200, help="the first so many edits")
    parser.add_argument("--editors", nargs="+", default=["ultraedit", "crispedit,eos=false", "crispedit"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the scores and the differences to this file too")
    options = parser.parse_args()
    edits = read_edits(options.edits, limit=options.limit, conflicts="first")
    loaded = load_model(BUNDLED)
    found: dict[str, dict[str, Scores]] = {}
    more: dict[str, Difference] = {}
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
            said = ask(job.run(progress=progress).model, loaded.tokenizer, edits, choices, progress)
            found[called], more[called] = by_protocol(said, base, edits), overstated(said.own)
    print(f"{len(edits)} edits from {Path(options.edits).name}, seed {options.seed}", end="\n\n")
    print("\n".join(table(found)), end="\n\n")
    for called, difference in more.items():
        ends = f"[{difference.low:+.1f}, {difference.high:+.1f}]"
        print(
            f"{called}: teacher-forced reliability is {difference.value:+.1f} points {ends} beside that of free answers"
        )
    if options.json is not None:
        record = {
            "edits": Path(options.edits).name,
            "count": len(edits),
            "scores": found,
            "teacher_forced_less_free": {called: asdict(difference) for called, difference in more.items()},
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
