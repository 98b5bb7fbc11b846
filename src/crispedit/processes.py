"""What one of several processes has of a model and of the work, by counting: no process is started.

The rules are those of :mod:`crispedit.distributed` and :mod:`crispedit.sharding`, which do what is counted here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from .distributed import owners
from .errors import ConfigError
from .models import EditMatrix, decoder_blocks

Item = TypeVar("Item")
GATHERED = 2
"""Blocks that a device holds whole while a sharded model runs: the one that is run, and the next."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Args:
        size: How many there are.
        shard: Whether the model is divided among them.
        offload: Whether the blocks below the first edited one wait outside the device (:mod:`crispedit.offload`).
    """

    size: int = 1
    shard: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"processes is {self.size}; it must be 1 or more")
        if self.shard and self.size == 1:
            raise ConfigError("--shard divides a model among processes: give --processes too")
        if self.offload and self.size > 1:
            raise ConfigError("--offload is of one process: leave it or --processes out")

    @property
    def asking(self) -> int:
        """How many share questions and the texts of drift: with parts of a model all run every forward pass."""
        return 1 if self.shard else self.size

    def part(self, count: int) -> int:
        """The most that one process has of so many items."""
        return -(-count // self.size)

    def busiest(self, batches: Sequence[Sequence[int]], size: int | None = None) -> list[Sequence[int]]:
        """The batches of the process with the most tokens, of every n-th batch for each.

        Args:
            batches: Lengths of their rows, in tokens.
            size: How many processes share them; all where omitted.

        Returns:
            Some of the batches.
        """
        size = self.size if size is None else size
        parts = [list(batches[rank::size]) for rank in range(size)]
        return max(parts, key=lambda part: sum(map(sum, part)))

    def owned(self, items: Sequence[Item], costs: Sequence[float]) -> list[list[Item]]:
        """Pieces of work by the process that does each."""
        found: list[list[Item]] = [[] for _ in range(self.size)]
        for item, owner in zip(items, owners(costs, self.size), strict=True):
            found[owner].append(item)
        return found

    def weight_bytes(self, model: Any, matrices: Sequence[EditMatrix], dtype: torch.dtype) -> int:
        """Bytes of the parameters that one process holds between forward passes.

        Args:
            model: A causal LM, on any device; ``meta`` will do.
            matrices: What is edited, which every process has whole.
            dtype: Of the parameters.

        Returns:
            All of them, or all but those of blocks that wait; of a sharded model its part of the frozen ones, and the
            edited ones.
        """
        every: set[nn.Parameter] = set(model.parameters())
        if self.offload:
            every = every.difference(*_below(model, matrices))
        if not self.shard:
            return _numbers(every) * dtype.itemsize
        whole = _kept_whole(matrices)
        frozen = sum(self.part(p.numel()) for p in every - whole)
        return (frozen + _numbers(whole)) * dtype.itemsize

    def gathered_bytes(self, model: Any, matrices: Sequence[EditMatrix], dtype: torch.dtype) -> int:
        """Bytes that one process holds beside these while the model runs.

        Args:
            model: A causal LM, on any device; ``meta`` will do.
            matrices: What is edited.
            dtype: Of the parameters.

        Returns:
            0; the largest of the blocks that wait, where there are any; of a sharded model what is in no block (FSDP2
            keeps it whole once it has run), and :data:`GATHERED` of the largest blocks.
        """
        if self.offload:
            return max(map(_numbers, _below(model, matrices)), default=0) * dtype.itemsize
        if not self.shard:
            return 0
        *blocks, rest = self.divided(model, matrices)
        return (rest + sum(sorted(blocks, reverse=True)[:GATHERED])) * dtype.itemsize

    def divided(self, model: Any, matrices: Sequence[EditMatrix]) -> list[int]:
        """Numbers of parameters that a divided model is put together of: of every block, then of what is in none.

        Args:
            model: A causal LM, on any device; ``meta`` will do.
            matrices: What is edited, which every process has whole.

        Returns:
            One for each block, and the last.
        """
        whole = _kept_whole(matrices)
        blocks = [set(block.parameters()) - whole for block in decoder_blocks(model)[1]]
        rest = set(model.parameters()).difference(whole, *blocks)
        return [*map(_numbers, blocks), _numbers(rest)]


ALONE = Processes()
"""One process with all of the model."""


def _below(model: Any, matrices: Sequence[EditMatrix]) -> list[set[nn.Parameter]]:
    """The parameters of every block below the first edited one."""
    return [set(block.parameters()) for block in decoder_blocks(model)[1][: matrices[0].layer]]


def _numbers(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _kept_whole(matrices: Sequence[EditMatrix]) -> set[nn.Parameter]:
    """The parameters that are not divided: edited matrices, with their biases."""
    return {p for matrix in matrices for p in matrix.module.parameters(recurse=False)}
