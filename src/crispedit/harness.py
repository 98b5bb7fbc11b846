"""lm-evaluation-harness on a model in memory: its tasks, its prompts and its counting, item by item.

What decides numbers is said and fixed: one batch size for all models that are compared (less only where memory runs
out), the chat template wherever there is one (and examples as turns of the conversation), left padding, the harness's
own seeds before every benchmark.
That is what ``lm_eval --tasks NAME --apply_chat_template --fewshot_as_multiturn true`` does for each benchmark by
itself.
"""

import copy
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .benchmarks import SCORES, BenchmarkScore, TaskScore
from .capability import TaskItems
from .errors import ConfigError, ModelError
from .harness_tasks import LOGGER, Loaded, import_harness, metric_of, no_share
from .memory import free_memory
from .models import context_length
from .progress import Progress, no_progress
from .untouched import untouched_model, untouched_process

MAX_BATCH = 64
LONG = 4096
"""Tokens of a long prompt, in a model whose context is longer."""
ROUNDING = 1e-9
"""Of sums of the same float64 numbers in another order, and of shares that are 1."""


def run_benchmarks(
    model: Any,
    tokenizer: Any,
    benchmarks: Iterable[Loaded],
    *,
    chat: bool,
    batch_size: int | None = None,
    progress: Progress = no_progress,
) -> list[BenchmarkScore]:
    """Runs benchmarks on a model, which is left bitwise as it was.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        benchmarks: Loaded ones.
        chat: Whether prompts go through the chat template; examples are then turns of the conversation.
        batch_size: Rows at once, halved where memory runs out; what half of the free memory holds when omitted.
        progress: Called after every request.

    Returns:
        What was found of each.

    Raises:
        CrispEditError: The harness changed a weight.
    """
    with untouched_model(model), untouched_process(LOGGER):
        lm = import_harness("lm_eval.models.huggingface").HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it may be given a padding token
            backend="causal",
            batch_size=batch_size or rows_at_once(model),
            enable_thinking=False,  # as our own prompts
        )
        return [_run(lm, benchmark, chat, progress) for benchmark in benchmarks]


def rows_at_once(model: Any) -> int:
    """How many long prompts are put through a model together: half of the free memory holds their logits.

    Args:
        model: A causal LM.

    Returns:
        A power of two, at most ``MAX_BATCH``. Of a model and its edit on one machine it is the same.
    """
    tokens = min(context_length(model) or LONG, LONG)
    row = 3 * tokens * model.config.get_text_config().vocab_size * 4  # logits, log-probabilities and a copy
    fitting: int = free_memory(model.device) // 2 // row
    return 1 << max(0, min(MAX_BATCH, fitting).bit_length() - 1)


def _run(lm: Any, benchmark: Loaded, chat: bool, progress: Progress) -> BenchmarkScore:
    """Runs one benchmark, with a smaller batch where memory runs out."""
    _check_lengths(lm, benchmark)
    evaluate = import_harness("lm_eval.evaluator").evaluate
    while True:
        _seed(benchmark.tasks.values())
        try:
            with _bars(benchmark.name, progress):
                found = evaluate(**arguments(lm, benchmark, chat))
            break
        except torch.OutOfMemoryError:
            if lm.batch_size_per_gpu == 1:
                raise ModelError(f"no memory for a single row of task '{benchmark.name}'") from None
            lm.batch_size_per_gpu //= 2
            torch.cuda.empty_cache()
    tasks = {name: _score(name, task, found) for name, task in benchmark.tasks.items()}
    return BenchmarkScore(
        name=benchmark.name, tasks=tasks, limit=benchmark.limit, chat=chat, batch_size=lm.batch_size_per_gpu
    )


def arguments(lm: Any, benchmark: Loaded, chat: bool) -> dict[str, Any]:
    """What the harness's ``evaluate`` is given.

    Args:
        lm: The model as the harness wraps it.
        benchmark: What to run; the number of examples is in its tasks.
        chat: As in :func:`run_benchmarks`.

    Returns:
        Its keyword arguments.
    """
    return {
        "lm": lm,
        "task_dict": {"tasks": dict(benchmark.tasks)},
        "limit": benchmark.limit,
        "log_samples": True,
        "bootstrap_iters": 0,  # intervals are our own, and paired
        "apply_chat_template": chat,
        "fewshot_as_multiturn": chat,
    }


