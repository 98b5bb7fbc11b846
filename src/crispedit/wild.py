"""Edit evaluation as in the wild: free greedy answers, with and without a question-answering context.

Reliability is the share of edit prompts answered with the target, generalization that of their
rephrases, locality the share of unrelated prompts still answered as the edit set says (or, where it
says nothing, as the base model did). Percentages. (WILD, Yang et al. 2025; CrispEdit, appendix E.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .bundled.world import QA_CONTEXT
from .edits import Edit
from .errors import EditsError
from .generation import Answer, Ids, answers
from .judge import Judge, exact
from .progress import Progress, no_progress
from .rows import Prompter

CONTEXTS = ("no_context", "qa_context")

Scores = dict[str, float | None]


@dataclass(frozen=True)
class Question:
    """One prompt of an edit, what it asks after, and the answer that would be right (``None``: the base model's)."""

    edit: int
    kind: str
    prompt: str | tuple[tuple[str, str], ...]
    expected: str | None


def questions(edits: Sequence[Edit]) -> list[Question]:
    """Every evaluation prompt of the edits: reliability, generalization and locality."""
    found: list[Question] = []
    for number, edit in enumerate(edits):
        found.append(Question(number, "reliability", edit.turns or edit.prompt, edit.target))
        found += [Question(number, "generalization", text, edit.target) for text in edit.rephrases]
        found += [Question(number, "locality", near.prompt, near.answer) for near in edit.locality]
    return found


def in_context(prompt: str | tuple[tuple[str, str], ...], context: str) -> str | tuple[tuple[str, str], ...]:
    """A prompt as the context puts it; in a conversation, its last turn."""
    if context == "no_context":
        return prompt
    if isinstance(prompt, str):
        return QA_CONTEXT.format(q=prompt)
    role, content = prompt[-1]
    return (*prompt[:-1], (role, QA_CONTEXT.format(q=content)))


def expected_drafts(prompter: Prompter, asked: Sequence[Question], context: str) -> list[list[Ids]]:
    """For every question the answer that would be right, if one is known, as the model would be taught it.

    Args:
        prompter: Builds prompts.
        asked: The questions.
        context: The context they are asked in.

    Returns:
        Drafts for :func:`crispedit.generation.answers`, one or none per question.
    """
    return [_drafts(prompter, in_context(question.prompt, context), question.expected) for question in asked]


def _drafts(prompter: Prompter, prompt: str | tuple[tuple[str, str], ...], answer: str | None) -> list[Ids]:
    if answer is None:
        return []
    turns = () if isinstance(prompt, str) else prompt
    text = prompt if isinstance(prompt, str) else prompt[-1][1]
    try:
        row = prompter.row(Edit(prompt=text, target=answer, turns=turns))
    except EditsError:  # an answer without a token of its own
        return []
    # where the answer merges with the end of the prompt, it is no continuation of the prompt's tokens
    return [row.ids[row.prompt_length :]] if row.ids[: row.prompt_length] == prompter.prompt(prompt) else []


def ask(
    model: Any,
    prompter: Prompter,
    asked: Sequence[Question],
    context: str,
    *,
    drafts: Sequence[Sequence[Ids]] = (),
    stop_at_period: bool = False,
    progress: Progress = no_progress,
) -> list[Answer]:
    """The model's answers to questions in one context; for ``drafts`` see :func:`crispedit.generation.answers`."""
    return answers(
        model,
        prompter,
        [in_context(question.prompt, context) for question in asked],
        drafts=drafts,
        stop_at_period=stop_at_period,
        what=f"asking, {context}",
        progress=progress,
    )


Items = dict[str, dict[int, float]]
"""By kind, the score of every edit that was asked about it, 0 to 1: its prompts of a kind count together as one."""


Verdict = bool | None
"""Whether an answer is right; ``None`` where nothing is known to be right."""


def judge_answers(
    asked: Sequence[Question],
    given: Sequence[str],
    judge: Judge = exact,
    base: Sequence[str] | None = None,
) -> list[Verdict]:
    """Whether each answer is right.

    Args:
        asked: The questions.
        given: The model's answers.
        judge: Says whether an answer is right.
        base: The base model's answers, for questions without an expected one.

    Returns:
        One verdict per question.
    """
    found: list[Verdict] = []
    for index, (question, answer) in enumerate(zip(asked, given, strict=True)):
        right = question.expected if question.expected is not None else base[index] if base is not None else None
        text = question.prompt if isinstance(question.prompt, str) else question.prompt[-1][1]
        found.append(None if right is None else judge(text, right, answer))
    return found


def verdict_items(asked: Sequence[Question], verdicts: Sequence[Verdict]) -> Items:
    """Scores of verdicts, edit by edit; edits of which no answer of a kind has a verdict are missing there."""
    hits: dict[str, dict[int, list[bool]]] = {"reliability": {}, "generalization": {}, "locality": {}}
    for question, verdict in zip(asked, verdicts, strict=True):
        if verdict is not None:
            hits[question.kind].setdefault(question.edit, []).append(verdict)
    return {kind: {edit: sum(h) / len(h) for edit, h in of_kind.items()} for kind, of_kind in hits.items()}


def score_items(
    asked: Sequence[Question],
    given: Sequence[str],
    judge: Judge = exact,
    base: Sequence[str] | None = None,
) -> Items:
    """Scores of answers, edit by edit; see :func:`judge_answers`."""
    return verdict_items(asked, judge_answers(asked, given, judge, base))


def mean_scores(items: Items) -> Scores:
    """Means over edits in percent; ``None`` where there is no edit."""
    return {kind: 100 * sum(of_kind.values()) / len(of_kind) if of_kind else None for kind, of_kind in items.items()}


def score(
    asked: Sequence[Question],
    given: Sequence[str],
    judge: Judge = exact,
    base: Sequence[str] | None = None,
) -> Scores:
    """Scores of answers in percent: means over edits of :func:`score_items`."""
    return mean_scores(score_items(asked, given, judge, base))


def answer_edits(
    model: Any,
    prompter: Prompter,
    edits: Sequence[Edit],
    *,
    judge: Judge = exact,
    base: dict[str, list[str]] | None = None,
    stop_at_period: bool = False,
    progress: Progress = no_progress,
) -> tuple[dict[str, list[str]], dict[str, list[Verdict]]]:
    """Asks everything about the edits in both contexts.

    Args:
        model: A causal LM, in evaluation mode.
        prompter: Builds prompts.
        edits: What to ask about.
        judge: Says whether an answer is right.
        base: The base model's answers by context, for locality prompts without an answer.
        stop_at_period: See :func:`crispedit.generation.answers`.
        progress: Called after every batch.

    Returns:
        By context, the answers (a base for a later call) and whether they are right.
    """
    asked = questions(edits)
    given, verdicts = {}, {}
    for context in CONTEXTS:
        drafts = expected_drafts(prompter, asked, context)
        found = ask(model, prompter, asked, context, drafts=drafts, stop_at_period=stop_at_period, progress=progress)
        given[context] = [answer.text for answer in found]
        verdicts[context] = judge_answers(asked, given[context], judge, base[context] if base else None)
    return given, verdicts
