"""Replies of judges on disk: each is written as it comes, so that nothing is asked twice, whatever ends the run."""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from .errors import ArtifactError

_AT_ONCE = 500
"""Keys of one query: SQLite takes 999 values at least."""

T = TypeVar("T")


def reply_key(*parts: Any) -> str:
    """A key of everything that a reply depends on; the parts are JSON-ready."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode(errors="surrogatepass")).hexdigest()


class Replies:
    """Replies by key, in an SQLite file that several threads and processes may use at once.

    Args:
        path: The file; it and its directory are made.

    Raises:
        ArtifactError: It cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._connection = self._try(self._open)

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=30, check_same_thread=False)
        connection.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
        return connection

    def _try(self, action: Callable[[], T]) -> T:
        try:
            with self._lock:
                return action()
        except (OSError, sqlite3.Error) as error:
            raise ArtifactError(
                f"the judge's replies cannot be kept in '{self.path}': {error}; remove it, or set CRISPEDIT_CACHE to "
                "another directory"
            ) from error

    def find(self, keys: Sequence[str]) -> dict[str, str]:
        """The replies that are there, by key."""

        def rows() -> Iterable[tuple[str, str]]:
            for start in range(0, len(keys), _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                marks = ",".join("?" * len(some))
                yield from self._connection.execute(f"SELECT key, reply FROM replies WHERE key IN ({marks})", some)

        return self._try(lambda: dict(rows()))

    def keep(self, key: str, reply: str) -> None:
        """Adds a reply; it is on disk when this returns."""

        def write() -> None:
            with self._connection:
                self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))

        self._try(write)

    def __enter__(self) -> "Replies":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:  # a thread that nobody waits for any more may be at it
            self._connection.close()
