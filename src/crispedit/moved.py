"""What moves between processes: bytes of the tensors that they sum, give to each other, and put a model together of.

What a collective leaves with a process is counted, once: over a link goes up to twice as much of a sum (by a ring), and
a little less of what is put together. Scalars, answers and hashes are left out.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .models import EditMatrix
from .processes import Processes


class Moved:
    """Bytes that move in passes through a model, and beside them; 0 of a model that every process has whole.

    Args:
        processes: The processes of the run.
        model: A causal LM, on any device; ``meta`` will do.
        matrices: What is edited.
        dtype: Of the parameters.
    """

    def __init__(self, processes: Processes, model: Any, matrices: Sequence[EditMatrix], dtype: torch.dtype) -> None:
        self.processes = processes
        numbers = processes.divided(model, matrices) if processes.shard else [0]
        *blocks, self._rest = (number * dtype.itemsize for number in numbers)
        first = matrices[0].layer
        self._blocks, self._recorded, self._above = sum(blocks), sum(blocks[: first + 1]), sum(blocks[first:])

    def exchanged(self, num_bytes: int) -> int:
        """Of tensors that are summed, or that one process gives to the others: none where there are no others."""
        return num_bytes if self.processes.size > 1 else 0

    def forward(self, count: int) -> int:
        """Of so many forward passes: the blocks are put together in each, what is in no block in the first."""
        return count * self._blocks + min(1, count) * self._rest

    def texts(self, count: int) -> int:
        """Of so many passes forward, and backward to the first edited block: what is run backward, a second time."""
        return count * (self._blocks + self._above + 2 * self._rest)

    def steps(self, count: int) -> int:
        """Of so many steps, which begin at the first edited block."""
        return count * (2 * self._above + self._rest)

    def recording(self, count: int) -> int:
        """Of so many batches that are run up to the first edited matrix."""
        return count * self._recorded

    def replayed(self, count: int) -> int:
        """Of so many batches that are run from there on."""
        return count * self._above
