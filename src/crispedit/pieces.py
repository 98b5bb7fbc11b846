"""Logits of many tokens, a few tokens at a time.

With a vocabulary of 150,000 the logits of one batch of texts are a gigabyte, and what is made of them (losses, labels,
divergences, gradients) takes as much again several times. So a model is run up to its head, and the head is applied to
a few positions at a time, which is the same product. Whether logits are what the head gives, and nothing that comes
after it (a soft cap, a scale), is seen in every batch: the model itself is let go on at one position.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from . import ranks
from .texts import TokenBatch

AT_ONCE = {"cpu": 2**22, "": 2**25}
"""Logits that are there at a time, by kind of device: on a CPU as many as malloc hands out again without new pages."""

_otherwise: WeakSet[Any] = WeakSet()
"""Models whose logits are something else than what their head gives."""


def tokens_at_once(vocabulary: int, device: str) -> int:
    """How many positions have their logits at a time."""
    return max(1, AT_ONCE.get(device, AT_ONCE[""]) // vocabulary)


@dataclass(frozen=True)
class HiddenStates:
    """What logits are made of, and how.

    Args:
        states: What the head is given, (…, width); or, where that cannot be told, the logits themselves.
        head: From some of them to their logits, (…, vocabulary), in the model's dtype.
        vocabulary: How many logits a position has.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]
    vocabulary: int

    @classmethod
    def of_logits(cls, logits: Tensor) -> "HiddenStates":
        """Logits themselves, (…, vocabulary), with a head that has nothing left to do."""
        return cls(logits, lambda states: states, logits.shape[-1])

    def at(self, positions: Tensor) -> "HiddenStates":
        """Those at some positions, (positions, width).

        Args:
            positions: A mask over all dimensions but the last.
        """
        return replace(self, states=self.states[positions.to(self.states.device)])

    def pieces(self) -> Iterator[slice]:
        """Parts of (positions, width): as many as may have their logits at a time; of none, one part without any."""
        step = tokens_at_once(self.vocabulary, self.states.device.type)
        return (slice(first, first + step) for first in range(0, max(1, len(self.states)), step))

    def logits(self, piece: slice) -> Tensor:
        """The logits of a part, (positions, vocabulary) float32."""
        return self.head(self.states[piece]).float()


def hidden_states(model: Any, batch: TokenBatch) -> HiddenStates:
    """Runs a model up to its head.

    Args:
        model: A causal LM. Of one that is sharded the logits themselves are given: its head is in pieces.
        batch: Right-padded token rows, on the device of the model's embeddings.

    Returns:
        What its logits are made of, (rows, length, width).
    """
    given = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
    return up_to_head(model, lambda: model(**given).logits)


def up_to_head(model: Any, run: Callable[[], Tensor]) -> HiddenStates:
    """Runs a model up to its head in a way of one's own.

    Args:
        model: A causal LM, as in :func:`hidden_states`.
        run: Calls it, and gives its logits, (rows, length, vocabulary).

    Returns:
        What these are made of, (rows, length, width).
    """
    head = None if ranks.in_step() or model in _otherwise else model.get_output_embeddings()
    if head is not None:
        kept: list[Tensor] = []

        def at_one(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            kept.append(arguments[0])
            return (_first(arguments[0]), *arguments[1:])

        handle = head.register_forward_pre_hook(at_one)
        try:
            logits = run()
        finally:
            handle.remove()
        if len(kept) == 1 and torch.equal(logits.float(), head(_first(kept[0])).to(logits.device).float()):
            return HiddenStates(kept[0], head, logits.shape[-1])
        _otherwise.add(model)
    return HiddenStates.of_logits(run())


def _first(states: Tensor) -> Tensor:
    """The first position, with strides of its own: with those of a slice torch multiplies by a copy of the head."""
    return states[0, 0].detach()[None, None]
