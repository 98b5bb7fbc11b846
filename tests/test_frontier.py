"""A frontier of budgets: warm starts, what is kept of them, the knee, the picture, and the command."""

import json
import math
from pathlib import Path

import pytest
import torch

from crispedit import cli, editing
from crispedit.console_edit import print_frontier
from crispedit.editors import configured
from crispedit.errors import ConfigError
from crispedit.frontier import draw_frontier, frontier, knee, put_back, success
from crispedit.models import edit_matrices
from reference import tiny_llama


def point(drift, reliability, generalization, budget=None):
    return {
        "budget": budget if budget is not None else drift,
        "drift": drift,
        "preference": 0.0,
        "reliability": reliability,
        "generalization": generalization,
        "locality": 99.0,
    }


FINE_TUNING = point(0.064, 100.0, 96.0)


@pytest.mark.parametrize(
    ("successes", "expected"),
    [
        # by hand: x = 0, 1/6, …, 4/6, 1 (six doublings of 0.001 to 0.064); y from 0 to 1
        ((0.0, 50.0, 90.0, 95.0, 97.0), 2),  # y − x: 0, 0.34, 0.58, 0.46, 0.31
        ((0.0, 90.0, 92.0, 94.0, 96.0), 1),
        ((0.0, 10.0, 20.0, 30.0, 98.0), 4),
        ((50.0, 50.0, 50.0, 50.0, 50.0), 0),
    ],
)
def test_the_knee_is_where_success_stops_to_rise(successes, expected):
    points = [point(0.001 * 2**n, value, value) for n, value in enumerate(successes)]
    assert knee(points, point(0.064, 98.0, 98.0)) == expected


def test_of_points_that_are_level_the_knee_is_the_cheapest():
    points = [point(0.001, 98.0, 98.0), point(0.002, 98.0, 98.0)]
    assert knee(points, point(0.064, 98.0, 98.0)) == 0
    assert knee([point(0.001, 98.0, 98.0)], point(0.001, 99.0, 99.0)) == 0  # nothing lies between


def test_success_is_of_what_was_asked():
    assert success(point(0.1, 80.0, 60.0)) == 70.0
    assert success(point(0.1, 80.0, None)) == 80.0
    assert math.isnan(success(point(0.1, None, None)))


def test_points_are_by_rising_budget_and_beside_fine_tuning():
    rounds = [{**point(0.003, 100.0, 90.0, 0.004), "num_edits": 3}, point(0.002, 50.0, 20.0, 0.002)]
    reference = {
        "capability": {"drift": 0.06, "loss": 1.0},
        "after": {k: FINE_TUNING[k] for k in ("reliability", "generalization", "locality")},
    }
    found = frontier(rounds, reference)
    assert [one["budget"] for one in found["points"]] == [0.002, 0.004]
    assert "num_edits" not in found["points"][1]
    assert found["fine_tuning"] == {"drift": 0.06, "reliability": 100.0, "generalization": 96.0, "locality": 99.0}
    assert found["knee"] == 0.004


def test_weights_are_put_back_bit_for_bit():
    matrices = edit_matrices(tiny_llama(), None)
    before = [matrix.weight.clone() for matrix in matrices]
    with torch.no_grad(), put_back(matrices):
        for matrix in matrices:
            matrix.weight.mul_(3)
    assert all(torch.equal(matrix.weight, one) for matrix, one in zip(matrices, before, strict=True))


def test_the_picture_has_every_point_and_the_knee(tmp_path):
    pytest.importorskip("matplotlib")
    from crispedit.frontier import figure_of

    points = [point(0.001, 50.0, 10.0), point(0.002, 100.0, 90.0), point(0.004, 100.0, 94.0)]
    found = {"points": points, "fine_tuning": FINE_TUNING, "knee": 0.002}
    (axes,) = figure_of(found).axes
    drawn = {tuple(line.get_ydata()): tuple(line.get_xdata()) for line in axes.lines}
    assert drawn[50.0, 100.0, 100.0] == drawn[10.0, 90.0, 94.0] == (0.001, 0.002, 0.004)
    assert drawn[96.0,] == (0.064,)
    assert "knee: budget 0.002" in [text.get_text() for text in axes.texts]
    draw_frontier(found, tmp_path / "frontier.svg")
    assert "<svg" in (tmp_path / "frontier.svg").read_text()


@pytest.mark.parametrize("count", [0, 21, "x"])
def test_a_count_that_does_not_fit_is_refused(count):
    with pytest.raises(ConfigError, match="frontier is"):
        configured("crispedit", {"budget": 0.1, "frontier": count})


def test_a_frontier_needs_a_budget_and_a_picture_needs_a_frontier(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli._run(["edit", "bundled", "bundled:eval", "--frontier", "3", "--out", "a"]) != 0
    assert "a frontier is of budgets: give --budget, the largest of them" in capsys.readouterr().err
    wanted = ["edit", "bundled", "bundled:eval", "--budget", "1%", "--out", "a"]
    assert cli._run([*wanted, "--plot", "a.svg"]) != 0
    assert "--plot draws a frontier: give --frontier N" in capsys.readouterr().err
    assert cli._run([*wanted, "--frontier", "2", "--plot", "a.txt"]) != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_frontier_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Every budget is met; what is saved is the edit within the largest, as it would be without a frontier."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(editing, "PROOF_EDITS", 6)
    settings = ["--limit", "6", "--samples", "40", "--layers", "3", "--epochs", "4"]
    wanted = ["edit", "bundled", "bundled:eval", *settings, "--budget", "0.008"]
    assert cli._run([*wanted, "--frontier", "3", "--plot", "f.svg", "--out", "a", "--json", "a.json"]) == 0
    said = capsys.readouterr().out
    assert "What a damage budget buys" in said
    assert "plain fine-tuning" in said
    assert Path("f.svg").is_file()
    metrics = json.loads(Path("a.json").read_text())["metrics"]
    found = metrics["frontier"]
    assert [one["budget"] for one in found["points"]] == [0.002, 0.004, 0.008]
    assert all(0 < one["drift"] <= one["budget"] for one in found["points"])
    assert found["knee"] in (0.002, 0.004, 0.008)
    assert found["fine_tuning"]["drift"] > 0
    assert metrics["budget"]["budget"] == 0.008
    # in float32 within the loop, and as it is stored
    assert metrics["budget"]["drift"] == pytest.approx(found["points"][-1]["drift"], rel=1e-2)
    assert cli._run([*wanted, "--out", "b", "--json", "b.json"]) == 0
    alone = json.loads(Path("b.json").read_text())["metrics"]
    assert alone["budget"]["drift"] == pytest.approx(metrics["budget"]["drift"], rel=1e-6)
    assert alone["after"] == metrics["after"]


@pytest.mark.parametrize(("kept", "said"), [(70.0, True), (90.0, False)])
def test_an_edit_that_says_less_than_one_within_a_smaller_budget_is_not_kept_without_a_word(kept, said, capsys):
    """The smaller ones went on from it: there were too few epochs for the largest."""
    points = [point(0.004, 90.0, 90.0), point(0.008, kept, kept)]
    print_frontier({"points": points, "fine_tuning": FINE_TUNING, "knee": 0.004})
    printed = " ".join(capsys.readouterr().out.split())
    assert ("within 0.008, says less than that within 0.004" in printed) == said
    points[0]["preference"] = 0.3  # other edits came first there: it is no question of epochs
    print_frontier({"points": points, "fine_tuning": FINE_TUNING, "knee": 0.004})
    assert "says less" not in capsys.readouterr().out
