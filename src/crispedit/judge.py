"""When an answer counts as right: exact match after normalising, or containing the target; what judges have in common.

The exact match is that of the WILD protocol where no model judges: lower case, ASCII punctuation
deleted, the articles a, an and the dropped, whitespace collapsed, then equality (Yang et al. 2025,
"The Mirage of Model Editing").
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .errors import ConfigError, did_you_mean
from .progress import Progress, no_progress

Verdict = bool | None
"""Whether an answer is right; ``None``: it could not be judged, which is not the same as wrong."""

_DELETE = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Case:
    """What a judge is shown: a prompt as it is in the edit set, without context; what is right; what was answered."""

    question: str
    target: str
    answer: str


class Judge(Protocol):
    """Says of answers whether they are right."""

    @property
    def name(self) -> str:
        """A name for tables."""

    def __call__(self, cases: Sequence[Case], *, progress: Progress = no_progress) -> list[Verdict]:
        """One verdict per case."""

    def about(self) -> dict[str, Any]:
        """What an evaluation records of it: its ``name``, its ``model``, what it has cost so far; JSON-ready."""


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE)).split())


def is_exact(case: Case) -> bool:
    """Whether answer and target are equal once normalised."""
    return normalise(case.answer) == normalise(case.target)


def is_contained(case: Case) -> bool:
    """Whether the normalised target stands in the normalised answer as whole words."""
    return f" {normalise(case.target)} " in f" {normalise(case.answer)} "


@dataclass(frozen=True)
class RuleJudge:
    """A judge that decides every case by itself."""

    name: str
    is_right: Callable[[Case], bool]

    def __call__(self, cases: Sequence[Case], *, progress: Progress = no_progress) -> list[Verdict]:
        """One verdict per case."""
        return [self.is_right(case) for case in cases]

    def about(self) -> dict[str, Any]:
        """Its name."""
        return {"name": self.name, "model": None}


exact = RuleJudge("exact", is_exact)
contains = RuleJudge("contains", is_contained)
JUDGES = {judge.name: judge for judge in (exact, contains)}


def find_judge(name: str) -> Judge:
    """The judge of that name.

    Args:
        name: A key of ``JUDGES``.

    Returns:
        The judge.

    Raises:
        ConfigError: There is none.
    """
    if name not in JUDGES:
        raise ConfigError(f"judge is '{name}'; it must be {' or '.join(JUDGES)}{did_you_mean(name, JUDGES)}")
    return JUDGES[name]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a judge made of answers, beside what exact match makes of them.

    Args:
        about: The judge.
        both_right: Answers right to both.
        only_judge: Right to the judge and not exactly the target.
        only_exact: Exactly the target, and wrong to the judge.
        both_wrong: Wrong to both.
        unjudged: Answers that it did not judge; no score has them in it.
    """

    about: dict[str, Any]
    both_right: int
    only_judge: int
    only_exact: int
    both_wrong: int
    unjudged: int

    @classmethod
    def of(cls, judge: Judge, cases: Sequence[Case], verdicts: Sequence[Verdict]) -> "Judged":
        """The counts of some verdicts."""
        pairs = Counter((verdict, is_exact(case)) for case, verdict in zip(cases, verdicts, strict=True))
        return cls(
            about=judge.about(),
            both_right=pairs[True, True],
            only_judge=pairs[True, False],
            only_exact=pairs[False, True],
            both_wrong=pairs[False, False],
            unjudged=pairs[None, True] + pairs[None, False],
        )

    @property
    def agreement(self) -> float | None:
        """Percent of the judged answers of which both say the same."""
        judged = self.both_right + self.only_judge + self.only_exact + self.both_wrong
        return 100 * (self.both_right + self.both_wrong) / judged if judged else None

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        counts = {name: value for name, value in vars(self).items() if name not in ("about", "unjudged")}
        return {
            **self.about,
            "cases": sum(counts.values()) + self.unjudged,
            "unjudged": self.unjudged,
            "agreement_with_exact": self.agreement,
            "beside_exact": counts,
        }
