"""What editors gain and cost: from finished rows to differences with intervals, a Pareto front, and tables.

Edit success is the mean of reliability and generalization, without a context. What is kept is, where the model has
tasks, their mean score (``abilities``), and on held-out texts the drift from the base model. Differences to the base
model and to plain fine-tuning are paired, item by item; see :mod:`crispedit.statistics`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from . import __version__
from .statistics import LEVEL, POWER, RESAMPLES, Difference, Measure, Stratum, differences

BASE, PLAIN = "base", "ft"
KINDS = ("reliability", "generalization", "locality")
LOWER_IS_BETTER = ("drift", "loss")
ON_FRONT = "◆"
_TITLES = {
    "success": "edit success, points",
    "locality": "locality, points",
    "abilities": "abilities, points",
    "drift": "drift, nats/token",
    "loss": "capability loss, nats/token",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the comparison.

    Args:
        editor: ``EDITOR``, ``EDITOR:PRESET`` or ``base``.
        given: The settings that the user gave, layers included.
        record: What was measured; of a row that failed, only the ``reason``.
    """

    editor: str
    given: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def done(self) -> bool:
        """Whether it was measured."""
        return "items" in self.record

    @property
    def full_name(self) -> str:
        """The editor with everything that the user set."""
        return _name(self.editor, self.given)

    def line(self) -> str:
        """The row in a line."""
        found = {name: measure.value for name, measure in measures(self.record["items"]).items()}
        shown = [f"edit success {found['success']:.1f}"]
        shown += [f"abilities {found['abilities']:.1f}"] if "abilities" in found else []
        shown += [f"drift {found['drift']:.4f}"] if "drift" in found else []
        seconds = self.record["seconds"]
        times = f"edit {seconds['edit']:.1f} s, evaluation {seconds['evaluation']:.1f} s, row {seconds['row']:.1f} s"
        return f"{self.full_name}: {', '.join(shown)}; {times}, {_gigabytes(self.record)}"


def measures(items: Mapping[str, Any]) -> dict[str, Measure]:
    """Everything that is compared, from the items of a row.

    Args:
        items: Of a row's record: ``edits``, ``tasks`` and ``texts``.

    Returns:
        By name: ``success``, the scores of both contexts (``reliability``, ``qa_context.reliability``, …) and the
        teacher-forced ones (``teacher_forced.reliability``, ``teacher_forced.agreement``, …), ``abilities`` and every
        task, ``drift`` and ``loss``; what was not measured is missing.
    """
    found: dict[str, Measure] = {}
    for context, kinds in items["edits"].items():
        for kind, scores in kinds.items():
            values = [value for value in scores if value is not None]
            if values:
                name = kind if context == "no_context" else f"{context}.{kind}"
                found[name] = Measure((Stratum.of([100 * value for value in values]),), span=100)
    if "no_context" in items["edits"]:
        asked = items["edits"]["no_context"]
        success = _of_edits(asked["reliability"])
        if "generalization" in found:
            success = success.beside(_of_edits(asked["generalization"]))
        found["success"] = Measure((success,), span=100)
    tasks = {
        name: Stratum.of([100 * hits for hits in task["hits"]], task["counts"]) for name, task in items["tasks"].items()
    }
    if tasks:
        found["abilities"] = Measure(tuple(tasks.values()), span=100)
        found |= {f"task.{name}": Measure((stratum,), span=100) for name, stratum in tasks.items()}
    if items["texts"] is not None:
        found |= {
            name: Measure((Stratum.of(items["texts"][name], items["texts"]["tokens"]),)) for name in LOWER_IS_BETTER
        }
    return found


