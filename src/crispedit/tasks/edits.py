"""The documents of the tasks beside this file, and when an answer to one is right.

The harness imports this file by its path, so imports are absolute.
"""

from typing import Any

from datasets import Dataset  # comes with the harness

from crispedit.edits import load_edits
from crispedit.errors import ConfigError, EditsError, check_choice
from crispedit.generation import cut
from crispedit.judge import Case, is_exact
from crispedit.wild import CONTEXTS, in_context, questions

SCHEMAS = {"zsre": ("zsre",), "counterfact": ("counterfact", "counterfact-rome"), "wikibigedit": ("wikibigedit",)}


def documents(
    schema: str,
    kind: str,
    edits: str | None = None,
    context: str = "no_context",
    conflicts: Any = "error",
    **_: Any,
) -> dict[str, Any]:
    """The questions of one kind about the edits of a file.

    Args:
        schema: Of the file; from the task.
        kind: ``reliability``, ``generalization`` or ``locality``; from the task.
        edits: The file; from ``--metadata``, like the next two.
        context: ``no_context`` or ``qa_context``.
        conflicts: What to do with one prompt and several targets.
        **_: Whatever else the harness says.

    Returns:
        A split ``test`` of documents: ``edit`` (its number), ``prompt``, ``answer`` (the right one), ``choices`` (that
        and, where the file knows it, the answer to the same prompt that would be right if the edit were not, or were).

    Raises:
        ConfigError: There is no file, or one of the settings has a value that cannot be used.
        EditsError: The file is of another schema, or asks nothing of this kind.
    """
    if edits is None:
        raise ConfigError("""no edits are named: give lm_eval --metadata '{"edits": "FILE"}'""")
    check_choice("context", context, CONTEXTS)
    found = load_edits(edits, conflicts=conflicts)
    if found.schema not in SCHEMAS[schema]:
        raise EditsError(f"{found.source} is of schema {found.schema}, and there are tasks for {', '.join(SCHEMAS)}")
    rows = []
    for question in questions(found):
        if question.kind == kind and question.expected is not None:
            edit = found[question.edit]
            other = edit.target if kind == "locality" else edit.locality[0].answer if edit.locality else None
            rows.append(
                {
                    "edit": question.edit,
                    "prompt": in_context(question.prompt, context),
                    "answer": question.expected,
                    "choices": [question.expected, *([other] if other else [])],
                }
            )
    if not rows:
        raise EditsError(f"{found.source} has no {kind} prompts with a known answer")
    return {"test": Dataset.from_list(rows)}


def right_answer(document: dict[str, Any]) -> list[str]:
    """The only choice of a task that is teacher-forced."""
    return [document["answer"]]


def exact_match(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the first line of a free answer with anything on it is the right answer, once both are normalised.

    Args:
        document: Of :func:`documents`.
        results: The answer.

    Returns:
        ``exact_match``, as WILD counts it.
    """
    case = Case(document["prompt"], document["answer"], cut(results[0], False))
    return {"exact_match": float(is_exact(case))}
