"""What a person sees: progress on stderr, tables on stdout. Only the command line imports this."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)


def print_texts(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of texts on stdout, which are folded where the terminal is narrow; names in the first column are not."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", show_lines=True)
    for index, name in enumerate(header):
        table.add_column(name, no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)
