"""Exact match after normalising, as WILD does it; and containing."""

import pytest

from crispedit.errors import ConfigError
from crispedit.judge import contains, exact, find_judge


@pytest.mark.parametrize(
    ("target", "answer", "is_exact", "is_contained"),
    [
        ("Paris", "paris", True, True),
        ("Paris", " The Paris. ", True, True),
        ("St. Louis", "st louis", True, True),
        ("an apple a day", "apple day", True, True),
        ("Paris", "It is Paris", False, True),
        ("Paris", "Parisian", False, False),
        ("theatre", "the atre", False, False),
        ("mezzo-soprano", "mezzosoprano", True, True),
        ("mezzo-soprano", "mezzo soprano", False, False),
        ("Paris", "", False, False),
        ("1957", "1957 1957", False, True),
    ],
)
def test_judges(target, answer, is_exact, is_contained):
    assert exact("q", target, answer) is is_exact
    assert contains("q", target, answer) is is_contained


def test_an_unknown_judge_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"judge is 'exakt'; it must be exact or contains \(did you mean 'exact'\?\)"):
        find_judge("exakt")
