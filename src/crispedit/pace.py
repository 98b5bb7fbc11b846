"""How long passes through a model take on a machine that was measured: what is counted, over :mod:`crispedit.speed`."""

from collections.abc import Sequence
from typing import Any

from .costs import Shape, block_costs, head_flops, vocabulary
from .forward import BatchSize
from .generation import MAX_NEW_TOKENS
from .speed import Speed


class Pace:
    """Seconds of passes, of steps and of answers.

    Args:
        speed: Of the device.
        model: A causal LM, on any device; ``meta`` will do.
        first: Index of the first edited block.
        shape: (d_out, d_in) of the matrix that is edited there.
        at_once: Positions of texts that have their logits at a time (:mod:`crispedit.pieces`).
    """

    def __init__(self, speed: Speed, model: Any, *, first: int, shape: Shape, at_once: int) -> None:
        self.speed, self.at_once = speed, at_once
        self._blocks = block_costs(model)
        self._above, self._below = len(self._blocks) - 1 - first, first + 1
        self._matrix = shape[0] * shape[1]
        self._head, self._vocabulary = head_flops(model), vocabulary(model)

    def texts(self, lengths: Sequence[int], *, backward: bool = False, logits: int | None = None) -> float:
        """Of a pass over one batch, forward alone or also backward through the blocks above the first edited one.

        Args:
            lengths: Of its rows, in tokens.
            backward: Whether it is.
            logits: Positions whose logits are computed; all when omitted.

        Returns:
            Seconds.
        """
        tokens = sum(lengths)
        alike = self._alike(tokens, sum(n * n for n in lengths))
        seconds = len(self._blocks) * self.speed.forward(alike)
        if backward:
            seconds += self._above * self.speed.backward(alike)
        positions, together = (tokens, self.at_once) if logits is None else (logits, logits)
        return seconds + self.speed.logits((2 if backward else 1) * positions * self._head, together)

    def recording(self, sizes: Sequence[BatchSize]) -> float:
        """Of batches that are run by the blocks below the first edited matrix, its own among them."""
        return sum((self._below * self.speed.forward(self._alike(size.computed, size.pairs)) for size in sizes), 0.0)

    def step(self, size: BatchSize, products: int, trained: int) -> float:
        """Of one batch of a training: the blocks above, forward and backward, the head, the loss, and the update.

        Args:
            size: Of the batch.
            products: Flops of float32 products beside the model's: of gradients, and of what is done with them.
            trained: Numbers that Adam trains here.

        Returns:
            Seconds.
        """
        alike = self._alike(size.computed, size.pairs)
        blocks = self._above * (self.speed.forward(alike) + self.speed.backward(alike))
        heads = self.speed.logits(2 * self._head * size.positions, size.positions)
        products += 2 * self._matrix * size.tokens  # the first matrix times its recorded inputs
        moved = 6 * 4 * trained / self.speed.copied  # mask, coordinates, sum and copy
        update = products / self.speed.float32 + trained * self.speed.adam + moved
        return blocks + heads + self.losses(size.labels) + update

    def metered(self, size: BatchSize) -> float:
        """Of texts whose drift is measured: the first matrix, the blocks above, the head twice, a divergence."""
        heads = self.speed.logits(2 * size.labels * self._head, self.at_once)
        first = 2 * self._matrix * size.tokens / self.speed.float32
        blocks = self._above * self.speed.forward(self._alike(size.computed, size.pairs))
        return first + blocks + heads + self.losses(size.labels)

    def losses(self, positions: int) -> float:
        """Of labels that are drawn, losses that are taken, or divergences, over the logits of so many positions."""
        return positions * self._vocabulary * self.speed.logit

    def answers(self, prompts: Sequence[Sequence[int]]) -> float:
        """Of answering groups of prompts, by their lengths: a pass over each, and one more for every new token."""
        total = 0.0
        for group in prompts:
            total += self.texts(group, logits=len(group))
            total += MAX_NEW_TOKENS * len(self._blocks) * self.speed.answer(len(group))
            total += self.speed.logits(MAX_NEW_TOKENS * len(group) * self._head, len(group))
        return total

    def _alike(self, tokens: int, pairs: int) -> float:
        """How many tokens, in rows as they were measured, take as many flops of a block as a batch does."""
        block = self._blocks[-1]
        return (block.linear * tokens + block.attention * pairs) / (block.linear + block.attention * self.speed.row)
