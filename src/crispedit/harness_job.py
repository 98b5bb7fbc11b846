"""What ``crispedit evaluate --tasks`` does: tasks of lm-evaluation-harness on a model and on its base."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .benchmarks import Benchmark, parse_benchmarks, records
from .errors import ConfigError
from .harness import rows_at_once, run_benchmarks
from .harness_tasks import Loaded, import_harness, load_benchmarks
from .models import LoadedModel
from .progress import Progress, no_progress
from .rows import Prompter
from .statistics import LEVEL


@dataclass(frozen=True, kw_only=True)
class HarnessJob:
    """Which tasks to run, and how: what the command line says of them.

    Args:
        benchmarks: The tasks.
        batch_size: Rows at once; what fits when omitted.
        include_path: A directory with further tasks.
    """

    benchmarks: tuple[Benchmark, ...]
    batch_size: int | None = None
    include_path: Path | None = None

    @classmethod
    def of(
        cls, tasks: str | None, *, limit: int | None, batch_size: int | None, include_path: Path | None
    ) -> "HarnessJob | None":
        """The job that options name, or none where they name no tasks.

        Args:
            tasks: See :func:`crispedit.benchmarks.parse_benchmarks`.
            limit: See there.
            batch_size: Rows at once.
            include_path: A directory with further tasks.

        Returns:
            The job.

        Raises:
            ConfigError: A setting cannot be used, or there are no tasks that it is for.
        """
        if tasks is None:
            if (limit, batch_size, include_path) != (None, None, None):
                raise ConfigError("task limit, task batch size and include path are for tasks; name some by --tasks")
            return None
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"task batch size is {batch_size}; it must be at least 1, or left out to be found")
        return cls(benchmarks=parse_benchmarks(tasks, limit=limit), batch_size=batch_size, include_path=include_path)

    def load(self, edits: str, *, progress: Progress = no_progress) -> list[Loaded]:
        """Loads the tasks with their data; what is wrong with them is said here, before a model is loaded.

        Args:
            edits: The file of edits, for the tasks about edits.
            progress: Called after every task.

        Returns:
            The tasks.
        """
        metadata = {"edits": edits}
        return load_benchmarks(self.benchmarks, include_path=self.include_path, metadata=metadata, progress=progress)

    def run(
        self, there: Sequence[Loaded], model: LoadedModel, base: Any, *, chat: str, progress: Progress = no_progress
    ) -> dict[str, Any]:
        """Runs tasks on a model, and on the base model if there is one.

        Args:
            there: What :meth:`load` returned.
            model: The model with its tokenizer, through which the base is asked too.
            base: The base model, or ``None``.
            chat: Whether prompts go through the chat template: ``auto``, ``on`` or ``off``.
            progress: Called after every request.

        Returns:
            The harness's version, the level of intervals, and by task what was found.
        """

        def of_base(what: str, done: int, total: int) -> None:
            progress(f"base: {what}", done, total)

        options: dict[str, Any] = {
            "chat": Prompter.of(model.model, model.tokenizer, chat=chat, eos=False).chat,  # type: ignore[arg-type]
            "batch_size": self.batch_size or rows_at_once(model.model),
        }
        found = run_benchmarks(model.model, model.tokenizer, there, **options, progress=progress)
        others = None
        if base is not None:
            others = run_benchmarks(base, model.tokenizer, there, **options, progress=of_base)
        return {"lm_eval": import_harness().__version__, "level": LEVEL, "tasks": records(found, others)}
