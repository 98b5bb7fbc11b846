"""What moves between processes: bytes of the tensors that they sum, give to each other, and put a model together of.

What a collective leaves with a process is counted, once: over a link goes up to twice as much of a sum (by a ring), and
a little less of what is put together. Scalars and answers are left out.
"""

from collections.abc import Sequence
from functools import cached_property
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
        self.processes, self.model, self.matrices, self.dtype = processes, model, matrices, dtype

    @cached_property
    def _parts(self) -> tuple[int, int, int]:
        """Of a divided model: the blocks below the first edited one, the others, and what is in no block."""
        if not self.processes.shard:
            return 0, 0, 0
        *blocks, rest = (numbers * self.dtype.itemsize for numbers in self.processes.divided(self.model, self.matrices))
        first = self.matrices[0].layer
        return sum(blocks[:first]), sum(blocks[first:]), rest

    def exchanged(self, num_bytes: int) -> int:
        """Of tensors that are summed, or that one process gives to the others: none where there are no others."""
        return num_bytes if self.processes.size > 1 else 0

    def forward(self, count: int) -> int:
        """Of so many forward passes: the blocks are put together in each, what is in no block in the first."""
        below, above, rest = self._parts
        return count * (below + above) + min(1, count) * rest

    def texts(self, count: int) -> int:
        """Of so many passes forward, and backward to the first edited block: what is run backward, a second time."""
        below, above, rest = self._parts
        return count * (below + 2 * above + 2 * rest)

    def steps(self, count: int) -> int:
        """Of so many steps, which begin at the first edited block."""
        _, above, rest = self._parts
        return count * (2 * above + rest)

    def below(self, count: int) -> int:
        """Of so many batches that are run by the blocks below the first edited one."""
        return count * self._parts[0]

    def above(self, count: int) -> int:
        """Of so many batches that are run by the others."""
        return count * self._parts[1]
