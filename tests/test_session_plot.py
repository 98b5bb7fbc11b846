"""The picture of a session: what is in it."""

import math

import pytest

from crispedit.session_plot import draw_session, figure_of, retention

pytest.importorskip("matplotlib")


def record(number, past, drift=None):
    return {"number": number, "past": {str(k): {"reliability": value} for k, value in past.items()}, "drift": drift}


ROUNDS = [
    record(1, {1: 100.0}, {"drift": 0.01, "predicted": 0.004}),
    record(2, {1: 75.0}, {"drift": 0.02, "predicted": None}),  # round 2 has not kept its edits
    record(3, {1: 50.0, 3: 100.0}, {"drift": 0.04, "predicted": 0.01}),
]


def test_what_is_left_of_each_round_after_each():
    assert retention(ROUNDS) == [[100.0, 75.0, 50.0], [None, None, None], [None, None, 100.0]]


def test_both_panels_show_the_numbers():
    left, right = figure_of(ROUNDS).axes[:2]
    shown = left.images[0].get_array()
    assert shown.shape == (3, 3)
    assert [text.get_text() for text in left.texts] == ["100", "75", "50", "100"]
    measured, predicted = right.lines
    assert (list(measured.get_xdata()), list(measured.get_ydata())) == ([1, 2, 3], [0.01, 0.02, 0.04])
    assert predicted.get_ydata()[0] == 0.004
    assert math.isnan(predicted.get_ydata()[1])


def test_what_nobody_measured_is_said(tmp_path):
    left, right = figure_of([record(1, {})]).axes[:2]
    assert "--keep-edits" in left.texts[0].get_text()
    assert "no texts" in right.texts[0].get_text()
    draw_session([record(n, {1: 90.0}) for n in range(1, 31)], tmp_path / "long.png")
    assert (tmp_path / "long.png").stat().st_size > 5000
