"""Measures drift again and again while a model is being edited."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .capability import Logits, logits_of, measure_drift
from .models import EditMatrix
from .texts import TokenBatch, row_batches

KEPT = 2**29
"""Bytes of logits of the base model that are kept at the most, to measure drift again."""
SAMPLE = 16
"""Texts of which drift is estimated, about."""
WHOLE = 8
"""Every so many estimates all texts are measured, and say how the sample differs from them."""


class DriftMeter:
    """Drift of a model from what it is with its original matrices, on held-out texts.

    What the base model says is kept from the first time where it takes little memory, and computed anew where not.

    Args:
        model: The model, edited in place.
        matrices: Those that may have changed.
        batches: The texts, the shortest first.
    """

    def __init__(self, model: Any, matrices: Sequence[EditMatrix], batches: Sequence[TokenBatch]) -> None:
        self.model, self.matrices, self.batches = model, matrices, batches
        rows = [ids[mask.bool()].tolist() for batch in batches for ids, mask in zip(batch.ids, batch.mask, strict=True)]
        self._sample = row_batches(model, rows[:: max(1, len(rows) // SAMPLE)])
        self._kept: dict[int, Tensor] = {}
        self._estimates, self._times = 0, 1.0

    def measure(self, originals: Mapping[str, Tensor]) -> tuple[float, float]:
        """Measures on all texts.

        Args:
            originals: The original matrices, by name, in the bases in which the matrices are seen at the moment
                (:mod:`crispedit.rotation`).

        Returns:
            Drift, and the base model's loss; nats per token.
        """
        return self._measure(self.batches, originals)

    def estimate(self, originals: Mapping[str, Tensor]) -> float:
        """Measures on a sample, times what all texts said in terms of it when they were last measured.

        Args:
            originals: As for :meth:`measure`.

        Returns:
            Drift on all texts, about; nats per token.
        """
        whole = self._estimates % WHOLE == 0
        self._estimates += 1
        found = self._measure(self._sample, originals)[0]
        if whole:
            drift = self.measure(originals)[0]
            self._times = drift / found if found > 0 else 1.0
            return drift
        return self._times * found

    def _measure(self, batches: Sequence[TokenBatch], originals: Mapping[str, Tensor]) -> tuple[float, float]:
        base = logits_with(self.model, self.matrices, originals)

        def remembered(batch: TokenBatch) -> Tensor:
            logits = self._kept.get(id(batch))
            if logits is None:
                logits = base(batch)
                if sum(one.nbytes for one in self._kept.values()) + logits.nbytes <= KEPT:
                    self._kept[id(batch)] = logits
            return logits

        found = measure_drift(remembered, logits_of(self.model), batches)
        return found.drift, found.loss_base


def logits_with(model: Any, matrices: Sequence[EditMatrix], weights: Mapping[str, Tensor]) -> Logits:
    """Logits of the model with other weights of some matrices, which are swapped in for every batch and out again."""
    logits = logits_of(model)
    own = {m.name: m.weight.clone() for m in matrices}

    def run(batch: TokenBatch) -> Tensor:
        for matrix in matrices:
            matrix.weight.copy_(weights[matrix.name])
        try:
            return logits(batch)
        finally:
            for matrix in matrices:
                matrix.weight.copy_(own[matrix.name])

    return run
