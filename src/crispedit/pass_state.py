"""Where a pass over texts is: its sums, and the file from which it goes on after an interruption.

A pass over many texts takes long. It leaves its state in a file as it goes, and goes on from there with the same result
bit for bit; every process has a file of its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import ranks
from .artifacts import write_tensors
from .errors import ArtifactError
from .factors import FactorSums
from .models import EditMatrix
from .moments import Kind
from .progress import log


class PassState:
    """Where a pass is: the sums so far, and the batches behind it."""

    def __init__(self, matrices: Sequence[EditMatrix], kind: Kind) -> None:
        self.sums = {m.name: FactorSums(m.shape, m.parameter.device, kind) for m in matrices}
        self.done = 0
        self.whole = True

    def add(self, predicted: Tensor, found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Adds what one batch gave."""
        self.whole = False  # an interruption in here leaves a batch that only some matrices have
        for name, (inputs, gradients) in found.items():
            counted = predicted.to(gradients.device)
            self.sums[name].add(inputs[counted], gradients[counted])
        self.done += 1
        self.whole = True

    def save(self, path: Path, key: str) -> None:
        """Writes the state to a temporary name and renames it: a kill leaves the one before.

        Raises:
            ArtifactError: It cannot be written.
        """
        tensors = {f"{name}/{part}": t.cpu() for name, sums in self.sums.items() for part, t in sums.state().items()}
        tokens = next(iter(self.sums.values())).num_tokens
        about = {"key": key, "done": str(self.done), "tokens": str(tokens)}
        write_tensors(path, tensors, about, "the state of the curvature pass")

    def try_to_save(self, path: Path, key: str) -> bool:
        """As :meth:`save`; where it cannot be written, the pass is none the worse for it."""
        try:
            self.save(path, key)
        except ArtifactError as error:
            log.info("%s; the pass goes on", error)
            return False
        return True

    def restore(self, path: Path, key: str) -> bool:
        """Goes back to what :meth:`save` wrote for the same pass; ``False`` where there is no such file."""
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("key") != key:
                    return False
                tokens, done = int(about["tokens"]), int(about["done"])
                parts = {f"{name}/{part}": t for name, sums in self.sums.items() for part, t in sums.state().items()}
                if any(file.get_slice(key).get_shape() != list(tensor.shape) for key, tensor in parts.items()):
                    return False
                for name, tensor in parts.items():  # nothing can be missing now
                    tensor.copy_(file.get_tensor(name))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
            return False  # damaged, or none: begin again
        for sums in self.sums.values():
            sums.num_tokens = tokens
        self.done = done
        return True


def own_state(path: Path) -> Path:
    """Where a process keeps its state of a pass, of which ``path`` is that of a process alone."""
    if ranks.size() == 1:
        return path
    return path.with_name(f"{path.stem}.{ranks.rank()}-of-{ranks.size()}{path.suffix}")


def saved_sums(path: Path, opened: Any, matrix: EditMatrix) -> FactorSums:
    """The sums of one matrix from the file of a finished pass; the others stay on disk.

    Args:
        path: Where the state is (:func:`own_state`).
        opened: The same, opened by ``safetensors.safe_open`` when the pass was finished: it can be read even when
            another process that did the same pass has removed the file. What is read from it stays mapped, and counts
            as memory, until it is closed; so it is read only then.
        matrix: The matrix.

    Returns:
        The sums, on the device of the matrix.
    """
    try:
        with safe_open(path, "pt") as file:
            return _read_sums(file, matrix)
    except OSError:
        return _read_sums(opened, matrix)


def _read_sums(file: Any, matrix: EditMatrix) -> FactorSums:
    shapes = [file.get_slice(f"{matrix.name}/{side}/total").get_shape() for side in "AG"]
    dense = all(rows == columns for rows, columns in shapes)
    found = FactorSums(matrix.shape, matrix.parameter.device, "dense" if dense else "sketch")
    for part, tensor in found.state().items():
        tensor.copy_(file.get_tensor(f"{matrix.name}/{part}"))
    found.num_tokens = int(file.metadata()["tokens"])
    return found
