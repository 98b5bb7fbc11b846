"""Measures drift again and again while a model is being edited."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .capability import of_tokens
from .models import EditMatrix
from .progress import Progress, no_progress
from .remembered import Remembered
from .replay import row_logits
from .rows import EditRow
from .texts import TokenBatch, row_batches

SAMPLE = 16
"""Texts of which drift is estimated, about."""
WHOLE = 8
"""Every so many estimates all texts are measured, and say how the sample differs from them."""


class DriftMeter:
    """Drift of a model from what it is now, on held-out texts.

    What lies below the first edited matrix is run once (:mod:`crispedit.replay`), and so is the model as it is now
    (:mod:`crispedit.remembered`): a measurement takes the blocks above, and the head twice. Both go the same way, batch
    by batch, so that a model that has not changed has not drifted, in any precision.

    Args:
        model: The model, which will be edited in place.
        matrices: Those that will change, in ascending order of layers.
        batches: The texts, the shortest first.
        progress: Called while they are run for the first time.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        matrices: Sequence[EditMatrix],
        batches: Sequence[TokenBatch],
        progress: Progress = no_progress,
    ) -> None:
        every = [_rows(batch) for batch in batches]
        texts = [row for rows in every for row in rows]
        some = row_batches(model, [row.ids for row in texts[:: max(1, len(texts) // SAMPLE)]])
        groups = [*every, *map(_rows, some)]
        self._whole, self._sample = range(len(every)), range(len(every), len(groups))
        # of several processes each measures its share, and needs no other texts for it
        mine = [number for part in (self._whole, self._sample) for number in distributed.share(part)]
        index = {row: place for place, row in enumerate(dict.fromkeys(row for n in mine for row in groups[n]))}
        self._batches = {number: [index[row] for row in groups[number]] for number in mine}
        self._place = {number: place for place, number in enumerate(mine)}
        if mine:
            self._logits = row_logits(model, matrices, list(index), pack=False, progress=progress)
            self._base = Remembered(self._logits, list(self._batches.values()), progress)
        self._estimates, self._times = 0, 1.0

    @property
    def num_bytes(self) -> int:
        """Of what is kept by this process."""
        return self._logits.num_bytes + self._base.num_bytes if self._batches else 0

    def measure(self) -> tuple[float, float]:
        """Measures on all texts.

        Returns:
            Drift, and the base model's loss; nats per token.
        """
        return self._measure(self._whole)

    def estimate(self) -> float:
        """Measures on a sample, times what all texts said in terms of it when they were last measured.

        Returns:
            Drift on all texts, about; nats per token.
        """
        whole = self._estimates % WHOLE == 0
        self._estimates += 1
        found = self._measure(self._sample)[0]
        if whole:
            drift = self.measure()[0]
            self._times = drift / found if found > 0 else 1.0
            return drift
        return self._times * found

    @torch.no_grad()
    def _measure(self, batches: Sequence[int]) -> tuple[float, float]:
        def sums(number: int) -> Tensor:
            edited, labels = self._logits.states(self._batches[number])
            base = self._base(self._place[number])
            # the same pieces of both: their products are the same where nothing has changed
            parts = [of_tokens(base.logits(p), edited.logits(p), labels[p]).sum(1) for p in edited.pieces()]
            return torch.stack(parts).sum(0)

        drift, loss_base, _, tokens = torch.stack([found for _, found in distributed.spread(batches, sums)]).sum(0)
        return max(0.0, float(drift / tokens)), float(loss_base / tokens)


def _rows(batch: TokenBatch) -> list[EditRow]:
    """Texts as rows, of which every token but the first is a target."""
    return [EditRow(tuple(ids[mask.bool()].tolist()), 1) for ids, mask in zip(batch.ids, batch.mask, strict=True)]
