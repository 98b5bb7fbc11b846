"""Processes that fall silent are noticed; those that end well, and those that are only slow, are not taken for lost."""

import threading
import time

import pytest

from crispedit.heartbeat import Heartbeat, beat_key

FAST = {"every": 0.02, "silence": 0.3}


class Store:
    """What torch's store does, in memory."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {beat_key(rank): b"0" for rank in range(2)}
        self.fails = self.hangs = False

    def set(self, key: str, value: str) -> None:
        if self.fails:
            raise ConnectionError("gone")
        while self.hangs:
            time.sleep(0.01)
        self.values[key] = value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key] for key in keys]


@pytest.fixture
def store():
    made = Store()
    yield made
    made.hangs = False


def watching(store, rank, **options):
    """A heartbeat that has begun, what it says of a loss, and when it did."""
    said: list[str] = []
    told = threading.Event()

    def lost(what: str) -> None:
        said.append(what)
        told.set()

    beat = Heartbeat(store, rank, [1 - rank], lost, **FAST | options)
    beat.start()
    return beat, said, told


def test_a_process_that_falls_silent_is_lost(store):
    _, said, told = watching(store, 0)
    assert told.wait(5)
    assert said == ["rank 1 has been silent for 0 seconds"]


def test_processes_that_count_or_have_ended_are_not(store):
    one, said, _ = watching(store, 0)
    other, others, _ = watching(store, 1)
    time.sleep(3 * FAST["silence"])
    other.end()
    time.sleep(3 * FAST["silence"])
    one.end()
    assert said == others == []


def test_a_store_that_breaks_or_does_not_answer_is_lost(store):
    watcher, said, told = watching(store, 0)
    store.fails = True
    assert told.wait(5)
    assert said == ["the launcher's store cannot be reached any more (ConnectionError)"]
    watcher.join()
    store.fails, store.hangs = False, True
    _, said, told = watching(store, 1)
    assert told.wait(5)
    assert said == ["the launcher's store has not answered for 0 seconds"]
