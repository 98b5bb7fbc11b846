"""Measures of a model beside those of its base: their names, what is a pair, and what is said of differences."""

from dataclasses import replace

import pytest

from crispedit.console_evaluation import print_differences
from crispedit.paired import could_have_shown, differences_record, measure_rows, small_loss
from crispedit.teacher_forced import TeacherForced
from evaluated import evaluated

AFTER = TeacherForced(
    items={"reliability": {0: 1.0, 1: 1.0, 2: 0.5}, "generalization": {0: 0.75, 2: 1.0}, "locality": {0: 1.0, 1: 0.0}},
    beside={"agreement": {0: 0.5, 1: 1.0}, "efficacy": {0: 1.0}, "paraphrase_efficacy": {}},
    locality="likelihood",
)
BEFORE = TeacherForced(
    items={"reliability": {0: 0.5, 1: 0.0, 2: 0.5}, "generalization": {0: 0.0, 2: 0.5}, "locality": {0: 1.0, 1: 1.0}},
    beside={"agreement": {0: 1.0, 1: 1.0}, "efficacy": {0: 0.0, 1: 1.0}, "paraphrase_efficacy": {}},
    locality="likelihood",
)
FORCED = "teacher_forced."


def with_forced(*, free=True):
    """The evaluations of ``evaluated.py`` with teacher-forced scores, or these alone."""
    found = evaluated()
    alone = {} if free else {"edits": {}, "answers": {}, "verdicts": {}}
    return replace(
        found,
        after=replace(found.after, forced=AFTER, **alone),
        before=replace(found.before, forced=BEFORE, **alone),
    )


def rows_of(found):
    return {row["name"]: row for row in measure_rows(found, resamples=300)}


@pytest.mark.parametrize("free", [True, False])
def test_teacher_forced_scores_stand_apart(free):
    """Means by hand, over the edits of which both models have a score."""
    rows = rows_of(with_forced(free=free))
    wanted = {
        "reliability": ("reliability, teacher-forced", "success", 100 / 3, 250 / 3),
        "generalization": ("generalization, teacher-forced", "success", 25, 87.5),
        "efficacy": ("efficacy, teacher-forced", "success", 0, 100),
        "locality": ("locality by likelihood, teacher-forced", "damage", 100, 50),
        "agreement": ("agreement with the base, teacher-forced", "damage", 100, 75),
    }
    forced = {name.removeprefix(FORCED): row for name, row in rows.items() if name.startswith(FORCED)}
    assert set(forced) == set(wanted)  # and no paraphrase efficacy, which was not measured
    for name, (title, group, before, after) in wanted.items():
        row = forced[name]
        assert (row["title"], row["group"]) == (title, group)
        assert (row["before"], row["after"]) == pytest.approx((before, after))
        assert row["difference"]["value"] == pytest.approx(after - before)
    assert ("success" in rows) == ("reliability" in rows) == ("qa_context.locality" in rows) == free
    assert {"drift", "loss", "abilities"} <= set(rows)


def test_free_scores_are_the_same_with_teacher_forced_ones_and_without():
    alone, beside = rows_of(evaluated()), rows_of(with_forced())
    assert {name: row for name, row in beside.items() if not name.startswith(FORCED)} == alone


def test_the_record_has_every_difference_with_what_it_is_of():
    rows = rows_of(with_forced())
    record = differences_record(list(rows.values()))
    assert (record["level"], record["power"]) == (0.95, 0.8)
    assert set(record["measures"]) == set(rows)
    for name, found in record["measures"].items():
        assert found["value"] == pytest.approx(found["model"] - found["base"])
        assert found["low"] <= found["value"] <= found["high"]
        assert found["change"] == rows[name]["change"]
    assert record["measures"]["drift"]["unit"] == "nats/token"


def loss(low, high, name="locality", group="damage", unit="%"):
    value = (low + high) / 2
    return {
        "name": name,
        "title": name,
        "group": group,
        "unit": unit,
        "digits": 1,
        "difference": {"value": value, "low": low, "high": high, "error": 0.1, "detectable": 0.7},
        "change": "loss" if high < 0 else "gain" if low > 0 else "none",
    }


def test_a_loss_below_a_point_is_claimed_only_where_the_interval_says_so():
    assert small_loss(loss(-0.9, 0.2))
    assert small_loss(loss(-0.9, -0.1))  # there is one, and it is small
    assert not small_loss(loss(-1.0, 0.2))
    assert not small_loss(loss(-3.0, 1.0))  # the estimate is −1, and it might be −3
    assert not small_loss(loss(0.1, 0.2, "reliability", "success"))
    assert not small_loss(loss(-0.1, 0.2, "loss", "damage", "nats/token"))


def test_the_table_says_what_could_have_been_shown_where_nothing_was(capsys):
    print_differences([loss(-0.9, 0.2, "abilities"), loss(-4, -2), loss(30, 50, "reliability", "success")])
    said = capsys.readouterr().out
    lines = {line.split(",")[0].strip("│ "): line for line in said.splitlines() if "points" in line}
    assert "-0.3" in lines["abilities"]
    assert "[-0.9, +0.2]" in lines["abilities"]
    assert "≥ 0.7" in lines["abilities"]
    assert "-3.0" in lines["locality"]
    assert "≥" not in lines["locality"]
    assert "+40.0" in lines["reliability"]
    assert "a loss, if any, below 1 point by these intervals: abilities\n" in said


def test_what_no_percentage_can_change_by_could_not_have_been_shown():
    row = loss(-40, 20)
    row["difference"]["detectable"] = 100.0
    assert could_have_shown(row) == "≥ 100.0"
    row["difference"]["detectable"] = 100.1
    assert could_have_shown(row) == "nothing"
    assert could_have_shown(row | {"unit": "nats/token"}) == "≥ 100.1"
    assert could_have_shown(row | {"change": "loss"}) == ""


def test_nothing_is_said_to_be_small_where_no_interval_says_so(capsys):
    print_differences([loss(-4, 2)])
    assert "below" not in capsys.readouterr().out
