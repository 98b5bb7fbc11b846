"""Greedy answers from a model: batched, left-padded, stopped at the end of sequence or of the line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .errors import EditsError
from .models import context_length
from .progress import Progress, no_progress
from .rows import Prompter
from .texts import PADDING, token_groups

MAX_NEW_TOKENS = 40
"""The paper's limit on an answer (appendix E)."""
BATCH_TOKENS = 4096
"""Most prompt tokens that are answered together."""


class _LineEnd(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Stops a row at the first token with a line break that does not lead the answer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.texts: dict[int, str] = {}
        self.begun: list[bool] = []

    def _text(self, token: int) -> str:
        if token not in self.texts:
            self.texts[token] = str(self.tokenizer.decode([token], skip_special_tokens=True))
        return self.texts[token]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.begun = self.begun or [False] * len(input_ids)
        done = []
        for row, token in enumerate(input_ids[:, -1].tolist()):
            text = self._text(token) if self.begun[row] else self._text(token).lstrip()
            self.begun[row] = self.begun[row] or bool(text)
            done.append("\n" in text)
        return torch.tensor(done, device=input_ids.device)


@contextmanager
def _defaults(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Within, ``settings`` are also the model's own, whose repetition penalty, say, would fill what they leave open."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


@torch.inference_mode()
def answers(
    model: Any,
    prompter: Prompter,
    prompts: Sequence[str | Sequence[tuple[str, str]]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop_at_period: bool = False,
    what: str = "answers",
    progress: Progress = no_progress,
) -> list[str]:
    """Free greedy answers with natural stop, cut at their first line break.

    Args:
        model: A causal LM, in evaluation mode.
        prompter: Builds the prompts' tokens.
        prompts: Texts, or conversations as (role, content) turns.
        batch_tokens: Most prompt tokens of a batch.
        max_new_tokens: Longest answer; an answer also ends where the model's context does.
        stop_at_period: Also cut at the first ``.``, as the published evaluation does (it cuts "St. Louis").
        what: Named in the progress.
        progress: Called after every batch with prompts answered.

    Returns:
        One stripped answer per prompt, in the prompts' order.

    Raises:
        EditsError: A prompt fills the model's context.
    """
    tokenizer = prompter.tokenizer
    encoded = [prompter.prompt(prompt) for prompt in prompts]
    unique = sorted(set(encoded), key=lambda ids: (len(ids), ids))
    context = context_length(model)
    if unique and context is not None and len(unique[-1]) >= context:
        raise EditsError(f"a prompt has {len(unique[-1])} tokens; the model's context is {context}: shorten it")
    device = model.get_input_embeddings().weight.device
    settings = GenerationConfig(
        do_sample=False,
        pad_token_id=PADDING,
        eos_token_id=list(prompter.end_tokens) or None,
        bos_token_id=tokenizer.bos_token_id,
    )
    found: dict[tuple[int, ...], str] = {}
    for group in token_groups(unique, batch_tokens):
        width = len(group[-1])
        settings.max_new_tokens = min(max_new_tokens, context - width) if context is not None else max_new_tokens
        ids = torch.tensor([[PADDING] * (width - len(row)) + list(row) for row in group], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in group], device=device)
        with _defaults(model, settings):
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([_LineEnd(tokenizer)]),
            )
        for row, new in zip(group, out[:, width:].tolist(), strict=True):
            found[row] = _clean(tokenizer, new, prompter.end_tokens, stop_at_period)
        progress(what, len(found), len(unique))
    return [found[ids] for ids in encoded]


def _clean(tokenizer: Any, ids: list[int], end_tokens: Sequence[int], stop_at_period: bool) -> str:
    """New tokens as an answer: up to the first end token, then the first line with anything on it."""
    end = next((i for i, token in enumerate(ids) if token in end_tokens), len(ids))
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=True)).lstrip().split("\n")[0]
    return (text.split(".")[0] if stop_at_period else text).strip()