def _of_edits(scores: Sequence[float | None]) -> Stratum:
    """Scores of all edits, in percent; an edit without one counts nothing."""
    return Stratum.of([100 * (score or 0.0) for score in scores], [float(score is not None) for score in scores])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows side by side.

    Args:
        rows: The base model first; those that failed among them.
        names: What they are called: the editor, and those settings in which its rows differ.
        shared: What all rows have in common.
        values: By measure, of every row (``None`` where it was not measured).
        against: By ``base`` and, where plain fine-tuning is among the rows, ``ft``: by measure, the difference of
            every row (``None`` where there is none).
        plain: The index of the row that ``ft`` stands for.
        kept: The measures of what is kept, the first of them that of the plot: ``abilities``, ``drift``.
        fronts: By such a measure, the rows that no other one beats in it and in edit success.
    """

    rows: Sequence[Row]
    names: Sequence[str]
    shared: Mapping[str, Any]
    values: Mapping[str, Sequence[float | None]]
    against: Mapping[str, Mapping[str, Sequence[Difference | None]]]
    plain: int | None
    kept: Sequence[str]
    fronts: Mapping[str, frozenset[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[Row], shared: Mapping[str, Any], *, resamples: int = RESAMPLES) -> "Comparison":
        """Computes differences, intervals and fronts.

        Args:
            rows: The base model's first, and finished.
            shared: What they have in common.
            resamples: Of the bootstrap.

        Returns:
            The comparison.
        """
        done = [index for index, row in enumerate(rows) if row.done]
        of_row = {index: measures(rows[index].record["items"]) for index in done}
        plain = _plain(rows)
        values: dict[str, list[float | None]] = {}
        against: dict[str, dict[str, list[Difference | None]]] = {
            name: {} for name, index in ((BASE, 0), (PLAIN, plain)) if index is not None
        }
        for name in of_row[0]:
            have = [index for index in done if name in of_row[index]]
            values[name] = [of_row[index][name].value if index in have else None for index in range(len(rows))]
            for reference, its_index in ((BASE, 0), (PLAIN, plain)):
                if its_index is None or its_index not in have:
                    continue
                found = differences([of_row[index][name] for index in have], have.index(its_index), resamples=resamples)
                by_index = dict(zip(have, found, strict=True))
                against[reference][name] = [by_index.get(index) for index in range(len(rows))]
        kept = [name for name in ("abilities", "drift") if name in values]
        return cls(
            rows=list(rows),
            names=_names(rows),
            shared=shared,
            values=values,
            against=against,
            plain=plain,
            kept=kept,
            fronts={name: pareto_front(values["success"], values[name], name not in LOWER_IS_BETTER) for name in kept},
        )

    @property
    def failed(self) -> list[int]:
        """Rows that were not measured."""
        return [index for index, row in enumerate(self.rows) if not row.done]

    def record(self) -> dict[str, Any]:
        """The comparison as JSON, without items."""
        return {
            "crispedit": __version__,
            **self.shared,
            "statistics": {
                "level": LEVEL,
                "power": POWER,
                "resamples": RESAMPLES,
                "plain": None if self.plain is None else self.names[self.plain],
            },
            "rows": [self._row(index) for index in range(len(self.rows))],
        }

    def _row(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        about = {"name": self.names[index], "editor": row.editor, "given": dict(row.given)}
        if not row.done:
            return {**about, "status": "failed", "reason": row.record["reason"]}
        return {
            **about,
            "status": "done",
            **{
                name: value for name, value in row.record.items() if name not in ("items", "answers", "editor", "given")
            },
            "values": {name: values[index] for name, values in self.values.items()},
            "pareto_front": [name for name in self.kept if index in self.fronts[name]],
            "against": {
                reference: {
                    name: asdict(found) for name, of_rows in of_measure.items() if (found := of_rows[index]) is not None
                }
                for reference, of_measure in self.against.items()
            },
        }

    def table(self, *, wide: bool) -> tuple[list[str], list[list[str]]]:
        """The header and the rows of the table; failed rows say why below it.

        Args:
            wide: With every column, as in ``table.md``; or those that fit into a terminal.
        """
        columns: list[tuple[str, Callable[[int], str]]] = [
            ("editor", lambda i: self.names[i]),
            ("edit success, %" if wide else "success", lambda i: self._cell("success", i)),
        ]
        scores = [("", kind) for kind in KINDS] + [("in context ", kind) for kind in KINDS]
        for context, kind in scores if wide else scores[2:3]:
            name = f"qa_context.{kind}" if context else kind
            if name in self.values:
                title = f"{context}{kind}, %" if wide else kind
                columns.append((title, lambda i, name=name: self._cell(name, i)))  # type: ignore[misc]
        if "abilities" in self.values:
            columns.append(("abilities, %" if wide else "abilities", lambda i: self._cell("abilities", i, 2)))
        if "drift" in self.values:
            columns.append(("drift, nats/token" if wide else "drift", lambda i: self._cell("drift", i, 4)))
        if wide:
            columns.append(("curvature", lambda i: _curvature(self.rows[i].record)))
        columns.append(("edit", lambda i: "–" if i == 0 else _duration(self.rows[i].record["seconds"]["edit"])))
        columns.append(("peak memory" if wide else "memory", lambda i: _gigabytes(self.rows[i].record)))
        shown = [index for index, row in enumerate(self.rows) if row.done]
        return [name for name, _ in columns], [[cell(index) for _, cell in columns] for index in shown]

    def _cell(self, name: str, index: int, digits: int = 1) -> str:
        value = self.values[name][index]
        mark = f" {ON_FRONT}" if index in self.fronts.get(name, ()) else ""
        return "–" if value is None else f"{value:.{digits}f}{mark}"

    def claims(self) -> tuple[str, list[tuple[str, str, str]]]:
        """What was compared with the base model; and by row its name, the difference, and what that says."""
        name = "abilities" if "abilities" in self.values else "loss" if "loss" in self.values else None
        if name is None:
            return "", []
        found = self.against[BASE][name]
        return _TITLES[name], [
            (self.names[i], interval(name, found[i]).strip("*"), claim(name, found[i]))
            for i in range(1, len(self.rows))
            if found[i] is not None
        ]

    def markdown(self) -> str:
        """``table.md``."""
        shared = self.shared
        lines = [
            "# What each editor gains and costs",
            "",
            f"Model {shared['model']} ({shared['dtype']}, {shared['device']}), {shared['edits']['count']} edits from "
            f"{shared['edits']['source']}, judge {shared['judge']}, seed {shared['seed']}, crispedit {__version__}. "
            "Every row has a process of its own and starts from the same base model.",
            "",
            *_markdown_table(*self.table(wide=True)),
            "",
            *self._notes(),
        ]
        for index in self.failed:
            lines += [f"- **{self.names[index]} failed**: {self.rows[index].record['reason']}"]
        if self.failed:
            lines.append("")
        for reference, title in ((BASE, "the base model"), (PLAIN, "plain fine-tuning")):
            if reference in self.against and len(self.rows) > 1:
                lines += [f"## Differences to {title}", "", *self._differences(reference), ""]
        return "\n".join(lines).rstrip() + "\n"

    def _notes(self) -> list[str]:
        """What the columns are."""
        notes = ["Edit success: the mean of reliability and generalization, no context."]
        if "generalization" not in self.values:
            notes = ["Edit success: reliability, no context; these edits have no rephrased prompts."]
        if "abilities" in self.values:
            notes.append(f"Abilities: the mean of {len([n for n in self.values if n.startswith('task.')])} tasks.")
        if "drift" in self.values:
            notes.append("Drift: KL(base ‖ edited) on held-out texts.")
        notes.append(
            "Curvature: time and peak memory of its estimate, in a process of its own and once for all rows of the "
            "same layers (*cached*: in an earlier run, of which only the time is known). Edit: the editor alone. Peak "
            "memory: of the row's process, until the edit is proved."
        )
        if self.kept:
            notes.append(
                f"{ON_FRONT}: on the Pareto front of edit success and that column, by the point estimates: no other "
                "row is as good in both and better in one."
            )
        return [*notes, ""]

    def _differences(self, reference: str) -> list[str]:
        """A table of differences with their intervals, and what they mean."""
        found = self.against[reference]
        names = [n for n in ("success", "locality", "abilities", "drift", "loss") if n in found]
        claimed = "abilities" if "abilities" in found else "loss" if "loss" in found else ""
        its_index = 0 if reference == BASE else self.plain
        header = ["editor", *(_TITLES[name] for name in names)]
        if claimed:
            header.append(f"so its {_TITLES[claimed].partition(',')[0]}")
        rows = []
        for index, row in enumerate(self.rows):
            if not row.done or index in (0, its_index):
                continue
            cells = [self.names[index], *(interval(name, found[name][index]) for name in names)]
            rows.append([*cells, *([claim(claimed, found[claimed][index])] if claimed else [])])
        if not rows:
            return ["There is no other row."]
        chosen = (
            ""
            if self.plain is None or reference == BASE
            else f" Plain fine-tuning is the row {self.names[self.plain]}."
        )
        return [
            *_markdown_table(header, rows),
            "",
            f"Paired bootstrap intervals, {100 * LEVEL:g} %, each for itself; bold where 0 is outside. *Could have "
            f"shown*: the smallest true difference that such a sample tells from 0, with {100 * POWER:g} % power."
            f"{chosen}",
        ]


def pareto_front(gained: Sequence[float | None], kept: Sequence[float | None], higher: bool = True) -> frozenset[int]:
    """The rows, but the first (the base model), that no other one beats.

    Args:
        gained: Edit success by row.
        kept: What is kept by row.
        higher: Whether more of that is better.

    Returns:
        Their indices. A row is beaten by one that is no worse in both and better in one.
    """
    points = {
        index: (x, y if higher else -y)
        for index, (x, y) in enumerate(zip(gained, kept, strict=True))
        if index and x is not None and y is not None
    }
    return frozenset(
        index
        for index, (x, y) in points.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
    )


def claim(name: str, difference: Difference | None) -> str:
    """What an interval says of a capability: a loss, a gain, or nothing, and at what resolution.

    Args:
        name: Of the measure.
        difference: To the reference.

    Returns:
        A phrase.
    """
    if difference is None:
        return "–"
    unit, digits = ("nats/token", 4) if name in LOWER_IS_BETTER else ("points", 2)
    found = change(name, difference)
    if found != "none":
        return f"{'loses' if found == 'loss' else 'gains'} {abs(difference.value):.{digits}f} {unit}"
    return f"no loss found (could have shown ≥ {difference.detectable:.{digits}f} {unit})"


def change(name: str, difference: Difference) -> Literal["loss", "gain", "none"]:
    """What an interval says of a measure: a change for the worse, for the better, or none where it holds 0."""
    sign = -1 if name in LOWER_IS_BETTER else 1
    low, high = sorted((sign * difference.low, sign * difference.high))
    return "loss" if high < 0 else "gain" if low > 0 else "none"


def interval(name: str, difference: Difference | None) -> str:
    """A difference with its interval, bold where 0 is outside."""
    if difference is None:
        return "–"
    digits = 4 if name in LOWER_IS_BETTER else 2 if name == "abilities" else 1
    shown = f"{difference.value:+.{digits}f} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"
    return f"**{shown}**" if difference.low > 0 or difference.high < 0 else shown


def _plain(rows: Sequence[Row]) -> int | None:
    """The row of plain fine-tuning: that with the fewest settings of the user's, no preset before any."""
    candidates = [i for i, row in enumerate(rows) if row.done and row.editor.partition(":")[0] == PLAIN]
    return min(candidates, key=lambda i: (rows[i].editor != PLAIN, len(rows[i].given), i), default=None)


