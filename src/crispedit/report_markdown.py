"""A report as Markdown: the same as the page, in plain tables, the edits that fail first."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .paired import could_have_shown, rounded

CONTEXTS = {"no_context": "no context", "qa_context": "QA context"}
_MARKS = {True: "right", False: "**wrong**", None: "–"}
_SPECIAL = re.compile(r"([\\`*_{}\[\]#~|$])")


def markdown(report: Mapping[str, Any]) -> str:
    """A report as Markdown.

    Args:
        report: See :func:`crispedit.report.report_data`.

    Returns:
        Markdown, in which every text of the edits and answers is escaped.
    """
    edits, base, certificate = report["edit_set"], report["base"], report["verdict"]["certificate"]
    compared = f" (base: {escaped(base)})" if base else ""
    lines = [
        f"# {escaped(report['model'])}: what the edit did",
        "",
        f"**{escaped(report['verdict']['sentence'])}**",
        "",
        *([f"Damage budget: {escaped(certificate)}", ""] if certificate else []),
        *(f"- {escaped(caveat)}" for caveat in report["verdict"]["caveats"]),
        *([""] if report["verdict"]["caveats"] else []),
        f"{edits['count']} edits from {escaped(edits['source'])}{compared}; "
        f"judge: {escaped(report['protocol']['judge'])}; {report['created']}, crispedit {report['crispedit']}.",
        "",
        "## Success against damage",
        "",
        *_measures(report),
        "",
        "## The edits",
        "",
        *_edits(report),
        *_curvature(report["curvature"]),
        *_run(report["run"]),
        "## How it was measured",
        "",
        *_definitions(report["definitions"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def escaped(text: str | None) -> str:
    """A text that Markdown and the HTML in it leave as it is, on one line; empty or none is said so."""
    if text is None:
        return "–"
    if not text.strip():
        return "*(empty)*"
    plain = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())
    return _SPECIAL.sub(r"\\\1", plain)


def _measures(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for found in report["measures"]:
        digits, paired = found["digits"], found["difference"]
        after = f"{rounded(found['after'], digits)} [{_interval(found['interval'], digits)}]"
        difference = could = "–"
        if paired is not None:
            ends = _interval((paired["low"], paired["high"]), digits, "+")
            difference = f"{rounded(paired['value'], digits, '+')} [{ends}]"
            could = could_have_shown(found)
        title = f"{found['title']}, {found['unit']}"
        rows.append([title, rounded(found["before"], digits), after, difference, could, f"{found['items']:,}"])
    header = ["", "before", "after", "difference", "none found; could have shown", "items"]
    level = f"{100 * report['statistics']['level']:g} %"
    return [*_table(header, rows), "", f"Intervals: {level}; differences are paired, item by item."]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of cells that are escaped."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]


def _interval(ends: Sequence[float | None], digits: int, sign: str = "") -> str:
    return ", ".join(rounded(end, digits, sign) for end in ends)


def _edits(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for _, edit in sorted(enumerate(report["edits"]), key=lambda item: (_right(item[1]), item[0])):
        for question in edit["questions"]:
            for context, answer in question["answers"].items():
                shown = [
                    str(edit["row"]),
                    question["kind"],
                    CONTEXTS.get(context, context),
                    escaped(question["prompt"]),
                ]
                expected = question["expected"]
                shown += ["*as the base*" if expected is None else escaped(expected)]
                shown += [escaped(answer["before"])] if report["base"] else []
                rows.append([*shown, escaped(answer["after"]), _MARKS[answer["right"]]])
    before = ["before"] if report["base"] else []
    header = ["row", "asked for", "context", "prompt", "right answer", *before, "after", ""]
    return ["Edits with wrong answers first.", "", *_table(header, rows), ""]


def _right(edit: Mapping[str, Any]) -> tuple[bool, float]:
    """Whether the edit itself holds, and the share of its answers that are right; unknown counts as right."""
    found = [(q["kind"], a["right"]) for q in edit["questions"] for a in q["answers"].values()]
    own = all(right is not False for kind, right in found if kind == "reliability")
    return own, sum(right is not False for _, right in found) / max(1, len(found))


def _curvature(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    rows = []
    for matrix in found["matrices"]:
        shape = f"{matrix['d_out']} × {matrix['d_in']}"
        cells = []
        for cut in (matrix["staircase"], matrix["cross"]):
            cells += (
                ["–", "–"] if cut is None else [f"{100 * cut['directions']:.2f}", f"{cut['rows']} × {cut['columns']}"]
            )
        rows.append([f"`{matrix['name']}`", shape, *cells])
    header = ["matrix", "outputs × inputs", "staircase, % of directions", "its rows × columns", "cross, %", "its r × c"]
    return [
        "## Curvature",
        "",
        f"{found['fisher']} Fisher, {found['tokens']:,} tokens of {escaped(found['texts'])}, "
        f"{found['factors']} factors. What holds γ = {found['energy']:g} of the curvature, and is protected:",
        "",
        *_table(header, rows),
        "",
    ]  # fmt: skip


def _run(run: Mapping[str, Any] | None) -> list[str]:
    if run is None:
        return []
    return ["## How the model was edited", "", *_table(["", ""], list(_settings(run))), ""]


def _settings(run: Mapping[str, Any]) -> Iterator[list[str]]:
    """What crispedit.json says, name by name."""
    told = {
        "base model": run["model"],
        "dtype": run["dtype"],
        "editor": run["editor"],
        "layers": ", ".join(map(str, run["layers"] or [])),
        **run["settings"],
        "edits": f"{run['edits'].get('count')} from {run['edits']['source']}",
        "capability texts": run["texts"] and run["texts"]["source"],
        "epochs run": run["epochs"] or None,
        "machine": run["machine"],
        **{f"{name} version": version for name, version in run["versions"].items()},
    }
    for name, value in told.items():
        if value is not None:
            yield [escaped(name), escaped(str(value))]


def _definitions(found: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for definition in found:
        yield f"**{definition['term']}.** {escaped(definition['text'])}"
        yield ""
        if "exact" in definition:
            yield from ["```text", *definition["exact"].split("\n"), "```", ""]
