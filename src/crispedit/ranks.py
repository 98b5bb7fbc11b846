"""Which of how many processes this is, as the launcher says: ``torchrun``, ``accelerate launch`` or any other.

A launcher tells by environment variables, which a process may also have inherited from something else: nothing here
takes notice of them before :func:`join`, which the command line calls. Until then, and on one process, the rank is 0 of
1. Nothing here needs torch: ``--help`` must not wait for it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_joined = False
_alone = 0
_in_step = 0
_sharing = 0


def launched() -> int:
    """How many processes a launcher has started together; 1 without one, or with one that says nothing usable."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return 1
    count = os.environ["WORLD_SIZE"]
    return int(count) if count.isdecimal() else 1


def join() -> None:
    """From now on this process is one of those that were launched together."""
    global _joined
    _joined = launched() > 1


def leave() -> None:
    """From now on this process is on its own."""
    global _joined, _in_step
    _joined, _in_step = False, 0


def joined() -> bool:
    """Whether this process is one of several, even where it works alone at the moment."""
    return _joined


def count() -> int:
    """How many processes are in this run, whether they share its work or do all of it in step."""
    return int(os.environ["WORLD_SIZE"]) if _joined and not _alone else 1


def size() -> int:
    """How many processes share the work; 1 where each does all of it."""
    return 1 if _in_step and not _sharing else count()


def rank() -> int:
    """Which of those that share the work this is, from 0 on."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def stay_in_step() -> None:
    """From now on every process does all of the work: none could run a model of which others hold parts."""
    global _in_step
    _in_step = 1


def in_step() -> bool:
    """Whether every process does all of the work, on a model of which each holds a part."""
    return bool(_in_step) and _joined


@contextmanager
def sharing() -> Iterator[None]:
    """Within, processes that otherwise stay in step share the work: what they do takes each as many forward passes."""
    global _sharing
    _sharing += 1
    try:
        yield
    finally:
        _sharing -= 1


def local_rank() -> int:
    """Which of those on this host it is: the number of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if _joined else 0


def local_size() -> int:
    """How many of them share this host, and its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _joined else 1


def is_main() -> bool:
    """Whether this process prints and writes files: rank 0 does."""
    return not _joined or os.environ["RANK"] == "0"


@contextmanager
def alone() -> Iterator[None]:
    """Within, this process works as if there were no others, which must wait for it meanwhile."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1
