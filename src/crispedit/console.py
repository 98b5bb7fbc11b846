"""What a person sees: progress on stderr, tables on stdout. Only the command line imports this."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from . import ranks
from .progress import Progress as ProgressCallback
from .progress import log

if TYPE_CHECKING:  # torch and transformers take seconds to import: a list of rounds needs neither
    from .costs import Shape
    from .curvature import Curvature
    from .editing import EditResult
    from .planning import Fit, Plan
    from .tradeoff import Comparison

# only the main process of several shows anything
out = Console(highlight=False, markup=False, quiet=not ranks.is_main())
err = Console(stderr=True, highlight=False, markup=False, quiet=not ranks.is_main())


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        """The rate so far."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g}/s" if speed else "")


@contextmanager
def progress_bars(*, keep: bool = True) -> Iterator[ProgressCallback]:
    """Progress bars on stderr, one for each kind of step; silent where stderr is no terminal.

    Args:
        keep: Whether bars stay when their step is done.

    Yields:
        The callback that every long step reports to.
    """
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal or err.quiet) as bars:
        running: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in running:
                running[what] = bars.add_task(what, total=total)
            bars.update(running[what], completed=done, total=total)
            if done >= total:
                finished = running.pop(what)
                if not keep:
                    bars.remove_task(finished)

        lines = _Lines(logging.INFO)
        log.addHandler(lines)
        log.setLevel(logging.INFO)
        try:
            yield report
        finally:
            log.removeHandler(lines)


class _Lines(logging.Handler):
    """Shows the package's log as lines on stderr, between the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        err.print(record.getMessage(), soft_wrap=True)


def percent(value: float | None) -> str:
    """A percentage with one decimal, or a dash."""
    return "–" if value is None else f"{value:.1f}"


def number(value: float | None) -> str:
    """A small number with four decimals, or a dash."""
    return "–" if value is None else f"{value:.4f}"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)


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


def print_texts(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of texts on stdout, which are folded where the terminal is narrow; names in the first column are not."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", show_lines=True)
    for index, name in enumerate(header):
        table.add_column(name, no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)


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


def print_curvature(curvature: "Curvature") -> None:
    """The curvature of every matrix in a few numbers, and whether the texts were enough."""
    rows = []
    for layer, name in zip(curvature.layers, curvature.factors, strict=True):
        d = curvature.description[name]
        ranks = " × ".join(f"{rank:.1f}" for rank in reversed(d.effective_rank))
        compared = ["–" if x is None else f"{x:.3f}" for x in (d.overlap, d.transfer)]
        rows.append([str(layer), ranks, f"{d.energy:g}", f"{100 * d.share:.1f}", *compared])
    title = f"{curvature.fisher} Fisher, {curvature.num_tokens:,} tokens, {curvature.kind} factors"
    print_table(title, ["layer", "effective rank, G × A", "γ", "protected, %", "overlap", "transfer"], rows)
    out.print(
        "protected: share of directions in the cross that holds γ of the curvature. Two halves of the texts give two "
        "crosses; overlap: how far they are the same (1 is all); transfer: the curvature of one half that the other "
        "half's cross holds. Where transfer is far below γ, more texts would help.",
        soft_wrap=True,
    )


def print_patch(name: str, manifest: dict[str, Any]) -> None:
    """What a patch is for, and what it changes; ``manifest`` as :func:`crispedit.patch.read_manifest` gives it."""
    parts = manifest["about"].get("stacked", [manifest["about"]])
    print_table(
        f"{name}: {len(parts)} patches in one" if len(parts) > 1 else name,
        ["model", "editor", "edits", "from"],
        [
            [
                part.get("model", "–"),
                part.get("editor", f"the difference to {part['result']}" if "result" in part else "–"),
                str(part.get("edits", {}).get("count", "–")),
                part.get("edits", {}).get("source", "–"),
            ]
            for part in parts
        ],
    )
    entries = {tensor: prod(shape) for tensor, shape in manifest["shapes"].items()}
    print_table(
        f"{len(entries)} of {len(manifest['base'])} tensors, {sum(entries.values()):,} weights",
        ["changed", "shape", "stored as"],
        [[tensor, " × ".join(map(str, manifest["shapes"][tensor])), manifest["dtypes"][tensor]] for tensor in entries],
    )


def print_session(found: dict[str, Any]) -> None:
    """What a session is and how its rounds went, as ``crispedit session status`` finds it."""
    rounds = found["rounds"]
    print_table(
        f"{found['directory']}: {found['model']}, {found['editor']}, blocks "
        f"{', '.join(map(str, found['edited_layers']))}; {size(found['bytes'])}",
        ["round", "reliability, %", "today, %", "drift, nats/token"],
        [
            [
                f"{record['number']}: {record['edits']['count']} edits from {record['edits']['source']}"
                + (" (kept)" if record["kept"] else ""),
                percent(record["metrics"]["after"]["reliability"]),
                percent(rounds[-1]["past"].get(str(record["number"]), {}).get("reliability")),
                number(record["drift"]["drift"] if record["drift"] else None),
            ]
            for record in rounds
        ],
    )
    if not rounds:
        out.print(f"no rounds yet: crispedit session edit {found['directory']} EDITS", soft_wrap=True)
    if found["pending"]:
        out.print(
            f"{found['pending']} rounds are still to be made again; the next edit begins with them", soft_wrap=True
        )
    for line in found.get("damaged", []):
        out.print(line, soft_wrap=True)


def print_session_evaluation(directory: str, found: dict[str, Any]) -> None:
    """What the model says of every round's edits, as ``crispedit session evaluate`` finds it."""
    from .tradeoff import KINDS

    for context, said in (("no_context", ""), ("qa_context", ", in a question")):
        print_table(
            f"{directory} after round {found['round']}{said}, %, judge: {found['judge']['name']}",
            ["round", *KINDS],
            [
                [
                    f"{of_round['number']}: {of_round['count']} edits from {of_round['source']}",
                    *(percent((of_round[context] or {}).get(kind)) for kind in KINDS),
                ]
                for of_round in found["rounds"]
            ],
        )
    missing = [str(of_round["number"]) for of_round in found["rounds"] if of_round["no_context"] is None]
    if missing:
        out.print(f"edits of rounds {', '.join(missing)} were not kept: give their files by --edits", soft_wrap=True)
    capability = found["capability"]
    rows = [
        [f"{name}, nats/token", number(capability[key])]
        for name, key in (("drift from the base", "drift"), ("drift that its curvature predicts", "predicted"))
        if capability.get(key) is not None
    ]
    rows += [[f"{task.replace('_', ' ')}, %", percent(score)] for task, score in (capability["tasks"] or {}).items()]
    if rows:
        print_table("What all rounds cost", ["", ""], rows)