def _seed(tasks: Iterable[Any]) -> None:
    """The seeds that the harness's command line sets when it is not told otherwise."""
    defaults = import_harness("lm_eval.defaults")
    random.seed(defaults.DEFAULT_RANDOM_SEED)
    np.random.seed(defaults.DEFAULT_OTHER_SEED)
    torch.manual_seed(defaults.DEFAULT_OTHER_SEED)
    for task in tasks:
        task.set_fewshot_seed(seed=defaults.DEFAULT_OTHER_SEED)


def _check_lengths(lm: Any, benchmark: Loaded) -> None:
    """Refuses answers that would fill the model's context: the harness stops there with an assertion."""
    for name, task in benchmark.tasks.items():
        settings = task.get_config("generation_kwargs") if task.OUTPUT_TYPE == "generate_until" else None
        longest = (settings or {}).get("max_gen_toks", lm.max_gen_toks)
        if settings is not None and longest >= lm.max_length:
            raise ModelError(
                f"answers of task '{name}' may have {longest} tokens, but the model's context is {lm.max_length}; "
                "leave it out"
            )


def _score(name: str, task: Any, found: Mapping[str, Any]) -> TaskScore:
    """A task's score, item by item, from what the harness logged."""
    samples, metric = found["samples"][name], metric_of(name, task)
    wanted = SCORES[name][1] if name in SCORES else samples[0]["filter"]
    rows = sorted((s for s in samples if s["filter"] == wanted and metric in s), key=lambda s: s["doc_id"])
    pairs = [_hits(row[metric]) for row in rows]
    whole = found["results"][name].get(f"{metric},{wanted}")
    if not pairs or any(pair is None or not 0 <= pair[0] <= pair[1] + ROUNDING for pair in pairs):
        raise no_share(name, metric)
    items = TaskItems(hits=[p[0] for p in pairs if p], counts=[p[1] for p in pairs if p])
    if not isinstance(whole, int | float) or abs(items.score / 100 - whole) > ROUNDING:
        raise ConfigError(
            f"the {metric} of task '{name}' is no mean over its documents ({items.score / 100} is, {whole} is the "
            "harness's); name a task whose score is one"
        )
    return TaskScore(
        metric=metric,
        filter=wanted,
        shots=task.get_config("num_fewshot"),
        items=items,
        documents=tuple(f"{row['doc_hash']} {row['prompt_hash']}" for row in rows),
    )


def _hits(value: Any) -> tuple[float, int] | None:
    """How often an item was right, of how many times; ``None`` where that is not what a value says."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, int | float | np.number | np.bool_) for one in values):
        return None
    return sum(float(one) for one in values), len(values)


@contextmanager
def _bars(name: str, progress: Progress) -> Iterator[None]:
    """Within, the harness's progress bars are reports to ``progress``."""

    def bar(*given: Any, **options: Any) -> _Bar:
        what = options.get("desc", "prompts").removeprefix("Running ").lower()
        return _Bar(f"{name}: {what}", progress, *given, **options)

    modules = [m for key, m in list(sys.modules.items()) if key.startswith("lm_eval") and hasattr(m, "tqdm")]
    bars = [(module, module.tqdm) for module in modules]
    for module in modules:
        module.tqdm = bar  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, own in bars:
            module.tqdm = own  # type: ignore[attr-defined]


class _Bar:
    """What the harness uses of a tqdm bar."""

    def __init__(self, what: str, progress: Progress, items: Any = (), *, total: int | None = None, **_: Any) -> None:
        self._what, self._progress, self._items, self._done = what, progress, items, 0
        self._total = len(items) if total is None else total

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self.update(1)

    def update(self, steps: int = 1) -> None:
        """Reports so many further steps."""
        self._done += steps
        self._progress(self._what, self._done, self._total)

    def close(self) -> None:
        """Ends the bar."""
