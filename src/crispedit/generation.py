"""Greedy answers from a model: batched, left-padded, stopped at the end of sequence or of the line."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .curvature import Progress, no_progress
from .rows import Prompter
from .texts import padding_id

MAX_NEW_TOKENS = 40
"""The paper's limit on an answer (appendix E)."""


class _LineEnd(StoppingCriteria):
    """Stops a row at the first token with a line break after one with something else."""

    def __init__(self, tokenizer: Any, prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length
        self.kinds: dict[int, tuple[bool, bool]] = {}
        self.begun: list[bool] = []

    def _kind(self, token: int) -> tuple[bool, bool]:
        """Whether a token has visible text, and whether a line break follows it or anything before."""
        if token not in self.kinds:
            text = self.tokenizer.decode([token])
            self.kinds[token] = bool(text.strip()), "\n" in text
        return self.kinds[token]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.begun = self.begun or [False] * len(input_ids)
        done = []
        for row, token in enumerate(input_ids[:, -1].tolist()):
            visible, line_end = self._kind(token)
            self.begun[row] = self.begun[row] or visible
            done.append(line_end and self.begun[row] and not self._break_leads(token))
        return torch.tensor(done, device=input_ids.device)

    def _break_leads(self, token: int) -> bool:
        """A token such as "\\nThe" breaks the line before its own text."""
        visible, _ = self._kind(token)
        return visible and self.tokenizer.decode([token]).lstrip(" ").startswith("\n")


@torch.inference_mode()
def answers(
    model: Any,
    prompter: Prompter,
    prompts: Sequence[str | Sequence[tuple[str, str]]],
    *,
    batch_tokens: int = 4096,
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
        max_new_tokens: Longest answer.
        stop_at_period: Also cut at the first ``.``, as the published evaluation does (it cuts "St. Louis").
        what: Named in the progress.
        progress: Called after every batch with prompts answered.

    Returns:
        One stripped answer per prompt, in the prompts' order.
    """
    tokenizer, padding = prompter.tokenizer, padding_id(prompter.tokenizer)
    encoded = [prompter.prompt(prompt) for prompt in prompts]
    unique = sorted(set(encoded), key=lambda ids: (len(ids), ids))
    device = model.get_input_embeddings().weight.device
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=padding,
        eos_token_id=list(prompter.end_tokens) or None,
        bos_token_id=tokenizer.bos_token_id,
    )
    found: dict[tuple[int, ...], str] = {}
    for group in _groups(unique, batch_tokens):
        width = len(group[-1])
        ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in group], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in group], device=device)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([_LineEnd(tokenizer, width)]),
        )
        for row, new in zip(group, out[:, width:].tolist(), strict=True):
            found[row] = _clean(tokenizer, new, prompter.end_tokens, stop_at_period)
        progress(what, len(found), len(unique))
    return [found[ids] for ids in encoded]


def _groups(rows: Sequence[tuple[int, ...]], batch_tokens: int) -> list[list[tuple[int, ...]]]:
    """Rows sorted by length, in batches of at most ``batch_tokens`` tokens with their padding."""
    groups: list[list[tuple[int, ...]]] = [[]]
    for row in rows:
        if groups[-1] and len(row) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups if rows else []


def _clean(tokenizer: Any, ids: list[int], end_tokens: Sequence[int], stop_at_period: bool) -> str:
    """New tokens as an answer: up to the first end token, then the first line with anything on it."""
    end = next((i for i, token in enumerate(ids) if token in end_tokens), len(ids))
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=True)).lstrip().split("\n")[0]
    return (text.split(".")[0] if stop_at_period else text).strip()
