"""Benchmarks of lm-evaluation-harness: which are run, with how many examples, what their scores are, what they show.

Nothing here imports the harness; :mod:`crispedit.harness` runs it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .capability import TaskItems
from .errors import ConfigError, CrispEditError
from .statistics import Difference, Measure, Stratum, differences


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A task or a group of tasks of the harness, and how it is asked.

    Args:
        name: In the harness.
        shots: Examples in the prompt; the task's own number when omitted.
        limit: The first so many documents of every task; all when omitted.
    """

    name: str
    shots: int | None = None
    limit: int | None = None


PRESETS: dict[str, tuple[Benchmark, ...]] = {
    "paper": (
        Benchmark(name="ifeval", shots=0, limit=200),
        Benchmark(name="truthfulqa_mc2", shots=0, limit=200),
        Benchmark(name="mmlu", shots=5, limit=200),
        Benchmark(name="arc_challenge", shots=25, limit=200),
        Benchmark(name="gsm8k_cot", shots=8, limit=200),
    ),
}
"""Lists of benchmarks by name. ``paper``: those of CrispEdit's tables, the first 200 documents of each task, so up to
200 of every one of the 57 of MMLU (arXiv 2602.15823, and its code); TruthfulQA has six examples of its own."""

SCORES: dict[str, tuple[str, str]] = {
    "arc_challenge": ("acc_norm", "none"),
    "arc_easy": ("acc_norm", "none"),
    "hellaswag": ("acc_norm", "none"),
    "ifeval": ("inst_level_strict_acc", "none"),
}
"""Metric and filter that are the score of a task; of any other task the first ones that it lists.

acc_norm (likelihood by length of the answer) is what is usually reported of ARC and HellaSwag. CrispEdit's IFEval
score of its base model, 69.3 of 200 prompts, is no multiple of 0.5 %: it counts instructions. (Which metrics its
other scores are is not said.)"""


def parse_benchmarks(text: str, *, limit: int | None = None) -> tuple[Benchmark, ...]:
    """What ``--tasks`` names.

    Args:
        text: Names with commas between them: of presets, or of the harness, then also ``NAME:SHOTS``.
        limit: The first so many documents of every task, also where a preset says otherwise.

    Returns:
        The benchmarks, in this order.

    Raises:
        ConfigError: No name, one that comes twice, or a number that cannot be used.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"task limit is {limit}; it must be at least 1, or left out to take every document")
    found: list[Benchmark] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, colon, shots = part.partition(":")
        if colon and not shots.isdecimal():
            raise ConfigError(f"tasks has '{part}'; examples in the prompt must be a number, as in {name}:5")
        chosen = PRESETS.get(part, (Benchmark(name=name, shots=int(shots) if colon else None),))
        found += [Benchmark(name=b.name, shots=b.shots, limit=limit or b.limit) for b in chosen]
    if not found:
        raise ConfigError(f"tasks is '{text}'; name tasks of lm-evaluation-harness, or {', '.join(PRESETS)}")
    names = [benchmark.name for benchmark in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"task '{twice}' is named twice; name it once")
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One task of the harness, answered item by item.

    Args:
        metric: What its score is.
        filter: The harness's filter of answers that it is computed after.
        shots: Examples in the prompt.
        items: How often each document was right: of 0/1 metrics a hit or none, of others a fraction, of lists
            (IFEval's instructions) so many of so many.
        documents: A hash of every document and its prompt, which shows that two models were asked the same.
    """

    metric: str
    filter: str
    shots: int
    items: TaskItems
    documents: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BenchmarkScore:
    """One benchmark: a task, or a group of tasks whose items count alike, wherever they come from.

    Args:
        name: In the harness.
        tasks: By name.
        limit: The first so many documents of each.
        chat: Whether prompts went through the chat template, and examples as turns of the conversation.
        batch_size: Rows at once; scores may differ in the last digits with it.
    """

    name: str
    tasks: Mapping[str, TaskScore]
    limit: int | None
    chat: bool
    batch_size: int

    @property
    def items(self) -> TaskItems:
        """Of all its tasks: of a group, the score is the mean over tasks weighted by their size."""
        tasks = [task.items for task in self.tasks.values()]
        return TaskItems(hits=[h for t in tasks for h in t.hits], counts=[c for t in tasks for c in t.counts])

    def less(self, base: "BenchmarkScore") -> Difference:
        """The difference to another model's score, in percentage points, with its paired interval.

        Args:
            base: The other model's.

        Returns:
            The difference.

        Raises:
            CrispEditError: The two were not asked the same.
        """
        if [t.documents for t in self.tasks.values()] != [t.documents for t in base.tasks.values()]:
            raise CrispEditError(f"the two models were asked different things in task '{self.name}'")
        both = [Measure((Stratum.of([100 * h for h in i.hits], i.counts),), 100.0) for i in (base.items, self.items)]
        return differences(both, 0)[1]

    def record(self, base: "BenchmarkScore | None") -> dict[str, Any]:
        """What ``crispedit evaluate`` writes of it; of a group with its tasks.

        Args:
            base: The same benchmark of the base model.

        Returns:
            Percentages, and how they came about.
        """
        tasks = list(self.tasks.values())
        found: dict[str, Any] = {
            "score": self.items.score,
            "base": base.items.score if base is not None else None,
            "difference": asdict(self.less(base)) if base is not None else None,
            "metric": _one(task.metric for task in tasks),
            "filter": _one(task.filter for task in tasks),
            "shots": _one(task.shots for task in tasks),
            "limit": self.limit,
            "documents": len(self.items.hits),
            "chat": self.chat,
            "batch_size": self.batch_size,
        }
        if list(self.tasks) != [self.name]:
            found["tasks"] = {
                name: {
                    "score": task.items.score,
                    "base": base.tasks[name].items.score if base is not None else None,
                    "documents": len(task.items.hits),
                    "metric": task.metric,
                    "shots": task.shots,
                }
                for name, task in self.tasks.items()
            }
        return found


def records(model: Sequence[BenchmarkScore], base: Sequence[BenchmarkScore] | None = None) -> dict[str, dict[str, Any]]:
    """By name, what is written of benchmarks of a model, beside the same of its base."""
    others: Sequence[BenchmarkScore | None] = base if base is not None else [None] * len(model)
    return {one.name: one.record(other) for one, other in zip(model, others, strict=True)}


def _one(values: Any) -> Any:
    """The value that all have, or the list of those that there are."""
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else distinct