def _names(rows: Sequence[Row]) -> list[str]:
    """Editors, with those settings in which their rows differ."""
    names = []
    for row in rows:
        like = [other.given for other in rows if other.editor == row.editor]
        differ = {key for given in like for key in given if any(other.get(key) != given[key] for other in like)}
        names.append(_name(row.editor, {key: value for key, value in row.given.items() if key in differ}))
    return names


def _name(editor: str, settings: Mapping[str, Any]) -> str:
    return " ".join([editor, *(f"{key}={value}" for key, value in settings.items())])


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"


def _curvature(record: Mapping[str, Any]) -> str:
    """What a row's curvature took; if it had been estimated before, only how long that was, if it is known."""
    about = record["curvature"]
    if about["memory"] is None:
        return "–"
    taken = "?" if about["seconds"] is None else _duration(about["seconds"])
    return f"{taken} (cached)" if about["cached"] else f"{taken}, {_gigabytes(about)}"


def _gigabytes(record: Mapping[str, Any]) -> str:
    """Peak memory of the whole process up to the end of the edit; on a GPU, that of the GPU too."""
    memory = record["memory"]
    shown = f"{memory['process'] / 1e9:.2f} GB"
    return f"{shown}, GPU {memory['gpu'] / 1e9:.2f} GB" if memory["gpu"] else shown
