"""What a language model is asked as a judge, and how its reply is read.

The rules are those of the WILD protocol (Yang et al. 2025, "The Mirage of Model Editing"): right is an answer with all
that matters of the target and nothing against it; a part of it, something wrong beside it, or the same again and again
is wrong. The words and the examples are our own, and the published evaluation's reply had to be exactly ``A``.
"""

import re

from .judge import Case, Verdict

REPLY_TOKENS = 16
"""Most tokens of a reply: room for a letter, its word, and some decoration."""

PROMPT = """\
You grade one answer to a question against a target. Take the target as the truth, even where you know better, and \
decide by it alone whether the answer is CORRECT or INCORRECT.

CORRECT: the answer gives everything that matters in the target, and nothing in it speaks against the target. Upper or \
lower case, punctuation, the order of parts, and whether it is a whole sentence make no difference.
INCORRECT: something that matters is missing, or something is added or changed that does not agree with the target, or \
the answer is said over and over.

Example. Question: Which two rivers meet in Koblenz? Target: the Rhine and the Moselle
These answers are CORRECT:
- rhine, moselle
- The Moselle and the Rhine.
- In Koblenz the Moselle flows into the Rhine
Each names both rivers and claims nothing else.
These answers are INCORRECT:
- the Rhine (the other river is missing)
- the Rhine, the Moselle and the Main (a river too many, against the target)
- the Rhine and the Moselle the Rhine and the Moselle the Rhine and the Moselle (said over and over)

Now grade this one.
Question: {question}
Target: {target}
Answer: {answer}

A: CORRECT
B: INCORRECT
Reply with the letter alone, A or B."""

_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_DECORATION = re.compile(r"""\\boxed|[*_`"'“”‘’()\[\]{}$<>#.,:;!\-–—]+""")
_VERDICT = re.compile(
    r"(?:(?:the |my )?(?:final |correct |best )?(?:answer|verdict|grade|choice|option)(?: is)? )?"
    r"(?:(?P<letter>[ab])(?: (?P<after>correct|incorrect))?|(?P<word>correct|incorrect)(?: (?P<last>[ab]))?)"
)
_MEANS = {"a": True, "correct": True, "b": False, "incorrect": False}


def grading_prompt(case: Case) -> str:
    """The message that asks for a verdict on a case."""
    return PROMPT.format(question=case.question, target=case.target, answer=case.answer)


def read_verdict(reply: str) -> Verdict:
    """The verdict that a reply gives.

    Args:
        reply: Of the judge.

    Returns:
        What its first line says, as a letter, a word or both, whatever is around them (``A``, ``b.``, ``**B**``,
        ``A: CORRECT``, ``Answer: B``); ``None`` where that line says anything else, where letter and word disagree, or
        where another line gives the other verdict.
    """
    lines = [line for line in map(_plain, _THOUGHT.sub(" ", reply).splitlines()) if line]
    verdicts = [_read_line(line) for line in lines]
    if not verdicts or verdicts[0] is None or (not verdicts[0]) in verdicts:
        return None
    return verdicts[0]


def _plain(line: str) -> str:
    """A line in lower case, without decoration."""
    return " ".join(_DECORATION.sub(" ", line).lower().split())


def _read_line(line: str) -> Verdict:
    found = _VERDICT.fullmatch(line)
    if found is None:
        return None
    said = {_MEANS[part] for part in found.groups() if part is not None}
    return said.pop() if len(said) == 1 else None
