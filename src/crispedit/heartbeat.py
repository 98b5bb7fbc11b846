"""Whether the other processes of a run are still alive: what neither the launcher nor a broken connection may tell.

A launcher ends its own processes when one of them ends, and a process that is waited for in a collective breaks the
connection when it dies. A host that loses its power, or its network, does neither: others would wait for the time-out
of the collective, which has to be long, for some steps take long. So every process counts in the launcher's store, in a
thread of its own, and the others look whether it still counts.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

EVERY = 2.0
"""Seconds between two counts."""
SILENCE = 30.0
"""A process that has not counted for so many seconds is lost. Whatever takes long, in torch or in safetensors, lets
other threads run meanwhile."""


class Heartbeat(threading.Thread):
    """Counts in a store, and watches the others count.

    Args:
        store: A connection of its own to the store: operations on one connection wait for each other.
        rank: Of this process.
        others: Ranks to watch; all of them have counted once.
        lost: Called, once, with what is known of a process that is lost; called in this thread.
        every: See :data:`EVERY`.
        silence: See :data:`SILENCE`.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        others: Sequence[int],
        lost: Callable[[str], None],
        *,
        every: float = EVERY,
        silence: float = SILENCE,
    ) -> None:
        super().__init__(name="crispedit-heartbeat", daemon=True)
        self.store, self.others, self.lost = store, others, lost
        self.every, self.silence = every, silence
        self._key = beat_key(rank)
        self._ended = threading.Event()
        self._answered = time.monotonic()

    def start(self) -> None:
        """Begins to count and to watch."""
        super().start()
        threading.Thread(target=self._watch_store, name="crispedit-store", daemon=True).start()

    def end(self) -> None:
        """Stops counting for good: the others are told that this is no accident."""
        self._ended.set()
        self.join()
        self.store.set(self._key, "ended")

    def halt(self) -> None:
        """Stops counting and watching, for this process ends: what the others make of it is theirs."""
        self._ended.set()

    def _watch_store(self) -> None:
        """A store that does not answer at all holds up the thread that asks it."""
        while not self._ended.wait(self.every):
            if time.monotonic() - self._answered > self.silence:
                self.lost(f"the launcher's store has not answered for {self.silence:.0f} seconds")
                return

    def run(self) -> None:
        """Counts and watches until :meth:`end`."""
        heard = {other: (b"", time.monotonic()) for other in self.others}
        count = 0
        while not self._ended.wait(self.every):
            count += 1
            try:
                self.store.set(self._key, str(count))
                beats = self.store.multi_get([beat_key(other) for other in self.others])
            except Exception as error:
                if not self._ended.is_set():
                    self.lost(f"the launcher's store cannot be reached any more ({type(error).__name__})")
                return
            now = self._answered = time.monotonic()
            for other, beat in zip(self.others, beats, strict=True):
                if beat != heard[other][0] or beat == b"ended":
                    heard[other] = (beat, now)
                elif now - heard[other][1] > self.silence:
                    self.lost(f"rank {other} has been silent for {self.silence:.0f} seconds")
                    return


def beat_key(rank: int) -> str:
    """The key in the store under which a process counts."""
    return f"crispedit/beat/{rank}"
