"""Which benchmarks are run and what is made of their items; the harness is not needed for it."""

import pytest

from crispedit.benchmarks import Benchmark, BenchmarkScore, TaskScore, parse_benchmarks, records
from crispedit.capability import TaskItems
from crispedit.errors import ConfigError, CrispEditError


def score_of(name: str, *tasks: TaskScore, names: tuple[str, ...] = ()) -> BenchmarkScore:
    of_name = dict(zip(names or (name,), tasks, strict=True))
    return BenchmarkScore(name=name, tasks=of_name, limit=None, chat=False, batch_size=4)


def task_of(hits: list[float], counts: list[int] | None = None, documents: str = "d", **changes) -> TaskScore:
    items = TaskItems(hits=hits, counts=counts or [1] * len(hits))
    named = tuple(f"{documents}{number}" for number in range(len(hits)))
    return TaskScore(**{"metric": "acc", "filter": "none", "shots": 0, "items": items, "documents": named, **changes})


def test_names_shots_and_limits_are_read():
    assert parse_benchmarks("mmlu, arc_challenge:25") == (
        Benchmark(name="mmlu"),
        Benchmark(name="arc_challenge", shots=25),
    )
    assert parse_benchmarks("mmlu:0,", limit=7) == (Benchmark(name="mmlu", shots=0, limit=7),)


def test_the_papers_settings():
    """baselines.md, 11.4: tasks, examples in the prompt, the first 200 documents."""
    assert [(b.name, b.shots, b.limit) for b in parse_benchmarks("paper")] == [
        ("ifeval", 0, 200),
        ("truthfulqa_mc2", 0, 200),
        ("mmlu", 5, 200),
        ("arc_challenge", 25, 200),
        ("gsm8k_cot", 8, 200),
    ]
    assert {b.limit for b in parse_benchmarks("paper,piqa", limit=3)} == {3}


@pytest.mark.parametrize(
    ("text", "limit", "said"),
    [
        (" ,", None, "name tasks of lm-evaluation-harness, or paper"),
        ("mmlu:five", None, "as in mmlu:5"),
        ("mmlu:-1", None, "must be a number"),
        ("mmlu,paper", None, "'mmlu' is named twice"),
        ("mmlu", 0, "task limit is 0"),
    ],
)
def test_what_cannot_be_run_is_refused(text, limit, said):
    with pytest.raises(ConfigError, match=said):
        parse_benchmarks(text, limit=limit)


def test_a_group_is_the_mean_over_its_items():
    """So over its tasks, weighted by size: 3 of 4 and 0 of 1 are 60 %, not the 37.5 % of the tasks' own mean."""
    group = score_of("g", task_of([1, 1, 1, 0]), task_of([0]), names=("a", "b"))
    assert group.items.score == 60
    (record,) = records([group]).values()
    assert {name: task["score"] for name, task in record["tasks"].items()} == {"a": 75, "b": 0}
    assert record["documents"] == 5
    assert record["difference"] is None


def test_items_of_several_questions_count_each_of_them():
    """As IFEval's instructions: 2 of 3 and 0 of 1 are 50 %."""
    assert score_of("a", task_of([2, 0], [3, 1])).items.score == 50


def test_differences_are_paired_and_in_points():
    base, model = task_of([1, 1, 0, 0.5] * 25), task_of([1, 0, 0, 0.5] * 25)
    found = score_of("a", model).less(score_of("a", base))
    assert found.value == -25
    assert -35 < found.low < -25 < found.high < -15
    # by hand: 25 differences of −1 and 75 of 0, whose mean has the standard error √(0.25 · 0.75 / 99)
    assert found.error == pytest.approx(100 * (0.25 * 0.75 / 99) ** 0.5)
    (record,) = records([score_of("a", model)], [score_of("a", base)]).values()
    assert (record["score"], record["base"], record["difference"]["value"]) == (37.5, 62.5, -25)


def test_different_questions_are_not_compared():
    with pytest.raises(CrispEditError, match="asked different things in task 'a'"):
        score_of("a", task_of([1, 0])).less(score_of("a", task_of([1, 0], documents="other")))


def test_settings_that_differ_between_tasks_are_listed():
    tasks = task_of([1], metric="acc"), task_of([1], metric="exact_match")
    (record,) = records([score_of("g", *tasks, names=("a", "b"))]).values()
    assert record["metric"] == ["acc", "exact_match"]
    assert record["shots"] == 0