def print_adapter(record: dict[str, Any]) -> None:
    """What an adapter holds of a change, and what is lost with it, as ``crispedit session export`` finds it."""
    print_table(
        "The adapter",
        ["matrix", "rank", "share of ‖ΔW‖²"],
        [[name, str(rank), f"{record['energy'][name]:.3f}"] for name, rank in record["ranks"].items()],
    )
    both = record["exact"], record["adapter"]
    rows = [
        [f"reliability of round {key}, %", *(percent(one["past"][key]["reliability"]) for one in both)]
        for key in both[0]["past"]
    ]
    if both[0]["drift"] is not None:
        rows.append(["drift from the base, nats/token", *(number(one["drift"]["drift"]) for one in both)])
    if rows:
        print_table("What it loses", ["", "exact", "adapter"], rows)


def print_second_order(result: dict[str, Any]) -> None:
    """Constraints by the area under their trade-off, and the paper's findings, as ``crispedit lenet`` finds them."""
    found, networks = result["constraints"], result["networks"]
    low, high = (100 * x for x in result["range"])
    print_table(
        f"{len(networks)} networks, capability {100 * result['pretrain_accuracy']:.2f} %; "
        f"areas over edit accuracies of {low:.1f} to {high:.1f} %; edits with a point of capability lost",
        ["constraint", "area", "95 % interval", "edits, %", "95 % interval"],
        [
            [
                one["title"],
                f"{one['auc']:.4f}",
                f"{one['low']:.4f} to {one['high']:.4f}",
                percent(100 * one["within_a_point"]["value"]),
                f"{100 * one['within_a_point']['low']:.1f} to {100 * one['within_a_point']['high']:.1f}",
            ]
            for one in sorted(found.values(), key=lambda one: -one["auc"])
        ],
    )
    for name, difference in result["differences"].items():
        ends = f"{difference['low']:+.4f} to {difference['high']:+.4f}"
        out.print(f"  {name:<18} {difference['value']:+.4f} ({ends})", soft_wrap=True)
    for name, finding in result["findings"].items():
        numbers = ", ".join(
            f"{key.replace('_', ' ')} {value:+.4f}" for key, value in finding.items() if key != "confirmed"
        )
        said = "confirmed" if finding["confirmed"] else "not confirmed"
        out.print(f"finding ({name}) of the paper: {said}; {numbers}", soft_wrap=True)


def print_training(record: dict[str, Any]) -> None:
    """How the training of a hypernetwork went."""
    training = record["training"]
    columns = {
        "first tenth": training["losses"]["first"],
        "last tenth": training["losses"]["last"],
        f"{training['held_out_edits']} edits held out": training["held_out"],
    }
    names = {"edit_loss": "edit loss, nats/token", "divergence": "divergence where answers stay, nats/token"}
    print_table(
        f"hypernetwork: {training['steps']} steps on {training['train_edits']} edits, layers "
        + ", ".join(map(str, record["layers"])),
        ["", *columns],
        [[name, *(number(values.get(key)) for values in columns.values())] for key, name in names.items()],
    )


