"""Greedy answers from a model: batched, left-padded, stopped at the end of sequence or of the line.

An answer ends at an end token of the model, at the first line break that follows something, or at the limit; what is
judged is its first line. The published evaluation (WILD, Yang et al. 2025; CrispEdit, arXiv 2602.15823) stops at the
first token with a period or a line break in it, and takes one of each, in this order, off the end of the text. Its
tokens are the first ones of our answer, so that nothing is generated anew for it (``stop_at_period``); the text is the
same but for blanks around it, and special tokens, which it keeps and ours does not.

Greedy decoding leaves nothing to chance, so a guessed answer, a draft, is decided in one forward pass: where every
token of it is the model's first choice after those before it, it is the answer; where not, what came before and the
model's own choice are how the answer begins, and only the rest is generated. (Leviathan et al. 2023, arXiv 2211.17192,
with a draft that is known.) In float32 answers are the same with and without drafts, and in any batch, but where
two tokens tie to within rounding; in lower precision such near-ties are common enough to be met, as between any two
batchings.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from . import distributed, ranks
from .errors import EditsError
from .forward import contiguous_head
from .models import CACHE, context_length
from .progress import Progress, no_progress
from .replay import RowLogits, row_logits
from .rows import EditRow, Prompter
from .texts import PADDING, token_groups

MAX_NEW_TOKENS = 40
"""The paper's limit on an answer (appendix E)."""
BATCH_TOKENS = 4096
"""Most prompt tokens that are answered together."""
STAY = 0.75
"""Once no more than this share of a batch goes on, the rows that have ended leave it."""
TRIED = 64
"""Drafts of so many prompts are tried before those of the others."""
DRAFT_TOKENS = 1024
"""Tokens of a batch of prompts with their drafts."""
FEW = 32
"""Fewer drafts are run through the whole model: to find out what can be left out would cost more than it saves."""
WORTH = 1 / 2
"""If fewer of the tried prompts than this are decided by their drafts, no other draft is tried: trying costs half of
generating where answers have three tokens, and less where they are longer (benchmarks/evaluation.py)."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """An answer as text, stripped and cut at its first line break, and the tokens that were generated for it."""

    text: str
    ids: Ids


def cut(text: str, stop_at_period: bool) -> str:
    """What counts of an answer of which only the text is known, stripped.

    Args:
        text: The answer.
        stop_at_period: Whether it is cut before its first period or line break; else it is its first line with
            anything on it.

    Returns:
        A part of it.
    """
    return (re.split(r"[.\n]", text)[0] if stop_at_period else text.lstrip().split("\n")[0]).strip()


@dataclass
class _Row:
    """A prompt and what is known of its answer: ``begun`` once anything but blanks was said."""

    prompt: Ids
    limit: int
    new: list[int] = field(default_factory=list)
    begun: bool = False
    ended: bool = False

    @property
    def ids(self) -> Ids:
        """The prompt and what is known of the answer."""
        return (*self.prompt, *self.new)

    @property
    def left(self) -> int:
        """How many tokens may be added."""
        return self.limit - len(self.new)


class _Reader:
    """Adds tokens to rows until one ends: at an end token, a line break that does not lead, or the limit."""

    def __init__(self, prompter: Prompter) -> None:
        self.prompter = prompter
        self.texts: dict[int, str] = {}

    def _text(self, token: int) -> str:
        if token not in self.texts:
            self.texts[token] = str(self.prompter.tokenizer.decode([token], skip_special_tokens=True))
        return self.texts[token]

    def add(self, row: _Row, tokens: Iterable[int]) -> None:
        """Adds tokens up to the one that ends the row."""
        for token in tokens:
            if row.ended:
                return
            text = self._text(token) if row.begun else self._text(token).lstrip()
            row.begun = row.begun or bool(text)
            row.new.append(token)
            row.ended = token in self.prompter.end_tokens or "\n" in text or row.left <= 0

    def answer(self, row: _Row, stop_at_period: bool) -> Answer:
        """What a row that ended says: up to the end token, the first line with anything on it."""
        ids = row.new[:-1] if row.new and row.new[-1] in self.prompter.end_tokens else row.new
        text = str(self.prompter.tokenizer.decode(ids, skip_special_tokens=True))
        return Answer(self._published(ids) if stop_at_period else cut(text, False), tuple(row.new))

    def _published(self, ids: Sequence[int]) -> str:
        """What the published rule leaves: up to the token with the first period or line break, less one of each."""
        ends = (count for count, token in enumerate(ids, 1) if not {".", "\n"}.isdisjoint(self._text(token)))
        text = str(self.prompter.tokenizer.decode(ids[: next(ends, len(ids))], skip_special_tokens=True))
        return text.removesuffix(".").removesuffix("\n").strip()


class _Stop(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Stops rows that end, and all of them once few enough go on."""

    def __init__(self, reader: _Reader, rows: Sequence[_Row]) -> None:
        self.reader, self.rows = reader, [replace(row, new=list(row.new)) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            self.reader.add(row, [token])
        ended = torch.tensor([row.ended for row in self.rows], device=input_ids.device)
        return ended | (ended.sum() >= (1 - STAY) * len(ended))


@contextmanager
def _defaults(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Within, ``settings`` are also the model's own, whose repetition penalty, say, would fill what they leave open."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def answers(
    model: Any,
    prompter: Prompter,
    prompts: Sequence[str | Sequence[tuple[str, str]]],
    *,
    drafts: Sequence[Sequence[Sequence[int]]] = (),
    batch_tokens: int = BATCH_TOKENS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop_at_period: bool = False,
    what: str = "answers",
    progress: Progress = no_progress,
) -> list[Answer]:
    """Free greedy answers with natural stop, cut at their first line break.

    Args:
        model: A causal LM, in evaluation mode.
        prompter: Builds the prompts' tokens.
        prompts: Texts, or conversations as (role, content) turns.
        drafts: For every prompt any number of guesses at its answer as token ids, such as ``Answer.ids`` of another
            time; right ones save time, and wrong ones change nothing but that.
        batch_tokens: Most prompt tokens of a batch.
        max_new_tokens: Longest answer; an answer also ends where the model's context does.
        stop_at_period: Give the text that the published stop rule leaves: "St" of "St. Louis", and nothing where a
            line break leads. ``Answer.ids`` are those of the whole answer.
        what: Named in the progress.
        progress: Called after every batch with prompts answered.

    Returns:
        One answer per prompt, in the prompts' order.

    Raises:
        EditsError: A prompt fills the model's context.
    """
    encoded = [prompter.prompt(prompt) for prompt in prompts]
    unique = sorted(set(encoded), key=lambda ids: (len(ids), ids))
    context = context_length(model)
    if unique and context is not None and len(unique[-1]) >= context:
        raise EditsError(f"a prompt has {len(unique[-1])} tokens; the model's context is {context}: shorten it")
    reader = _Reader(prompter)
    rows = {
        ids: _Row(ids, max_new_tokens if context is None else min(max_new_tokens, context - len(ids))) for ids in unique
    }
    guesses: dict[Ids, set[Ids]] = {}
    for ids, some in zip(encoded, drafts, strict=bool(drafts)):
        guesses.setdefault(ids, set()).update(tuple(draft) for draft in some if draft)
    _take_drafts(model, reader, rows, {ids: some for ids, some in guesses.items() if ids and some})

    going = sorted((row for row in rows.values() if not row.ended), key=lambda row: len(row.ids))
    done = len(rows) - len(going)
    if done:
        progress(what, done, len(rows))
    groups = token_groups([row.ids for row in going], batch_tokens)
    left = iter(going)
    batches = [list(itertools.islice(left, len(group))) for group in groups]
    for batch in distributed.share(batches):
        _generate(model, reader, batch)
        done += len(batch)
        progress(what, done, len(rows))
    _take_from_others(reader, batches)
    found = {ids: reader.answer(row, stop_at_period) for ids, row in rows.items()}
    return [found[ids] for ids in encoded]


def _take_drafts(model: Any, reader: _Reader, rows: dict[Ids, _Row], guesses: Mapping[Ids, set[Ids]]) -> None:
    """Adds to rows, by prompt, as much of their answers as a draft shows."""
    if not guesses:
        return
    prompts = list(guesses)
    drafted = [
        EditRow((*ids, *draft[: rows[ids].limit]), len(ids)) for ids in prompts for draft in sorted(guesses[ids])
    ]
    few = len(drafted) < FEW
    logits = (
        RowLogits(model=model, rows=drafted, start="whole") if few else row_logits(model, (), drafted, start="targets")
    )
    step = -(-len(prompts) // TRIED)
    for part in (prompts[::step], [ids for number, ids in enumerate(prompts) if number % step]):
        asked = set(part)
        chosen = [index for index, row in enumerate(drafted) if row.ids[: row.prompt_length] in asked]
        for row, choices in _first_choices(logits, chosen):
            ids = row.ids[: row.prompt_length]
            right = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(choices, row.ids[len(ids) :], strict=True))
            shown = _Row(ids, rows[ids].limit)
            reader.add(shown, choices[: len(list(right)) + 1])
            rows[ids] = max(rows[ids], shown, key=lambda one: len(one.new))
        if sum(rows[ids].ended for ids in part) < WORTH * len(part):
            return


def _take_from_others(reader: _Reader, batches: Sequence[Sequence[_Row]]) -> None:
    """Adds to the rows of batches that other processes have answered what these have found."""
    if ranks.size() == 1:
        return
    for owner, of_owner in enumerate(
        distributed.gather([[row.new for row in batch] for batch in distributed.share(batches)])
    ):
        for batch, answered in zip(batches[owner :: ranks.size()], of_owner, strict=True):
            for row, new in zip(batch, answered, strict=True):
                reader.add(row, new[len(row.new) :])


def _first_choices(logits: RowLogits, chosen: Sequence[int]) -> Iterator[tuple[EditRow, list[int]]]:
    """Rows and the model's first choice for every token of their drafts."""
    for row, choices in logits.by_row(chosen, DRAFT_TOKENS, lambda logits, _: logits.argmax(-1)):
        yield row, choices.tolist()


def _generate(model: Any, reader: _Reader, rows: Sequence[_Row]) -> None:
    """Goes on with rows that have not ended, in one batch, until all have; those that have leave it."""
    device = model.get_input_embeddings().weight.device
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[PADDING] * (width - len(row.ids)) + list(row.ids) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows], device=device)
    settings = GenerationConfig(
        do_sample=False,
        pad_token_id=PADDING,
        eos_token_id=list(reader.prompter.end_tokens) or None,
        bos_token_id=reader.prompter.tokenizer.bos_token_id,
        return_dict_in_generate=True,
    )
    cache = None
    while rows:
        settings.max_new_tokens = max(row.left for row in rows)
        with _defaults(model, settings), contiguous_head(model):
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([_Stop(reader, rows)]),
                **{CACHE: cache},
            )
        for row, new in zip(rows, out.sequences[:, ids.shape[1] :].tolist(), strict=True):
            reader.add(row, new)
        going = torch.tensor(
            [number for number, row in enumerate(rows) if not row.ended], dtype=torch.long, device=device
        )
        rows = [row for row in rows if not row.ended]
        mask = nn.functional.pad(mask, (0, out.sequences.shape[1] - ids.shape[1]), value=1)[going]
        ids, cache = out.sequences[going], getattr(out, CACHE)
        if cache is not None and cache.get_seq_length() == ids.shape[1] - 1:
            cache.reorder_cache(going)
        else:  # it does not count tokens, as a recurrent state does not
            cache = None
