"""What ``evaluate`` and ``compare`` print: scores, differences, tasks, editors side by side."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .console import number, out, percent, print_table

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from .tradeoff import Comparison

_CONTEXT_NAMES = {"no_context": "", "qa_context": ", in context", "teacher_forced": ", teacher-forced"}
_LOCALITY_NAMES = {"token accuracy": "", "likelihood": " by likelihood"}
_DETAIL_NAMES = {
    "agreement": "agreement with the base model, %",
    "efficacy": "efficacy, new likelier than old, %",
    "paraphrase_efficacy": "paraphrase efficacy, %",
}


def print_evaluations(title: str, columns: dict[str, dict[str, Any]]) -> None:
    """Evaluations of the same edits side by side, one column each."""
    from .tradeoff import KINDS

    rows = []
    for context, said in _CONTEXT_NAMES.items():
        found = [e[context] for e in columns.values()]
        if None not in found:
            for kind in KINDS:
                what = kind + said
                if context == "teacher_forced" and kind == "locality":
                    what += _LOCALITY_NAMES[next(iter(columns.values()))["teacher_forced_details"]["locality"]]
                rows.append([f"{what}, %", *(percent(scores[kind]) for scores in found)])
    for name, said in _DETAIL_NAMES.items():
        values = [e.get("teacher_forced_details", {}).get(name) for e in columns.values()]
        if any(value is not None for value in values):
            rows.append([said, *map(percent, values)])
    if any(e["capability"]["loss"] is not None for e in columns.values()):
        rows.append(["drift, nats/token", *(number(e["capability"]["drift"]) for e in columns.values())])
        rows.append(["capability loss, nats/token", *(number(e["capability"]["loss"]) for e in columns.values())])
    scores = [e["capability"]["tasks"] or {} for e in columns.values()]
    apart = {
        task for e in columns.values() for task in e.get("harness", {}).get("tasks", {})
    }  # in a table of their own
    for task in dict.fromkeys(task for of_model in scores for task in of_model if task not in apart):
        rows.append([f"{task.replace('_', ' ')}, %", *(percent(of_model.get(task)) for of_model in scores)])
    judged = [e["judge"] for e in columns.values() if e["judge"] is not None]
    if len(judged) == len(columns) and any(about["name"] != "exact" for about in judged):
        rows.append(["answers judged", *(f"{about['cases'] - about['unjudged']:,}" for about in judged)])
        rows.append(["answers not judged", *(f"{about['unjudged']:,}" for about in judged)])
        rows.append(["agreement with exact match, %", *(percent(about["agreement_with_exact"]) for about in judged)])
    print_table(title, ["", *columns], rows)


def print_differences(rows: Sequence[Mapping[str, Any]]) -> None:
    """Differences to the base model (:func:`crispedit.paired.measure_rows`), and what their intervals say."""
    from .paired import SMALL, could_have_shown, rounded, small_loss
    from .statistics import LEVEL

    shown = [row for row in rows if row["difference"] is not None]
    cells = []
    for row in shown:
        value, low, high = (rounded(row["difference"][name], row["digits"], "+") for name in ("value", "low", "high"))
        title = f"{row['title']}, {row['unit'].replace('%', 'points')}"
        cells.append([title, value, f"[{low}, {high}]", could_have_shown(row)])
    print_table(
        "less the base model, item by item",
        ["", "difference", f"{100 * LEVEL:g} % interval", "could have shown"],
        cells,
    )
    small = [row["title"] for row in shown if small_loss(row)]
    if small:
        out.print(f"a loss, if any, below {SMALL:g} point by these intervals: {'; '.join(small)}", soft_wrap=True)


def print_budget(found: Mapping[str, Any] | None) -> None:
    """The certificate of an edit within a budget, checked again (:meth:`crispedit.evaluate_job.Evaluated.budget`)."""
    from .report_verdict import certificate

    if found is not None:
        out.print(f"Damage budget: {certificate(found)}", soft_wrap=True)


def print_judged(about: dict[str, Any]) -> None:
    """Where a judge and exact match differ; of answers that were not judged, why."""
    if about["name"] == "exact":
        return
    both, judge, exact, neither = about["beside_exact"].values()
    out.print(
        f"right to both the judge and exact match: {both:,}; to the judge alone: {judge:,}; "
        f"to exact match alone: {exact:,}; to neither: {neither:,}",
        soft_wrap=True,
    )
    if about["unjudged"]:
        out.print(
            f"{about['unjudged']:,} answers were not judged and are in no score: of the distinct cases among them, "
            f"{about['unreadable']:,} had a reply that is no verdict, and {about['failed']:,} a call that failed",
            soft_wrap=True,
        )


def print_tasks(harness: dict[str, Any]) -> None:
    """Tasks of lm-evaluation-harness: their scores, beside the base model's where there is one, and what that says."""
    from .statistics import Difference
    from .tradeoff import claim, interval

    found = harness["tasks"]
    columns = ["base", "score"] if any(task["base"] is not None for task in found.values()) else ["score"]
    print_table(
        f"lm-evaluation-harness {harness['lm_eval']}, scores in %",
        ["", "shots", "documents", *(column.replace("score", "model") for column in columns)],
        [
            [name, str(task["shots"]), str(task["documents"]), *(percent(task[column]) for column in columns)]
            for name, task in found.items()
        ],
    )
    if len(columns) > 1:
        out.print(f"less the base model, with {100 * harness['level']:g} % intervals of the paired differences:")
    wide = max(map(len, found))
    for name, task in found.items():
        of_filter = "" if task["filter"] == "none" else f", {task['filter']}"
        said = f"{task['metric']}{of_filter}"
        if task["difference"] is not None:
            difference = Difference(**task["difference"])
            said = f"{interval(name, difference).strip('*')}  {claim(name, difference)}  ({said})"
        out.print(f"  {name:<{wide}}  {said}", soft_wrap=True)


def print_comparison(found: "Comparison") -> None:
    """What editors gain and cost, what can be said of it, and which of them failed."""
    from .statistics import LEVEL
    from .tradeoff import ON_FRONT

    shared = found.shared
    title = f"{shared['model']} on {shared['edits']['source']}, judge: {shared['judge']}; scores in %"
    print_table(title, *found.table(wide=False))
    if found.kept:
        out.print(f"{ON_FRONT}: on the Pareto front of edit success and that column", soft_wrap=True)
    name, claims = found.claims()
    if claims:
        said = f"{name}, against the base model, with {100 * LEVEL:g} % intervals of the paired differences:"
        out.print(said, soft_wrap=True)
    for editor, difference, said in claims:
        wide = max(len(claim[0]) for claim in claims), max(len(claim[1]) for claim in claims)
        out.print(f"  {editor:<{wide[0]}}  {difference:<{wide[1]}}  {said}", soft_wrap=True)
    for index in found.failed:
        out.print(f"{found.names[index]} failed: {found.rows[index].record['reason']}", soft_wrap=True)
