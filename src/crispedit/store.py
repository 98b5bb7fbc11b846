"""A directory of rounds that survives a kill at any moment: files first, then one transaction that makes them count.

    DIR/session.db      the index and the log (SQLite): what is in it is true, and nothing else is
    DIR/session.lock    held by the one process that writes
    DIR/rounds/NAME/    the files of a round, written under a temporary name, synced, renamed, and never changed
    DIR/heads/NAME      what only the newest round needs, replaced with every round

A file counts once a row of the index names it, with its size and checksum; SQLite has none of its own content, and so
the index also holds a checksum of all of its rows. What a killed process left behind is named by no row: the next one
that opens the directory for writing removes it, and says so. Whoever only reads needs no lock.
"""

import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from .artifacts import building_beside, check_writable
from .errors import ArtifactError

FORMAT = 1
INDEX, LOCK, ROUNDS, HEADS = "session.db", "session.lock", "rounds", "heads"
_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE rounds (number INTEGER PRIMARY KEY, directory TEXT NOT NULL, record TEXT NOT NULL);
CREATE TABLE files (path TEXT PRIMARY KEY, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE log (time REAL NOT NULL, entry TEXT NOT NULL);
"""


class Store:
    """A directory of rounds; see the module. Made by :meth:`create`, :meth:`reading` and :meth:`writing`."""

    def __init__(self, directory: Path, index: sqlite3.Connection) -> None:
        self.directory, self._index = directory, index

    @classmethod
    def create(
        cls, directory: Path, about: Mapping[str, Any], fill: Callable[[Path], None] = lambda path: None
    ) -> None:
        """Makes an empty store, whole or not at all.

        Args:
            directory: New or empty.
            about: What it says of itself; JSON-ready.
            fill: Called with the unfinished directory, to put further files into it; they are checksummed as well.

        Raises:
            ArtifactError: There is something already, or it cannot be written.
        """
        check_writable(directory, overwrite=None)
        try:
            with building_beside(directory) as building:
                cls._begin(building, about, fill)
                if directory.is_dir():
                    directory.rmdir()
                building.rename(directory)
            _sync(directory.absolute().parent)
        except (OSError, sqlite3.Error) as error:
            raise ArtifactError(f"cannot write '{directory}': {error}") from error

    @classmethod
    def _begin(cls, building: Path, about: Mapping[str, Any], fill: Callable[[Path], None]) -> None:
        """Writes an empty store to the disk."""
        (building / ROUNDS).mkdir()
        (building / HEADS).mkdir()
        fill(building)
        given = [path for path in building.rglob("*") if path.is_file()]
        with closing(sqlite3.connect(building / INDEX, isolation_level=None)) as index:
            index.executescript(_TABLES)
            store = cls(building, index)
            with store._transaction():
                store._set("format", FORMAT)
                store._set("about", dict(about))
                store._count(given)
                store.log("created")
        _sync_tree(building)

    @classmethod
    @contextmanager
    def reading(cls, directory: Path) -> Iterator[Self]:
        """Opens a store for reading, also while another process writes.

        Args:
            directory: Of the store.

        Yields:
            The store.

        Raises:
            ArtifactError: It is none, or damaged, or of a later format.
        """
        if not (directory / INDEX).is_file():
            raise ArtifactError(f"'{directory}' is no session; 'crispedit session init MODEL DIR' makes one")
        with _explained(directory), closing(_connect(directory / INDEX)) as index:
            store = cls(directory, index)
            store._check()
            yield store

    @classmethod
    @contextmanager
    def writing(cls, directory: Path) -> Iterator[Self]:
        """Opens a store for writing, alone, and removes what a killed process left behind.

        Args:
            directory: Of the store.

        Yields:
            The store; :attr:`tidied` says what was removed.

        Raises:
            ArtifactError: Another process writes to it, or it cannot be written.
        """
        with cls.reading(directory) as store, _locked(directory):
            store.tidied = store.strays()
            if store.tidied:  # said before it is done: a kill in between must not leave it unsaid
                with store._transaction():
                    store.log(f"removed what an interrupted command had left: {', '.join(store.tidied)}")
            store._tidy()
            yield store

    tidied: list[str] = []  # noqa: RUF012  # replaced, never changed

    # --- what it says ------------------------------------------------------------------------------------------------
    @property
    def about(self) -> dict[str, Any]:
        """What was given to :meth:`create`."""
        return dict(self._get("about"))

    def rounds(self) -> list[dict[str, Any]]:
        """The records of all rounds, in order; no other file is read."""
        return [json.loads(text) for (text,) in self._index.execute("SELECT record FROM rounds ORDER BY number")]

    def entries(self) -> list[tuple[float, str]]:
        """The log: when (seconds since 1970) and what, oldest first."""
        return list(self._index.execute("SELECT time, entry FROM log ORDER BY rowid"))

    def files(self) -> list[str]:
        """The files that count, by their paths in the store, in order."""
        return [name for (name,) in self._index.execute("SELECT path FROM files ORDER BY path")]

    def strays(self) -> list[str]:
        """Rounds and heads that do not count: another process is writing them, or was killed while it did."""
        names = {f"{ROUNDS}/{name}" for (name,) in self._index.execute("SELECT directory FROM rounds")}
        there = [f"{part}/{path.name}" for part in (ROUNDS, HEADS) for path in (self.directory / part).iterdir()]
        return sorted(set(there) - names - {self._get("head")})

    def num_bytes(self) -> int:
        """Of all files that count."""
        (total,) = self._index.execute("SELECT COALESCE(SUM(bytes), 0) FROM files").fetchone()
        return int(total)

    def value(self, name: str, default: Any = None) -> Any:
        """Something that :meth:`commit` or :meth:`rewind` set."""
        return self._get(f"value/{name}", default)

    def path(self, number: int, name: str) -> Path:
        """A file of a round, once its checksum has been compared.

        Args:
            number: Of the round.
            name: Of the file in it.

        Returns:
            Its path.

        Raises:
            ArtifactError: There is none, or it is damaged.
        """
        found = self._index.execute("SELECT directory FROM rounds WHERE number = ?", (number,)).fetchone()
        if found is None:
            raise ArtifactError(f"'{self.directory}' has no round {number}")
        return self.checked(f"{ROUNDS}/{found[0]}/{name}")

    def checked(self, name: str) -> Path:
        """A file that counts, by its path in the store, once its checksum has been compared."""
        path = self.directory / name
        found = self._index.execute("SELECT bytes, sha256 FROM files WHERE path = ?", (name,)).fetchone()
        if found is None:
            raise ArtifactError(f"'{self.directory}' has no file {name}")
        if not path.is_file():
            raise ArtifactError(f"'{path}' is missing; nothing else was touched")
        if path.stat().st_size != found[0] or _checksum(path) != found[1]:
            raise ArtifactError(f"'{path}' is damaged: its checksum is another; nothing else was touched")
        return path

    def damaged(self, progress: Callable[[str, int, int], None] = lambda *_: None) -> list[str]:
        """What is wrong with files that count, one line each; all of them are read."""
        names, wrong = self.files(), []
        for number, name in enumerate(names):
            try:
                self.checked(name)
            except ArtifactError as error:
                wrong.append(str(error).removesuffix("; nothing else was touched"))
            progress("checksums", number + 1, len(names))
        return wrong

    # --- changes -----------------------------------------------------------------------------------------------------
    @contextmanager
    def new_round(self) -> Iterator[Path]:
        """A directory for the files of a round; it counts if it is handed to :meth:`commit` inside the block."""
        building = self.directory / ROUNDS / f".{uuid4().hex[:12]}"
        building.mkdir()
        try:
            yield building
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def head_path(self) -> Path:
        """A name for a new file that only the newest round needs."""
        return self.directory / HEADS / f"{uuid4().hex[:12]}.safetensors"

    def commit(
        self,
        building: Path,
        record: Mapping[str, Any],
        *,
        head: Path | None,
        values: Mapping[str, Any],
        entry: str,
    ) -> int:
        """Makes a round count, with everything that goes with it.

        Args:
            building: From :meth:`new_round`, with its files.
            record: Of the round; JSON-ready.
            head: From :meth:`head_path`, written; in place of the one before.
            values: What else is to be true from now on.
            entry: For the log.

        Returns:
            The number of the round, from 1.
        """
        number = len(self.rounds()) + 1
        final = building.with_name(f"{number:04d}-{building.name.removeprefix('.')}")
        _sync_tree(building)
        building.rename(final)
        _sync(final.parent)
        with self._transaction():
            self._index.execute("INSERT INTO rounds VALUES (?, ?, ?)", (number, final.name, json.dumps(dict(record))))
            self._count([path for path in final.rglob("*") if path.is_file()])
            self._set_head(head)
            self._set_values(values)
            self.log(entry)
        self._tidy()
        return number

    def rewind(self, number: int, *, head: Path | None, values: Mapping[str, Any], entry: str) -> None:
        """Takes back every round after one.

        Args:
            number: The last round that stays; 0 for none.
            head: As in :meth:`commit`.
            values: As there.
            entry: As there.
        """
        with self._transaction():
            gone = self._index.execute("SELECT directory FROM rounds WHERE number > ?", (number,)).fetchall()
            for (name,) in gone:
                self._index.execute("DELETE FROM files WHERE path GLOB ?", (f"{ROUNDS}/{name}/*",))
            self._index.execute("DELETE FROM rounds WHERE number > ?", (number,))
            self._set_head(head)
            self._set_values(values)
            self.log(entry)
        self._tidy()

    def set(self, values: Mapping[str, Any], entry: str | None = None) -> None:
        """Makes values true, in one transaction, with an entry of the log."""
        with self._transaction():
            self._set_values(values)
            if entry is not None:
                self.log(entry)

    def log(self, entry: str) -> None:
        """Adds a line to the log."""
        with nullcontext() if self._index.in_transaction else self._transaction():
            self._index.execute("INSERT INTO log VALUES (?, ?)", (time.time(), entry))

    @property
    def head(self) -> Path | None:
        """The file that only the newest round needs, once its checksum has been compared."""
        name = self._get("head")
        return self.checked(name) if name is not None else None

    def _set_head(self, head: Path | None) -> None:
        old = self._get("head")
        if old is not None:
            self._index.execute("DELETE FROM files WHERE path = ?", (old,))
        if head is not None:
            _sync(head)
            _sync(head.parent)
            self._count([head])
        self._set("head", f"{HEADS}/{head.name}" if head is not None else None)

    def _set_values(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self._set(f"value/{name}", value)

    def _count(self, paths: Sequence[Path]) -> None:
        """Files that count from now on, with size and checksum."""
        for path in sorted(paths):
            row = path.relative_to(self.directory).as_posix(), path.stat().st_size, _checksum(path)
            self._index.execute("INSERT INTO files VALUES (?, ?, ?)", row)

    def _tidy(self) -> None:
        """Removes rounds and heads that do not count."""
        for name in self.strays():
            path = self.directory / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._index.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._set("checksum", self._content())
            self._index.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # some failures, such as a full disk, have rolled it back already
                self._index.execute("ROLLBACK")
            raise

    def _check(self) -> None:
        """Refuses an index of another format, or with rows that are not as they were written."""
        self._index.execute("BEGIN")  # one state of it, whoever writes
        found = dict(self._index.execute("SELECT name, value FROM about WHERE name IN ('format', 'checksum')"))
        if found.get("format") != str(FORMAT):
            raise ArtifactError(f"'{self.directory}' has format {found.get('format')}, and this version reads {FORMAT}")
        (sound,) = self._index.execute("PRAGMA integrity_check(1)").fetchone()  # SQLite's own look-up structures
        if sound != "ok" or found.get("checksum") != json.dumps(self._content()):
            raise ArtifactError(
                f"'{self.directory / INDEX}' is damaged: its checksum is another; the patches in "
                f"'{self.directory / ROUNDS}' can still be put on with 'crispedit patch apply'"
            )
        self._index.execute("COMMIT")

    def _content(self) -> str:
        """A checksum of all rows."""
        digest = hashlib.sha256()
        for table in ("about WHERE name != 'checksum'", "rounds", "files", "log"):
            for row in self._index.execute(f"SELECT * FROM {table} ORDER BY rowid"):
                digest.update(f"{table} {row!r}\n".encode())
        return digest.hexdigest()

    def _get(self, name: str, default: Any = None) -> Any:
        found = self._index.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
        return json.loads(found[0]) if found is not None else default

    def _set(self, name: str, value: Any) -> None:
        self._index.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, json.dumps(value)))


def _connect(path: Path) -> sqlite3.Connection:
    """The index, with transactions that are on the disk when they end; one that is begun by another is waited for."""
    index = sqlite3.connect(path, isolation_level=None, timeout=10)
    index.execute("PRAGMA synchronous = EXTRA")
    return index


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """The right to write. SQLite's lock on a file of its own: the system gives it back when the process ends."""
    if not os.access(directory, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ArtifactError(f"'{directory}' cannot be written to; it can only be read")
    with closing(sqlite3.connect(directory / LOCK, isolation_level=None, timeout=0)) as lock:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            raise ArtifactError(f"another process is writing to '{directory}'; wait until it is done") from None
        yield


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Says what SQLite and the system report in a line, with the directory's name."""
    try:
        yield
    except sqlite3.Error as error:
        raise ArtifactError(f"'{directory / INDEX}' cannot be used: {error}") from error
    except OSError as error:
        raise ArtifactError(f"cannot use '{directory}': {error}") from error


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_tree(directory: Path) -> None:
    """Everything in a directory, and itself, to the disk."""
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    """A file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
