"""Edit evaluation as in the wild: free greedy answers, with and without a question-answering context.

Reliability is the share of edit prompts answered with the target, generalization that of their
rephrases, locality the share of unrelated prompts still answered as the edit set says (or, where it
says nothing, as the base model did). Percentages. (WILD, Yang et al. 2025; CrispEdit, appendix E.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import distributed
from .bundled.world import QA_CONTEXT
from .edits import Edit
from .errors import EditsError
from .generation import Answer, Ids, answers
from .judge import Case, Judge, Judged, Verdict, exact
from .progress import Progress, no_progress
from .rows import Prompter

CONTEXTS = ("no_context", "qa_context")

Scores = dict[str, float | None]
Prompt = str | tuple[tuple[str, str], ...]
"""Text, or a conversation as (role, content) turns."""


@dataclass(frozen=True)
class Question:
    """One prompt of an edit, what it asks after, and the answer that would be right (``None``: the base model's)."""

    edit: int
    kind: str
    prompt: Prompt
    expected: str | None


def questions(edits: Sequence[Edit]) -> list[Question]:
    """Every evaluation prompt of the edits: reliability, generalization and locality."""
    found: list[Question] = []
    for number, edit in enumerate(edits):
        found.append(Question(number, "reliability", edit.turns or edit.prompt, edit.target))
        found += [Question(number, "generalization", text, edit.target) for text in edit.rephrases]
        found += [Question(number, "locality", near.prompt, near.answer) for near in edit.locality]
    return found


def in_context(prompt: Prompt, context: str) -> Prompt:
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


def _drafts(prompter: Prompter, prompt: Prompt, answer: str | None) -> list[Ids]:
    if answer is None:
        return []
    try:
        row = prompter.row(as_edit(prompt, answer))
    except EditsError:  # an answer without a token of its own
        return []
    # where the answer merges with the end of the prompt, it is no continuation of the prompt's tokens
    return [row.targets] if row.ids[: row.prompt_length] == prompter.prompt(prompt) else []


def as_edit(prompt: Prompt, answer: str, row: int = 0) -> Edit:
    """The edit that would teach a model to answer a prompt so: its row is the prompt and the answer as tokens."""
    if isinstance(prompt, str):
        return Edit(prompt=prompt, target=answer, row=row)
    return Edit(prompt=prompt[-1][1], target=answer, turns=prompt, row=row)


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


def cases(asked: Sequence[Question], given: Sequence[str], base: Sequence[str] | None = None) -> list[Case | None]:
    """What a judge is shown of answers.

    Args:
        asked: The questions.
        given: The model's answers.
        base: The base model's answers, for questions without an expected one.

    Returns:
        A case per question, or ``None`` where nothing is known to be right.
    """
    found: list[Case | None] = []
    for index, (question, answer) in enumerate(zip(asked, given, strict=True)):
        right = question.expected if question.expected is not None else base[index] if base is not None else None
        text = question.prompt if isinstance(question.prompt, str) else question.prompt[-1][1]
        found.append(Case(text, right, answer) if right is not None else None)
    return found


def items_of(asked: Sequence[Question], verdicts: Sequence[Verdict]) -> Items:
    """Scores edit by edit, from what a judge said of the answer to each question.

    Args:
        asked: The questions.
        verdicts: One each; ``None`` is not counted.

    Returns:
        ``reliability``, ``generalization`` and ``locality``; edits without a verdict are missing.
    """
    hits: dict[str, dict[int, list[bool]]] = {"reliability": {}, "generalization": {}, "locality": {}}
    for question, verdict in zip(asked, verdicts, strict=True):
        if verdict is not None:
            hits[question.kind].setdefault(question.edit, []).append(verdict)
    return {kind: {edit: sum(h) / len(h) for edit, h in of_kind.items()} for kind, of_kind in hits.items()}


def judge_answers(
    asked: Sequence[Question],
    given: Mapping[str, Sequence[str]],
    judge: Judge = exact,
    base: Mapping[str, Sequence[str]] | None = None,
    *,
    progress: Progress = no_progress,
) -> tuple[dict[str, list[Verdict]], Judged]:
    """Has the answers of all contexts judged together.

    Args:
        asked: The questions.
        given: The model's answers, by context.
        judge: Says which of them are right.
        base: The base model's, for questions without an expected one.
        progress: Called while the judge is at it.

    Returns:
        By context, whether every answer is right (``None``: nothing is known to be, or it was not judged); and what
        the judge made of the answers beside exact match.
    """
    shown = {context: cases(asked, answered, base[context] if base else None) for context, answered in given.items()}
    known = [case for some in shown.values() for case in some if case is not None]
    verdicts = distributed.from_main(lambda: judge(known, progress=progress))
    said = iter(verdicts)
    found = {context: [None if case is None else next(said) for case in some] for context, some in shown.items()}
    return found, Judged.of(judge, known, verdicts)


def score_items(
    asked: Sequence[Question],
    given: Sequence[str],
    judge: Judge = exact,
    base: Sequence[str] | None = None,
) -> Items:
    """Scores of the answers in one context, edit by edit; see :func:`judge_answers`."""
    verdicts, _ = judge_answers(asked, {"": given}, judge, None if base is None else {"": base})
    return items_of(asked, verdicts[""])


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


def answer_questions(
    model: Any,
    prompter: Prompter,
    asked: Sequence[Question],
    *,
    stop_at_period: bool = False,
    progress: Progress = no_progress,
) -> dict[str, list[str]]:
    """The model's answers to questions, in both contexts.

    Args:
        model: A causal LM, in evaluation mode.
        prompter: Builds prompts.
        asked: The questions.
        stop_at_period: See :func:`crispedit.generation.answers`.
        progress: Called after every batch.

    Returns:
        The answers by context.
    """
    given = {}
    for context in CONTEXTS:
        drafts = expected_drafts(prompter, asked, context)
        found = ask(model, prompter, asked, context, drafts=drafts, stop_at_period=stop_at_period, progress=progress)
        given[context] = [answer.text for answer in found]
    return given