def size(num_bytes: int) -> str:
    """Bytes with a unit, three digits."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def duration(seconds: float | None) -> str:
    """Seconds with a unit, or a dash."""
    if seconds is None:
        return "–"
    for unit, factor in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def tera(flops: int) -> str:
    """Flops in units of 10¹², or a dash."""
    return "–" if not flops else f"{flops / 1e12:,.0f}" if flops >= 1e14 else f"{flops / 1e12:.3g}"


TIMES = (
    " Times are an estimate, from flops and two seconds of measuring: of all epochs and answers of full length, where "
    "a run may end early."
)


def print_plan(plan: "Plan", title: str) -> None:
    """What an edit will take: its matrices, memory and time by stage, disk, and whether it fits."""
    shapes: dict[Shape, list[str]] = {}
    for layer, (_, shape) in zip(plan.settings.layers, plan.matrices, strict=True):
        shapes.setdefault(shape, []).append(str(layer))
    for (d_out, d_in), layers in shapes.items():
        name = plan.matrices[0][0].split(".", 1)[-1].rpartition(".")[0].split(".")[-1]
        out.print(f"edited: {name} of layers {', '.join(layers)}, {d_out} × {d_in} each", soft_wrap=True)
    rows = [[stage.name, size(stage.num_bytes), tera(stage.flops), duration(stage.seconds)] for stage in plan.stages]
    flops = sum(stage.flops for stage in plan.stages)
    rows.append(["in all", size(plan.peak.num_bytes), tera(flops), duration(plan.seconds)])
    print_table(title, ["stage", "peak memory", "TFLOP", "time"], rows)
    out.print("disk: " + "; ".join(f"{name} {size(taken)}" for name, taken in plan.disk.items()), soft_wrap=True)
    settings = plan.settings
    dtype = str(settings.dtype).removeprefix("torch.")
    out.print(
        f"{dtype}, {settings.kind} factors, update {', '.join(plan.updates)}, at most {plan.steps:,} steps."
        + (TIMES if plan.seconds is not None else ""),
        soft_wrap=True,
    )
    for note in plan.notes:
        out.print(note, soft_wrap=True)
    if plan.fit is not None:
        out.print(_fit_line(plan.fit), soft_wrap=True)
    if plan.compared:
        _print_methods(plan)


def _print_methods(plan: "Plan") -> None:
    """What other methods take, and the devices that they fit."""
    rows = []
    for method in plan.compared:
        flops = tera(sum(stage.flops for stage in method.stages))
        fits = ("yes" if fits else "no" for fits in method.fits.values())
        rows.append([method.name, size(method.peak.num_bytes), method.peak.name, flops, *fits])
    header = ["method", "peak memory", "in stage", "TFLOP", *plan.compared[0].fits]
    print_table("Methods, and the devices that they fit", header, rows)


def _fit_line(fit: "Fit") -> str:
    """Whether a memory is enough, in a line."""
    if fit.fits:
        return f"It fits into {size(fit.memory)}."
    changes = ", ".join(fit.changes)
    if fit.possible:
        return f"It does not fit into {size(fit.memory)}. With {changes} it does: {size(fit.num_bytes)}."
    least = f"the least is {size(fit.num_bytes)}" + (f", with {changes}" if changes else "")
    return f"It does not fit into {size(fit.memory)}, with any settings: {least}."


def print_proof(result: "EditResult") -> None:
    """The proof of an edit: before and after, answers in full, and what changed per matrix."""
    metrics, edits = result.metrics, result.provenance["edits"]
    out.print(f"{edits['count']} edits from {edits['source']}, schema {edits['schema']}", soft_wrap=True)
    for note in result.notes:
        out.print(note, soft_wrap=True)
    before, after, capability = metrics["before"], metrics["after"], metrics["capability"]
    rows = [[f"{kind}, %", percent(before[kind]), percent(after[kind])] for kind in before]
    if capability["drift"] is not None:
        rows.append(["capability loss, nats/token", number(capability["loss_base"]), number(capability["loss"])])
        rows.append(["drift, nats/token", number(0.0), number(capability["drift"])])
    print_table(f"Proof on {metrics['proof_edits']} edits, free greedy decoding", ["", "before", "after"], rows)

    answers = Table(title="Some answers in full", title_justify="left", title_style="bold", header_style="bold")
    for name in ("prompt", "target", "before", "after"):
        answers.add_column(name, overflow="fold")
    for example in result.examples:
        answers.add_row(*(Text(text) for text in (example.prompt, example.target, example.before, example.after)))
    out.print(answers)

    print_table(
        "Changed matrices",
        ["", "‖ΔW‖", "‖ΔW‖/‖W‖", "share outside the subspace"],
        [
            [c.name, f"{c.norm:.3f}", f"{c.relative:.4f}", "–" if c.outside is None else f"{c.outside:.1e}"]
            for c in result.changes
        ],
    )
    if "frontier" in metrics:
        print_frontier(metrics["frontier"])
    if "budget" in metrics:
        print_certificate(metrics["budget"])
    rounding, seconds = metrics["rounding"], metrics["seconds"]
    out.print(
        f"stored in {rounding['dtype']}: {100 * rounding['survived']:.1f} % of the changed entries survive, "
        f"relative error of the change {rounding['relative_error']:.1e}, "
        f"{metrics['answers_changed_by_rounding']} answers changed by it",
        soft_wrap=True,
    )
    settings, training, loss = result.settings, metrics["training"], metrics["edit_loss"]
    rates, tried = training["learning_rates"], [trial["learning_rate"] for trial in training["trials"]]
    said = [f"edit loss {loss['before']:.3f} before, {loss['after']:.3f} after"]
    if settings.get("budget") is not None:
        said.append(f"budget {settings['budget']}")
    elif settings.get("update") == "priced":
        said.append(f"price {settings['price']:g} at energy {settings['energy']:g}")
    elif "energy" in settings:
        said.append(f"energy {settings['energy']}")
    if rates and settings.get("budget") is not None:
        said.append(f"{len(rates)} epochs")
    elif rates:
        falling = f" falling to {rates[-1]:.1e}" if rates[-1] < rates[0] else ""
        up_to = f" (tried up to {max(tried):.1e})" if len(tried) > 1 else ""
        said += [f"learning rate {rates[0]:.1e}{falling}{up_to}", f"{len(rates)} epochs"]
    if len(metrics["rounds"]) > 1:
        said.append(f"{len(metrics['rounds'])} rounds")
    said += [f"{what} {seconds[what]:.1f} s" for what in ("edit", "curvature", "proof")]
    out.print(f"{settings['editor']}: {', '.join(said)}", soft_wrap=True)
    if training["forward"]:
        out.print(_steps(training["forward"]), soft_wrap=True)


def print_frontier(found: dict[str, Any]) -> None:
    """What every budget bought, and where more of it begins to buy little."""

    def row(name: str, point: dict[str, Any]) -> list[str]:
        scores = (percent(point[name]) for name in ("reliability", "generalization", "locality"))
        return [name, number(point["drift"]), *scores]

    rows = [row(f"budget {point['budget']:.2g}", point) for point in found["points"]]
    rows.append(row("plain fine-tuning", found["fine_tuning"]))
    header = ("", "drift", "reliability", "generalization", "locality")
    print_table("What a damage budget buys; asked of the edits of the proof, in %", header, rows)
    out.print(f"beyond a budget of {found['knee']:.2g} more drift buys little (the knee)", soft_wrap=True)


def print_certificate(found: dict[str, Any]) -> None:
    """What an edit within a budget spent of it, in a line or two."""
    interval = f"95 % interval {number(found['low'])} to {number(found['high'])} over {found['texts']} held-out texts"
    share = 100 * found["drift"] / found["budget"]
    out.print(
        f"budget {number(found['budget'])} nats/token ({found['said']}): drift {number(found['drift'])}, "
        f"{share:.0f} % of it ({interval})",
        soft_wrap=True,
    )
    if found["unseen"] > 0:
        out.print(
            f"for one input of the texts {found['unseen']:.2f} that lie in all directions alike were counted",
            soft_wrap=True,
        )
    if found["ratio"] is not None:
        out.print(
            f"the curvature predicted {number(found['predicted'])}, which is {found['ratio']:.1f} times too little",
            soft_wrap=True,
        )
    if not found["met"]:
        out.print("the budget is not met: this is the nearest to it that the edits could be made", soft_wrap=True)


def _steps(forward: dict[str, Any]) -> str:
    """From where the steps of an edit were computed, and in which precision."""
    where = {
        "matrix": "replayed from the input of the first edited matrix",
        "block": "replayed from the input of the first edited block",
        "targets": "the whole model, logits at target tokens only (no replay)",
        "whole": "the whole model (no replay)",
    }[forward["start"]]
    kept = {"memory": "memory", "cpu memory": "the CPU's memory", "file": "a mapped file"}.get(forward["kept"])
    record = f", {forward['num_bytes'] / 1e6:.1f} MB recorded in {kept}" if kept else ""
    packed = ", shared beginnings run once" if forward["packed"] else ""
    return f"steps: {where}{record}{packed}; {forward['precision']}"
