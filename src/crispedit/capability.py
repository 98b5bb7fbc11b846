"""What an edit must leave as it was: capability drift, capability loss, and the bundled model's tasks.

Capability drift is the mean over capability tokens of KL(base ‖ edited), in nats per token: for softmax
cross-entropy exactly the Bregman divergence that CrispEdit constrains (arXiv 2602.15823, definition 1),
and independent of the labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .bundled import abilities, corpus
from .generation import answers
from .models import EditMatrix
from .pieces import HiddenStates, hidden_states
from .progress import Progress, no_progress
from .rows import Prompter
from .texts import TokenBatch, next_tokens, text_batches

Logits = Callable[[TokenBatch], HiddenStates]
"""From a batch to what its logits are made of, (rows, length, width)."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Capability before and after, means over tokens that have a next token.

    Args:
        drift: KL(base ‖ model), nats per token.
        loss_base: Cross-entropy of the base model, nats per token.
        loss: That of the model.
    """

    drift: float
    loss_base: float
    loss: float


def logits_of(model: Any) -> Logits:
    """A model's logits as a function of token batches."""

    def logits(batch: TokenBatch) -> HiddenStates:
        return hidden_states(model, batch.to(model.get_input_embeddings().weight.device))

    return logits


def logits_with(model: Any, matrices: Sequence[EditMatrix], weights: Mapping[str, Tensor]) -> Logits:
    """Logits of the model with other weights of some matrices, which are swapped in for every batch and out again."""
    logits = logits_of(model)
    own = {m.name: m.weight.clone() for m in matrices}

    def run(batch: TokenBatch) -> HiddenStates:
        for matrix in matrices:
            matrix.weight.copy_(weights[matrix.name])
        try:
            return logits(batch)
        finally:
            for matrix in matrices:
                matrix.weight.copy_(own[matrix.name])

    return run


@dataclass(frozen=True, kw_only=True)
class TextSums:
    """What is summed over the tokens of each text that have a next token; (texts,) each, float64, in nats.

    Args:
        drift: KL(base ‖ model).
        loss_base: Cross-entropy of the base model.
        loss: That of the model.
        tokens: How many tokens.
    """

    drift: Tensor
    loss_base: Tensor
    loss: Tensor
    tokens: Tensor

    def means(self) -> Drift:
        """Over all tokens."""
        tokens = self.tokens.sum()
        drift, loss_base, loss = (float(sums.sum() / tokens) for sums in (self.drift, self.loss_base, self.loss))
        return Drift(drift=max(0.0, drift), loss_base=loss_base, loss=loss)

    def of_base(self) -> "TextSums":
        """The same of the base model itself, which has no drift."""
        return replace(self, drift=torch.zeros_like(self.drift), loss=self.loss_base)


@torch.no_grad()
def drift_of_texts(
    base: Logits, edited: Logits, batches: Sequence[TokenBatch], *, progress: Progress = no_progress
) -> TextSums:
    """Capability drift and both losses, text by text, summed in float64.

    Args:
        base: Logits of the base model.
        edited: Logits of the edited model, over the same vocabulary.
        batches: Right-padded token rows.
        progress: Called after every batch.

    Returns:
        The sums, in the order of the batches.
    """

    def sums(batch: TokenBatch) -> Tensor:
        labels = next_tokens(batch)
        counted = labels != -100
        before, after = (logits(batch).at(counted) for logits in (base, edited))
        wanted = labels[counted]
        parts = [of_tokens(before.logits(piece), after.logits(piece), wanted[piece]) for piece in after.pieces()]
        found = torch.cat(parts, 1)
        text = counted.nonzero()[:, 0]
        return torch.zeros(4, len(labels), dtype=torch.float64).index_add_(1, text, found)

    parts = []
    for _, part in distributed.spread(batches, sums):
        parts.append(part)
        progress("drift", len(parts), len(batches))
    drift, loss_base, loss, tokens = torch.cat(parts, 1)
    return TextSums(drift=drift, loss_base=loss_base, loss=loss, tokens=tokens)


