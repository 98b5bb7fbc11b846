"""Tasks of lm-evaluation-harness, found by name and loaded with their data."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .benchmarks import SCORES, Benchmark
from .errors import ConfigError, CrispEditError, did_you_mean
from .progress import Progress, no_progress
from .untouched import untouched_process

PACK = Path(__file__).parent / "tasks"
"""The tasks about edits that come with crispedit."""
LOGGER = "lm_eval"


def import_harness(module: str = "lm_eval") -> Any:
    """A module of the harness.

    Args:
        module: Its name.

    Returns:
        The module.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"--tasks needs lm-evaluation-harness ({error}): pip install 'crispedit[tasks]'") from None


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A benchmark whose tasks are there, with their data.

    Args:
        name: In the harness.
        tasks: Its tasks, by name.
        limit: The first so many documents of each.
    """

    name: str
    tasks: Mapping[str, Any]
    limit: int | None


def load_benchmarks(
    benchmarks: Sequence[Benchmark],
    *,
    include_path: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> list[Loaded]:
    """Finds benchmarks in the harness and loads their data.

    Args:
        benchmarks: What to find. A tag, and a group without a score of its own, become a benchmark per task.
        include_path: A directory with further tasks.
        metadata: For tasks that take any, as ``lm_eval --metadata`` gives it.
        progress: Called after every benchmark.

    Returns:
        The benchmarks, ready to be run, any number of times.

    Raises:
        ConfigError: The harness is missing, or there is no such task, or it cannot be loaded or measured.
    """
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"include path '{include_path}' is no directory; name one with .yaml files of tasks")
    found: list[Loaded] = []
    with untouched_process(LOGGER), _quiet_data_sets():
        manager = _manager([b.name for b in benchmarks], [PACK, *([include_path] if include_path else [])], metadata)
        for number, benchmark in enumerate(benchmarks):
            found += _load(manager, benchmark)
            progress("loading tasks", number + 1, len(benchmarks))
    names = [one.name for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"task '{twice}' is named twice, by itself and with others; name it once")
    return found


def _manager(names: Sequence[str], paths: list[Path], metadata: Mapping[str, Any] | None) -> Any:
    """What knows these tasks: the given directories where they have all of them, else these and the harness's own."""
    task_manager = import_harness("lm_eval.tasks").TaskManager
    options = {"include_path": paths, "metadata": dict(metadata or {})}
    manager = task_manager(include_defaults=False, **options)
    if all(_known(manager.task_index, name) for name in names):
        return manager
    manager = task_manager(**options)  # reads some 14,000 files
    for name in names:
        if name not in manager.task_index:
            near = did_you_mean(name, manager.all_tasks)
            raise ConfigError(f"lm-evaluation-harness has no task '{name}'{near}; 'lm_eval ls tasks' lists them")
    return manager


def _known(index: Mapping[str, Any], name: Any) -> bool:
    """Whether a list of tasks has a task, and if it is a group or a tag, all that belongs to it."""
    if not isinstance(name, str) or name not in index:
        return False
    entry = index[name]
    members = [*entry.tags] if entry.yaml_path is None else (entry.cfg or {}).get("task")
    return all(_known(index, member) for member in members) if isinstance(members, list) else True


def _load(manager: Any, benchmark: Benchmark) -> list[Loaded]:
    """A benchmark's tasks with their data."""
    try:
        found = manager.load([benchmark.name])
    except CrispEditError:  # from a task of our own
        raise
    except ImportError as error:
        raise ConfigError(f"task '{benchmark.name}' needs more ({error}): pip install 'crispedit[tasks]'") from None
    except OSError as error:
        raise ConfigError(
            f"the data of task '{benchmark.name}' cannot be reached ({_line(error)}); load them once where there is a "
            "network, or name a task with local data by --include-path"
        ) from None
    except Exception as error:  # tasks are foreign code, and so are the loaders of their data
        raise ConfigError(
            f"task '{benchmark.name}' cannot be loaded ({type(error).__name__}: {_line(error)}); mend its file, or "
            "name another task"
        ) from None
    for name, task in found["tasks"].items():
        _check(name, task)
        own = task.get_config("num_fewshot")
        # as the harness does: a task that says 0 has its examples, or needs none, in what it asks
        if own is None or (benchmark.shots is not None and own != 0):
            task.set_config(key="num_fewshot", value=benchmark.shots or 0)
    group = found["groups"].get(benchmark.name)
    if group is not None and group.has_aggregation:
        return [Loaded(name=benchmark.name, tasks=found["tasks"], limit=benchmark.limit)]
    return [Loaded(name=name, tasks={name: task}, limit=benchmark.limit) for name, task in found["tasks"].items()]


def _check(name: str, task: Any) -> None:
    """Refuses tasks that cannot be measured here."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise ConfigError(f"task '{name}' measures loss on texts; give texts by --texts FILE instead")
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"task '{name}' asks about images or sounds; name a task of text alone")
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"task '{name}' runs code that the model writes; run it by lm_eval, where that is fenced off")
    metric, registry = metric_of(name, task), import_harness("lm_eval.api.registry")
    rule = task.aggregation().get(metric)
    other = rule is not registry.get_aggregation("mean") and rule in registry.AGGREGATION_REGISTRY.values()
    if other or not task.higher_is_better().get(metric, True):
        raise no_share(name, metric)


def metric_of(name: str, task: Any) -> str:
    """The metric that is a task's score.

    Args:
        name: Of the task.
        task: As the harness loaded it.

    Returns:
        That of ``SCORES``, else the first that the task lists.
    """
    return SCORES[name][0] if name in SCORES else str(next(iter(task.aggregation())))


def no_share(name: str, metric: str) -> ConfigError:
    """The error for a task whose score is none that is measured here."""
    return ConfigError(f"the {metric} of task '{name}' is no share of right answers; name a task that counts those")


def _line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:200]


@contextmanager
def _quiet_data_sets() -> Iterator[None]:
    """Within, loading data shows no bars."""
    bars = import_harness("datasets.utils.tqdm")
    shown = not bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bars()
