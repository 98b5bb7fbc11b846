"""Exact match after normalising, as WILD does it; and containing; and how a judge stands to exact match."""

import pytest

from crispedit.errors import ConfigError
from crispedit.judge import Case, Judged, RuleJudge, contains, exact, find_judge


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
    case = Case("q", target, answer)
    assert exact([case]) == [is_exact]
    assert contains([case]) == [is_contained]


def test_an_unknown_judge_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"judge is 'exakt'; it must be exact or contains \(did you mean 'exact'\?\)"):
        find_judge("exakt")


def test_the_counts_beside_exact_match():
    answers = ["Paris", "paris", "in Paris", "Rome", "Bonn", "the Paris", "Oslo"]
    verdicts = [True, False, True, False, None, None, False]
    cases = [Case("q", "Paris", answer) for answer in answers]
    judged = Judged.of(RuleJudge("mine", bool), cases, verdicts)
    assert judged.record() == {
        "name": "mine",
        "model": None,
        "cases": 7,
        "unjudged": 2,
        "agreement_with_exact": 60.0,  # 3 of the 5 that were judged
        "beside_exact": {"both_right": 1, "only_judge": 1, "only_exact": 1, "both_wrong": 2},
    }
    assert Judged.of(exact, [], []).agreement is None
    assert Judged.of(exact, cases, exact(cases)).agreement == 100
