"""How long work tells of itself: a callback for bars, and the package's logger for single lines."""

import logging
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all)."""

log = logging.getLogger("crispedit")
"""What a user should know though nothing is wrong; the command line shows it on stderr."""


def no_progress(what: str, done: int, total: int) -> None:
    """The default progress callback: says nothing."""
