"""Where an edit names its subject: the last token that holds some of it, in any context and any template."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..edits import Edit
from ..errors import EditsError
from ..models import context_length
from ..rows import EditRow, Prompter

STARTS = ("The", "Therefore", "Because", "I", "You")
LENGTH, CHOICES = 10, 5
"""A sampled context has so many tokens, the start of a text included, each among so many likeliest ones."""


@dataclass(frozen=True)
class SubjectRow:
    """A row of tokens and the index of its subject's last one."""

    row: EditRow
    subject: int

    @property
    def until_subject(self) -> tuple[int, ...]:
        """The tokens that the subject's last one depends on, itself included."""
        return self.row.ids[: self.subject + 1]


@dataclass(frozen=True)
class Asked:
    """An edit in all contexts, the empty one first, and the bare subject.

    Args:
        rows: One per context.
        essence: What the model says of the subject alone: its row predicts the token after the subject.
        number: Of the edit's row in its file, for messages.
    """

    rows: tuple[SubjectRow, ...]
    essence: SubjectRow
    number: int


def sampled_contexts(model: Any, prompter: Prompter, count: int, seed: int) -> tuple[str, ...]:
    """What prompts are put behind, so that what is found for a subject holds wherever it is named.

    Args:
        model: The causal LM, which says them itself.
        prompter: Has its tokenizer.
        count: How many, beside the empty one.
        seed: Of what is drawn.

    Returns:
        The empty context, then the sampled ones, each with a full stop. (MEMIT, arXiv 2210.07229, section 4.)
    """
    generator = torch.Generator().manual_seed(seed)
    device = model.get_input_embeddings().weight.device
    found = [""]
    with torch.no_grad():
        for number in range(count):
            ids = prompter.encode(STARTS[number % len(STARTS)], special=True)
            while len(ids) < LENGTH:
                logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
                values, choices = logits.float().cpu().topk(min(CHOICES, len(logits)))
                ids.append(int(choices[torch.multinomial(values.softmax(0), 1, generator=generator)]))
            text = str(prompter.tokenizer.decode(ids, skip_special_tokens=True))
            found.append(f"{' '.join(text.split())}. ")
    return tuple(found)


def asked(model: Any, prompter: Prompter, edits: Sequence[Edit], contexts: Sequence[str]) -> list[Asked]:
    """Edits as rows in contexts.

    Args:
        model: The causal LM, whose context rows must fit into.
        prompter: Builds the rows.
        edits: Each with a subject that its prompt holds once.
        contexts: The empty one first.

    Returns:
        One for every edit.

    Raises:
        EditsError: A row is too long, or its subject cannot be found in it.
    """
    longest = context_length(model)
    return [
        Asked(
            rows=tuple(subject_row(prompter, edit, context, longest) for context in contexts),
            essence=_essence(prompter, edit),
            number=edit.row,
        )
        for edit in edits
    ]


def subject_row(prompter: Prompter, edit: Edit, context: str = "", longest: int | None = None) -> SubjectRow:
    """The row of an edit in a context.

    Args:
        prompter: Builds the row.
        edit: With a subject that its prompt holds once.
        context: Put before the prompt (in a chat: before the user's last message).
        longest: The model's context in tokens, if it has one.

    Returns:
        The row.

    Raises:
        EditsError: The row is too long, or the subject cannot be found in it.
    """
    assert edit.subject is not None
    prompt = context + edit.prompt
    last = max((i for i, turn in enumerate(edit.turns) if turn[0] == "user"), default=0)
    turns = tuple((role, prompt if i == last else text) for i, (role, text) in enumerate(edit.turns))
    told = replace(edit, prompt=prompt, turns=turns)
    row = prompter.rows([told], longest)[0]
    text = prompter.text(turns or prompt)
    end = _end_of_subject(edit, text, prompt, len(context))
    last = last_token(prompter, text if prompter.chat else f"{text} {edit.target}", end)
    return SubjectRow(row, min(last, row.prompt_length - 1))  # the end of a subject may be one token with the target


def _essence(prompter: Prompter, edit: Edit) -> SubjectRow:
    """The row "SUBJECT is a", cut after the subject: what follows has no influence on what is read there."""
    assert edit.subject is not None
    prompt = f"{edit.subject} is a"
    text = prompter.text(prompt)
    last = last_token(prompter, text, _end_of_subject(replace(edit, prompt=prompt), text, prompt, 0))
    unread = 0  # in the place of the token that is predicted
    return SubjectRow(EditRow((*prompter.prompt(prompt)[: last + 1], unread), last + 1), last)


def _end_of_subject(edit: Edit, text: str, prompt: str, skipped: int) -> int:
    """Where the subject ends in a text that holds the prompt; templates may strip it."""
    assert edit.subject is not None
    stripped = prompt.strip()
    start = text.rfind(stripped)
    if start < 0:
        raise EditsError(
            f"row {edit.row}: the chat template changes the prompt, and its subject cannot be found; use --chat off"
        )
    within = skipped + edit.prompt.index(edit.subject) + len(edit.subject.rstrip())
    return start + within - (len(prompt) - len(prompt.lstrip()))


def last_token(prompter: Prompter, text: str, end: int) -> int:
    """The index of the last token that holds some of ``text[:end]``, though it may hold some of what follows too.

    Args:
        prompter: Has the tokenizer.
        text: A whole text.
        end: Where in it the subject ends.

    Returns:
        Of the tokens of the whole text: a token may merge the end of a subject with what follows it.
    """
    special = not prompter.chat
    if getattr(prompter.tokenizer, "is_fast", False):
        encoding = prompter.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        return max(i for i, (start, stop) in enumerate(encoding["offset_mapping"]) if start < min(end, stop))
    whole, head = (prompter.encode(part, special=special) for part in (text, text[:end]))
    length = len(_said(prompter, head))
    count = next((i for i, (a, b) in enumerate(zip(whole, head, strict=False)) if a != b), len(head))
    while count < len(whole) and len(_said(prompter, whole[:count])) < length:
        count += 1
    return count - 1


def _said(prompter: Prompter, ids: Sequence[int]) -> str:
    return str(prompter.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
