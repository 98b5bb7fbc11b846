"""When an answer counts as right: exact match after normalising, or containing the target.

The exact match is that of the WILD protocol where no model judges: lower case, ASCII punctuation
deleted, the articles a, an and the dropped, whitespace collapsed, then equality (Yang et al. 2025,
"The Mirage of Model Editing").
"""

import re
import string
from collections.abc import Callable

from .errors import ConfigError, did_you_mean

Judge = Callable[[str, str, str], bool]
"""From question, target and answer to whether the answer is right."""

_DELETE = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE)).split())


def exact(question: str, target: str, answer: str) -> bool:
    """Whether answer and target are equal once normalised."""
    return normalise(answer) == normalise(target)


def contains(question: str, target: str, answer: str) -> bool:
    """Whether the normalised target stands in the normalised answer as whole words."""
    return f" {normalise(target)} " in f" {normalise(answer)} "


JUDGES: dict[str, Judge] = {"exact": exact, "contains": contains}


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
