"""An edit before it has begun: settings, and the lengths of all that it will put through the model."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .assumed import AUTO, Method
from .checkpoint import Form
from .description import ENERGY
from .edits import spread
from .forward import BatchSize, batch_size, pair_cost
from .moments import Kind
from .processes import ALONE, Processes
from .recording import recorded_together
from .replay import within_windows
from .rows import EditRow
from .training import batches

SAMPLED = 64
"""Of the batches of an epoch so many are put together as the edit will, to count their tokens."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What can be changed to fit a memory.

    Args:
        layers: Decoder blocks that are edited.
        dtype: In which the model computes.
        batch_size: Edits per step, at most.
        mapped: Whether recorded states go to a file whatever their size.
        kind: Of the factors.
        save: What is written at the end: a whole model is read back, to be compared and asked; in the CPU's memory.
        method: How matrices are edited.
    """

    layers: tuple[int, ...]
    dtype: torch.dtype
    batch_size: int
    mapped: bool
    kind: Kind
    save: Form = "model"
    method: Method = AUTO

    def changes(self, before: "Settings") -> list[str]:
        """What is to be done to get from other settings to these."""
        said = []
        if self.batch_size != before.batch_size:
            said.append(f"--batch-size {self.batch_size}")
        if self.mapped and not before.mapped:
            said.append("recorded states in a file")
        if self.save != before.save:
            said.append(f"--save {self.save}")
        if self.dtype != before.dtype:
            said.append(f"--dtype {dtype_name(self.dtype)}")
        if self.kind != before.kind:
            said.append("a curvature of --factors sketch")
        if self.layers != before.layers:
            said.append(f"--layers {','.join(map(str, self.layers))}")
        return said


@dataclass(frozen=True, kw_only=True)
class Workload:
    """An edit before it has begun: what the numbers of a plan depend on, beside the settings.

    Args:
        model: The model on the ``meta`` device.
        rows: One per edit.
        prompts: Lengths in tokens of the prompts that the proof asks, in groups that are answered together.
        proof_rows: The rows that the proof takes the loss of.
        halves: Lengths of the texts of the curvature: per half, per batch, per text. Empty if it is there already.
        held_out: The same of the texts for drift, per batch.
        known: Whether the edit takes a curvature that is there already.
        stored_dtype: The checkpoint's.
        epochs: Passes over the rows, at most.
        energy: γ of the edit.
        ranks: Effective ranks of A and G by matrix name, where a curvature that is known says them.
        on_cpu: Whether the model computes on the CPU: memory that is freed stays with the process, and the saved
            model is read back into the same memory.
        mixed: Whether steps compute in bfloat16 around float32 weights.
        base_bytes: What the process takes before it loads a weight; 0 where that is not the device's memory.
        base_seconds: What it takes to start it.
        processes: The processes of the run.
    """

    model: Any
    rows: Sequence[EditRow]
    prompts: Sequence[Sequence[int]]
    proof_rows: Sequence[EditRow]
    halves: Sequence[Sequence[Sequence[int]]]
    held_out: Sequence[Sequence[int]]
    known: bool
    stored_dtype: torch.dtype
    epochs: int
    energy: float = ENERGY
    ranks: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    on_cpu: bool = False
    mixed: bool = False
    base_bytes: int = 0
    base_seconds: float = 0.0
    processes: Processes = ALONE
    _sizes: dict[int, list[BatchSize]] = field(default_factory=dict, init=False, repr=False)

    @property
    def packed(self) -> bool:
        """Whether rows of a batch share what they have in common, as far as the configuration says."""
        return within_windows(self.model, self.rows)

    def steps(self, rows: int) -> list[BatchSize]:
        """Sizes of batches of so many rows, put together as the first epoch's are; of some if there are many."""
        if rows not in self._sizes:
            lengths = [len(row.ids) for row in self.rows]
            every = batches(lengths, rows, random.Random(0), alike=not self.packed)
            self._sizes[rows] = self._sized(spread(every, SAMPLED))
        return self._sizes[rows]

    def recording(self) -> list[BatchSize]:
        """Sizes of the batches that are recorded."""
        if 0 not in self._sizes:  # no step has no rows
            self._sizes[0] = self._sized(recorded_together(self.model, self.rows, self.packed))
        return self._sizes[0]

    def _sized(self, groups: Sequence[Sequence[int]]) -> list[BatchSize]:
        cost = pair_cost(self.model) if self.packed else None
        return [batch_size([self.rows[index] for index in group], cost) for group in groups]


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
