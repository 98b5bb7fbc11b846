"""What a model said of rows, kept: its logits again for the price of the head, whatever has become of its blocks.

Kept is the output of the last block where something is predicted. Of a token that takes as many numbers as the model
is wide; its logits would take as many as there are words.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CrispEditError
from .forward import RowBatch, scattered
from .models import decoder_blocks
from .pieces import HiddenStates
from .progress import Progress, log, no_progress
from .recording import passed_by
from .replay import RowLogits, tolerance
from .room import room


class Remembered:
    """Logits of batches of rows as they are now.

    Where a model's blocks are not seen to end in hidden states, which is checked, its logits themselves are kept.

    Args:
        logits: Of the rows.
        batches: Indices of rows, in the batches in which they will be asked for.
        progress: Called after every batch.

    Raises:
        NoRoomError: Neither memory nor the disk has room.
    """

    @torch.no_grad()
    def __init__(self, logits: RowLogits, batches: Sequence[Sequence[int]], progress: Progress = no_progress) -> None:
        self.logits, self.batches = logits, batches
        self._blocks = list(decoder_blocks(logits.model)[1])
        self._others: tuple[Any, ...] | None = None  # what a block gives beside hidden states, if it gives a tuple
        self._kept = torch.empty(0)
        try:
            self._fill(progress, ended=True)
        except (_Unfit, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            log.info("logits are kept whole: %s", " ".join(str(error).split())[:200])
            self._fill(progress, ended=False)

    @property
    def num_bytes(self) -> int:
        """Of what is kept."""
        return self._kept.nbytes

    def _fill(self, progress: Progress, *, ended: bool) -> None:
        """Runs all batches, and keeps how they end, or their logits."""
        self.ended, self._first = ended, [0]  # where each batch begins in what is kept, and the last one ends
        for number, chosen in enumerate(self.batches):
            states, hidden = self._run(chosen)
            kept = hidden if ended else torch.cat([states.head(states.states[piece]) for piece in states.pieces()])
            if number == 0:
                targets = sum(self.logits.rows[index].num_targets for batch in self.batches for index in batch)
                (self._kept,), _ = room(targets, [(kept.shape[-1], kept.dtype)], kept.device)
            self._first.append(self._first[-1] + len(kept))
            self._kept[self._first[-2] : self._first[-1]] = kept
            if ended and not _alike(self(number), states, tolerance(hidden.dtype, 1)):
                raise _Unfit("more than hidden states leads from the last block to logits")
            progress("remembering", number + 1, len(self.batches))

    def _run(self, chosen: Sequence[int]) -> tuple[HiddenStates, Tensor]:
        """What a batch's logits are made of, and what the last block gave where they are predicted, (positions, …)."""
        found: list[Tensor] = []

        def ended(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, tuple):
                self._others, output = output[1:], output[0]
            found.append(output)

        handle = self._blocks[-1].register_forward_hook(ended)
        try:
            states = self.logits.states(chosen)[0]
        finally:
            handle.remove()
        positions = self.logits.batch(chosen).positions
        return states, found[0].flatten(0, 1).index_select(0, positions.to(found[0].device))

    def __call__(self, number: int) -> HiddenStates:
        """What the logits of a batch were made of.

        Args:
            number: Of the batch.

        Returns:
            (targets, width).
        """
        kept = self._kept[self._first[number] : self._first[number + 1]]
        if not self.ended:
            return HiddenStates.of_logits(kept)
        batch = self.logits.batch(self.batches[number])
        with ExitStack() as patches:
            for block in self._blocks[:-1]:
                patches.enter_context(passed_by(block, self._nothing))
            patches.enter_context(passed_by(self._blocks[-1], lambda *_, **__: self._output(self._ending(batch, kept))))
            return self.logits.states_of_model(batch)

    def _ending(self, batch: RowBatch, kept: Tensor) -> Tensor:
        device = next(self._blocks[-1].parameters()).device
        return scattered(kept.to(device), batch.positions, *batch.ids.shape)

    def _nothing(self, *arguments: Any, **keywords: Any) -> Any:
        return self._output(arguments[0] if arguments else keywords["hidden_states"])

    def _output(self, hidden: Tensor) -> Any:
        return hidden if self._others is None else (hidden, *self._others)


class _Unfit(CrispEditError):
    """A model does not go from its last block to its logits as is supposed."""


def _alike(one: HiddenStates, other: HiddenStates, bound: float) -> bool:
    """Whether logits are the same but for rounding, relative in Frobenius norm."""
    return all(
        float((one.logits(piece) - other.logits(piece)).norm()) <= bound * float(other.logits(piece).norm())
        for piece in other.pieces()
    )
