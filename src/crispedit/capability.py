"""What an edit must leave as it was: capability drift, capability loss, and the bundled model's tasks.

Capability drift is the mean over capability tokens of KL(base ‖ edited), in nats per token: for softmax
cross-entropy exactly the Bregman divergence that CrispEdit constrains (arXiv 2602.15823, definition 1),
and independent of the labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .bundled import abilities, corpus
from .generation import answers
from .progress import Progress, no_progress
from .rows import Prompter
from .texts import TokenBatch, next_tokens, text_batches

Logits = Callable[[TokenBatch], Tensor]
"""From a batch to logits, (rows, length, vocabulary)."""


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

    def logits(batch: TokenBatch) -> Tensor:
        batch = batch.to(model.get_input_embeddings().weight.device)
        result: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        return result

    return logits


@torch.inference_mode()
def measure_drift(
    base: Logits, edited: Logits, batches: Sequence[TokenBatch], *, progress: Progress = no_progress
) -> Drift:
    """Capability drift and both losses over token batches, summed in float64.

    Args:
        base: Logits of the base model.
        edited: Logits of the edited model, over the same vocabulary.
        batches: Right-padded token rows.
        progress: Called after every batch.

    Returns:
        The means.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    tokens = 0
    for number, batch in enumerate(batches):
        labels = next_tokens(batch)
        counted = labels != -100
        log_p = base(batch).cpu()[counted].float().log_softmax(-1)
        log_q = edited(batch).cpu()[counted].float().log_softmax(-1)
        wanted = labels[counted]
        totals[0] += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum()
        totals[1] += nn.functional.nll_loss(log_p, wanted, reduction="sum").double()
        totals[2] += nn.functional.nll_loss(log_q, wanted, reduction="sum").double()
        tokens += len(wanted)
        progress("drift", number + 1, len(batches))
    drift, loss_base, loss = (totals / tokens).tolist()
    return Drift(drift=max(0.0, drift), loss_base=loss_base, loss=loss)


def bundled_tasks(
    model: Any, prompter: Prompter, *, count: int = abilities.PROBE_ITEMS, progress: Progress = no_progress
) -> dict[str, float]:
    """The five ability scores of the bundled world, in percent.

    Four families are answered freely and must be exactly right; ``prose`` is top-1 next-token accuracy
    on held-out stories.

    Args:
        model: The bundled model or an edit of it.
        prompter: Builds prompts.
        count: Items per family.
        progress: Called after every batch.

    Returns:
        Scores by family.
    """
    scores = {}
    for family in abilities.PROMPTED:
        items = abilities.probes(family, count)
        given = answers(model, prompter, [prompt for prompt, _ in items], what=family, progress=progress)
        scores[family] = (
            100 * sum(answer.text == right for answer, (_, right) in zip(given, items, strict=True)) / len(items)
        )
    scores["prose"] = _next_token_accuracy(model, prompter.tokenizer, corpus.probe_prose(count))
    return scores


@torch.inference_mode()
def _next_token_accuracy(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Percentage of next tokens that are the model's first choice."""
    logits, hits, total = logits_of(model), 0, 0
    for batch in text_batches(model, tokenizer, texts):
        labels = next_tokens(batch)
        counted = labels != -100
        hits += int((logits(batch).argmax(-1).cpu()[counted] == labels[counted]).sum())
        total += int(counted.sum())
    return 100 * hits / total
