"""Directories, JSON files and files of tensors that are written whole or not at all.

Of several processes only the main one writes results, and looks whether it can; states of unfinished work, which are
files of tensors, are each process's own.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import ranks
from .errors import ArtifactError
from .progress import log

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves stays there
    fcntl = None  # type: ignore[assignment]

_BUILDING = ".building-"
"""In the names of unfinished directories: nobody's own directory is taken for one."""

if TYPE_CHECKING:  # the command line needs this module before it knows whether it needs torch
    from torch import Tensor


def check_writable(directory: Path, *, overwrite: bool | None = False) -> None:
    """Refuses a place where a new directory cannot be written, before any work is done.

    Args:
        directory: Where the result is to go.
        overwrite: Whether something that is already there may be replaced; ``None`` where no option says that it may.

    Raises:
        ArtifactError: It is a file, or a directory that is not empty, or cannot be created.
    """
    if not ranks.is_main():
        return
    if directory.is_file():
        raise ArtifactError(f"'{directory}' is a file; name a new directory")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        instead = "name another one" + ("" if overwrite is None else " or give --overwrite")
        raise ArtifactError(f"the directory '{directory}' is not empty; {instead}")
    parent = directory.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ArtifactError(f"cannot write to '{parent}'; name a directory elsewhere")


def check_writable_file(path: Path | None, option: str, *, overwrite: bool = True) -> None:
    """Refuses a place where a file cannot be written, before any work is done.

    Args:
        path: The file; none is wanted when omitted.
        option: What named it, for the message.
        overwrite: Whether a file that is already there may be replaced.

    Raises:
        ArtifactError: It is a directory, or there already, or cannot be created.
    """
    if path is None or not ranks.is_main():
        return
    if path.is_dir():
        raise ArtifactError(f"{option} '{path}' is a directory; name a file")
    if path.exists() and not overwrite:
        raise ArtifactError(f"the file '{path}' exists; name another one or give --overwrite")
    check_writable(path.parent, overwrite=True)


def check_space(directory: Path, num_bytes: int) -> None:
    """Refuses a file system with less room than ``num_bytes`` and a tenth.

    Args:
        directory: Where the result is to go; it need not exist.
        num_bytes: Size of the result.

    Raises:
        ArtifactError: There is not enough room.
    """
    if not ranks.is_main():
        return
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < 1.1 * num_bytes:
        raise ArtifactError(
            f"no space for '{directory}': it needs {1.1 * num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free"
        )


@contextmanager
def write_directory(directory: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside ``directory`` that takes its name when the block ends well.

    Args:
        directory: The final name.
        overwrite: Whether a directory that is not empty is replaced.

    Yields:
        The temporary directory. It is removed if the block raises.

    Raises:
        ArtifactError: The place cannot be written to, or the disk is full.
    """
    check_writable(directory, overwrite=overwrite)
    try:
        with building_beside(directory) as building:
            yield building
            for file in building.rglob("*"):
                if file.is_file():
                    _open_to_others(file)
            if directory.is_dir():
                shutil.rmtree(directory)
            building.replace(directory)
    except OSError as error:
        raise ArtifactError(f"cannot write '{directory}': {error.strerror or error}") from error


@contextmanager
def building_beside(directory: Path) -> Iterator[Path]:
    """A temporary directory beside ``directory``, to be renamed inside the block.

    Those for the same directory that a killed process has left are removed, which is said.

    Args:
        directory: The final name.

    Yields:
        The temporary directory. It is removed if it is still there after the block.
    """
    parent, prefix = directory.absolute().parent, f".{directory.name}{_BUILDING}"
    parent.mkdir(parents=True, exist_ok=True)
    for left in sorted(path for path in parent.iterdir() if path.name.startswith(prefix)):
        with _held(left) as ours:
            if ours:
                log.info("an interrupted command had left %s: removed", left)
                shutil.rmtree(left, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    building.chmod(0o777 & ~_umask())
    with _held(building):
        try:
            yield building
        finally:
            shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _held(directory: Path) -> Iterator[bool]:
    """Whether a directory is this process's until the block ends; the system gives it back when the process does."""
    if fcntl is None:
        yield False
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # whose it was has removed it in the meantime
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = True
    except OSError:
        ours = False
    try:
        yield ours
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's umask (it can only be read by setting it)."""
    current = os.umask(0)
    os.umask(current)
    return current


def _open_to_others(file: Path) -> None:
    """Gives a file the permissions that every new file has: safetensors (0.8) leaves one for its owner alone."""
    file.chmod(0o666 & ~_umask())


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; see :func:`write_text`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it; only the main process does.

    Args:
        path: The file; its directory is created.
        text: What to write.

    Raises:
        ArtifactError: It cannot be written.
    """
    if not ranks.is_main():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write '{path}': {error.strerror or error}") from error


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", about: Mapping[str, str], what: str) -> None:
    """Writes tensors under a temporary name, to the disk, and renames the file: a kill leaves the one before.

    Args:
        path: The safetensors file; its directory is created.
        tensors: On the CPU.
        about: Metadata.
        what: What they are, for a message.

    Raises:
        ArtifactError: It cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), temporary, metadata=dict(about))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        _open_to_others(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise ArtifactError(f"cannot write {what} to '{path}': {error}") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Args:
        path: The file.

    Returns:
        Its value.

    Raises:
        ArtifactError: It is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"cannot read '{path}': {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"'{path}' is not JSON: {error}") from error
