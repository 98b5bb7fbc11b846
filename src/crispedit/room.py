"""Room for what is kept of every token of many texts: in a device's memory, the CPU's, or a file."""

import os
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import CrispEditError
from .memory import free_memory

MEMORY_SHARE = 0.25
"""What takes more of the free memory than this is kept in a file and mapped into memory."""


class NoRoomError(CrispEditError):
    """Neither memory nor the disk has room."""


def room(tokens: int, kinds: Sequence[tuple[int, torch.dtype]], device: torch.device) -> tuple[list[Tensor], str]:
    """Uninitialised tensors, all in the fastest place that has room for them.

    Args:
        tokens: Rows of each.
        kinds: Width and dtype of each.
        device: Where they are wanted.

    Returns:
        Tensors (tokens, width), and where they lie: ``memory`` of that device, ``cpu memory`` beside another device,
        or ``file``.

    Raises:
        NoRoomError: The disk is full too.
    """
    num_bytes = tokens * sum(width * dtype.itemsize for width, dtype in kinds)
    for place in dict.fromkeys((device, torch.device("cpu"))):
        if num_bytes <= MEMORY_SHARE * free_memory(place):
            where = "memory" if place == device else "cpu memory"
            return [torch.empty(tokens, width, dtype=dtype, device=place) for width, dtype in kinds], where
    return [_mapped(tokens, width, dtype) for width, dtype in kinds], "file"


def _mapped(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised (tokens, width) in a temporary file, which has no name any more and goes with the tensor."""
    num_bytes = tokens * width * dtype.itemsize
    with tempfile.NamedTemporaryFile(prefix="crispedit-record-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # a full disk is told of now, and not by a signal
        except OSError as error:
            raise NoRoomError(
                f"no room for {num_bytes / 1e9:.1f} GB in {tempfile.gettempdir()}: {error.strerror}"
            ) from error
        return torch.from_file(file.name, shared=True, size=tokens * width, dtype=dtype).view(tokens, width)
