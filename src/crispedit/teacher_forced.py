"""Teacher-forced scores: what a model would say if everything before had already been said right.

Published evaluations feed the right answer to the model and compare it, token by token, with the model's first choices:
it counts even where the model would never have arrived at it by itself. Here such scores stand beside those of free
answers (:mod:`crispedit.wild`). Definitions are those of CrispEdit's table 3 (arXiv 2602.15823):

    token accuracy   1/n Σ_t [argmax p(· | x, y_<t) = y_t]       reliability, generalization, and locality, but for
    likelihood       [NLL(y_true | x) < NLL(y_new | x)]          the locality of CounterFact

with NLL(y | x) = −1/n Σ_t log p(y_t | x, y_<t). *Agreement* is what EasyEdit calls locality: the share of the answer's
tokens at which the first choices before and after the edit are the same, right or wrong. *Efficacy* and *paraphrase
efficacy* are MEMIT's (Meng et al. 2023): NLL(y_new | x) < NLL(y_true | x) for the edit's prompt and for its rephrases.

The tokens y are those that training has, a space between prompt and target included, without the end-of-sequence token.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .edits import Edit
from .generation import Ids
from .models import context_length
from .progress import Progress, no_progress
from .replay import row_logits
from .rows import Chat, EditRow, Prompter
from .wild import Items, Scores, as_edit, mean_scores, questions

Definition = Literal["token accuracy", "likelihood"]
BY_LIKELIHOOD = ("counterfact", "counterfact-rome")
"""Schemas of CounterFact. Its locality prompts (neighbours) are true of the old target, which the new one competes
with; the answers of other edit sets have nothing to do with the target."""
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Continuation:
    """A prompt with the answer that should follow it; ``rival`` is the prompt with the one that should not."""

    edit: int
    kind: str
    expected: EditRow
    rival: EditRow | None


@dataclass(frozen=True)
class Reading:
    """What a model makes of an answer: its first choice for every token, and the mean NLL of the tokens, in nats."""

    choices: Ids
    nll: float


@dataclass(frozen=True, kw_only=True)
class TeacherForced:
    """Teacher-forced scores of a model, edit by edit.

    Args:
        items: ``reliability``, ``generalization`` and ``locality``.
        beside: ``agreement``, ``efficacy`` and ``paraphrase_efficacy``; empty where they were not measured.
        locality: What locality is.
    """

    items: Items
    beside: Items
    locality: Definition

    def details(self) -> dict[str, Any]:
        """How locality is defined, and the scores that have other names, in percent."""
        scores: Scores = mean_scores(self.beside)
        return {"locality": self.locality, **scores}


def locality_of(edits: Sequence[Edit]) -> Definition:
    """What the locality of these edits is: by likelihood where their file was recognised as CounterFact."""
    return "likelihood" if getattr(edits, "schema", None) in BY_LIKELIHOOD else "token accuracy"


def continuations(prompter: Prompter, edits: Sequence[Edit], context: int | None = None) -> list[Continuation]:
    """Everything that is read: the prompts of the edits with their answers, those that have none left out.

    Args:
        prompter: Builds the rows; it should not end them (``eos=False``).
        edits: The edits.
        context: The model's context in tokens, if it has one.

    Returns:
        One for every question (:func:`crispedit.wild.questions`) with a known answer.
    """
    by_likelihood = locality_of(edits) == "likelihood"
    found = []
    for question in questions(edits):
        if question.expected is None:
            continue
        edit, rival = edits[question.edit], None
        if by_likelihood:
            rival = edit.target if question.kind == "locality" else _old_target(edit)
        answers = [question.expected] if rival is None else [question.expected, rival]
        rows = prompter.rows([as_edit(question.prompt, answer, edit.row) for answer in answers], context)
        found.append(Continuation(question.edit, question.kind, rows[0], rows[1] if rival is not None else None))
    return found


def _old_target(edit: Edit) -> str | None:
    """The old target of a CounterFact edit: the answer that all its neighbours share."""
    answers = {near.answer for near in edit.locality}
    return answers.pop() if len(answers) == 1 else None


def teacher_force(
    model: Any,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    base: Mapping[EditRow, Ids] | None = None,
    chat: Chat = "auto",
    progress: Progress = no_progress,
) -> TeacherForced:
    """Scores a model on edits with everything before a token given.

    Args:
        model: A causal LM, in evaluation mode.
        tokenizer: Its tokenizer.
        edits: The edits; as an :class:`crispedit.edits.EditSet`, their schema says what locality is.
        base: What the model before editing chooses (:func:`locality_choices`), for agreement.
        chat: Whether prompts go through the chat template.
        progress: Called after every batch.

    Returns:
        The scores, several prompts of a kind counting together as one.
    """
    asked = continuations(Prompter.of(model, tokenizer, chat=chat, eos=False), edits, context_length(model))
    rows = [row for one in asked for row in (one.expected, one.rival) if row is not None]
    read = read_rows(model, rows, progress)

    def of_kind(kind: str) -> list[Continuation]:
        return [one for one in asked if one.kind == kind]

    def accuracy(kind: str) -> dict[int, float]:
        return _by_edit((one.edit, _equal(read[one.expected].choices, one.expected.targets)) for one in of_kind(kind))

    def likelier(kind: str) -> dict[int, float]:
        pairs = [(one.edit, one.expected, one.rival) for one in of_kind(kind) if one.rival is not None]
        return _by_edit((edit, read[expected].nll < read[rival].nll) for edit, expected, rival in pairs)

    def agreement(before: Mapping[EditRow, Ids]) -> dict[int, float]:
        chosen = [(one.edit, one.expected) for one in of_kind("locality")]
        return _by_edit((edit, _equal(read[row].choices, before[row])) for edit, row in chosen)

    definition = locality_of(edits)
    return TeacherForced(
        items={
            "reliability": accuracy("reliability"),
            "generalization": accuracy("generalization"),
            "locality": (likelier if definition == "likelihood" else accuracy)("locality"),
        },
        beside={
            "agreement": agreement(base) if base is not None else {},
            "efficacy": likelier("reliability"),
            "paraphrase_efficacy": likelier("generalization"),
        },
        locality=definition,
    )


def locality_choices(
    model: Any, tokenizer: Any, edits: Sequence[Edit], *, chat: Chat = "auto", progress: Progress = no_progress
) -> dict[EditRow, Ids]:
    """What a model chooses at the tokens of the locality answers: what agreement compares with.

    Args:
        model: A causal LM, in evaluation mode.
        tokenizer: Its tokenizer.
        edits: The edits.
        chat: Whether prompts go through the chat template.
        progress: Called after every batch.

    Returns:
        First choices by row.
    """
    asked = continuations(Prompter.of(model, tokenizer, chat=chat, eos=False), edits, context_length(model))
    read = read_rows(model, [one.expected for one in asked if one.kind == "locality"], progress)
    return {row: reading.choices for row, reading in read.items()}


@torch.no_grad()
def read_rows(model: Any, rows: Iterable[EditRow], progress: Progress = no_progress) -> dict[EditRow, Reading]:
    """What a model makes of the targets of rows, each different row read once.

    Args:
        model: A causal LM, in evaluation mode.
        rows: The rows.
        progress: Called with rows read.

    Returns:
        A reading per different row.
    """
    different = list(dict.fromkeys(rows))
    found: dict[EditRow, Reading] = {}
    if not different:
        return found
    logits = row_logits(model, (), different, start="targets")
    for row, values in logits.by_row(range(len(different)), BATCH_TOKENS, _choices_and_nll):
        choices, nll = values.unbind(1)
        found[row] = Reading(tuple(choices.long().tolist()), float(nll.double().mean()))
        progress("teacher forcing", len(found), len(different))
    return found


def _choices_and_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """(targets, 2) in float32, which holds token ids exactly (up to 2²⁴)."""
    logits = logits.float()
    nll = logits.logsumexp(-1) - logits.gather(-1, labels[:, None])[:, 0]
    return torch.stack([logits.argmax(-1).float(), nll], 1)


def _equal(one: Ids, other: Ids) -> float:
    """The share of places with the same token."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def _by_edit(scores: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Means of an edit's prompts."""
    found: dict[int, list[float]] = {}
    for edit, score in scores:
        found.setdefault(edit, []).append(score)
    return {edit: sum(values) / len(values) for edit, values in found.items()}