def of_tokens(base: Tensor, edited: Tensor, wanted: Tensor) -> Tensor:
    """What is summed over tokens, of each.

    Args:
        base: Logits of the base model, (tokens, vocabulary), on any device.
        edited: Those of the edited model, on the device where this is computed, in float32.
        wanted: The next tokens, (tokens,).

    Returns:
        KL(base ‖ edited), cross-entropy of either, and 1; (4, tokens), float64, on the CPU.
    """
    log_p, log_q = (logits.to(edited.device).float().log_softmax(-1) for logits in (base, edited))
    wanted = wanted.to(edited.device)
    rows = [
        (log_p.exp() * (log_p - log_q)).sum(-1),
        nn.functional.nll_loss(log_p, wanted, reduction="none"),
        nn.functional.nll_loss(log_q, wanted, reduction="none"),
        torch.ones_like(wanted, dtype=torch.float32),
    ]
    return torch.stack(rows).cpu().double()


def measure_drift(
    base: Logits, edited: Logits, batches: Sequence[TokenBatch], *, progress: Progress = no_progress
) -> Drift:
    """Capability drift and both losses, means over tokens; see :func:`drift_of_texts`."""
    return drift_of_texts(base, edited, batches, progress=progress).means()


@dataclass(frozen=True, kw_only=True)
class TaskItems:
    """The items of one task: how often each was right, and how often it was asked (prose: at every next token).

    Of scores that are fractions, such as a share of probability, ``hits`` are too.
    """

    hits: Sequence[float]
    counts: Sequence[int]

    @property
    def score(self) -> float:
        """In percent."""
        return 100 * sum(self.hits) / sum(self.counts)


def bundled_tasks(
    model: Any, prompter: Prompter, *, count: int = abilities.PROBE_ITEMS, progress: Progress = no_progress
) -> dict[str, float]:
    """The five ability scores of the bundled world, in percent; see :func:`bundled_items`."""
    return {name: items.score for name, items in bundled_items(model, prompter, count=count, progress=progress).items()}


def bundled_items(
    model: Any, prompter: Prompter, *, count: int = abilities.PROBE_ITEMS, progress: Progress = no_progress
) -> dict[str, TaskItems]:
    """The five abilities of the bundled world, item by item.

    Four families are answered freely and must be exactly right; ``prose`` is top-1 next-token accuracy
    on held-out stories.

    Args:
        model: The bundled model or an edit of it.
        prompter: Builds prompts.
        count: Items per family.
        progress: Called after every batch.

    Returns:
        Items by family.
    """
    found = {}
    for family in abilities.PROMPTED:
        items = abilities.probes(family, count)
        given = answers(model, prompter, [prompt for prompt, _ in items], what=family, progress=progress)
        hits = [int(answer.text == right) for answer, (_, right) in zip(given, items, strict=True)]
        found[family] = TaskItems(hits=hits, counts=[1] * len(items))
    found["prose"] = _next_tokens_right(model, prompter.tokenizer, corpus.probe_prose(count))
    return found


@torch.no_grad()
def _next_tokens_right(model: Any, tokenizer: Any, texts: Sequence[str]) -> TaskItems:
    """Per text, how many next tokens are the model's first choice."""
    logits = logits_of(model)
    hits: list[int] = []
    counts: list[int] = []
    for batch in text_batches(model, tokenizer, texts):
        labels = next_tokens(batch)
        counted = labels != -100
        hidden = logits(batch).at(counted)
        first = torch.cat([hidden.logits(piece).argmax(-1).cpu() for piece in hidden.pieces()])
        right = torch.zeros_like(counted).masked_scatter(counted, first == labels[counted])
        hits += right.sum(1).tolist()
        counts += counted.sum(1).tolist()
    return TaskItems(hits=hits, counts=counts)
