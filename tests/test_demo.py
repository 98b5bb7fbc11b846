"""The demo: what it says of its three columns, and (slow) the whole of it."""

import json

import pytest

from crispedit import cli
from crispedit.demo import ability_loss, verdict

TASKS = ("arithmetic", "instructions", "multiple_choice", "true_false", "prose")


def column(reliability, generalization, drift, *tasks):
    scores = {"reliability": reliability, "generalization": generalization, "locality": 50.0}
    capability = {"drift": drift, "loss_base": 1.0, "loss": 1.0, "tasks": dict(zip(TASKS, tasks, strict=True))}
    return {"no_context": scores, "qa_context": scores, "teacher_forced": None, "capability": capability}


BASE = column(0, 0, 0.0, 100, 90, 80, 70, 60)
FT = column(100, 50, 0.09, 70, 84, 80, 67, 60)


@pytest.mark.parametrize(
    ("crispedit", "met"),
    [
        (column(96, 40, 0.03, 92, 89, 80, 68, 59), [True, True, True, True]),
        (column(94, 40, 0.03, 92, 89, 80, 68, 59), [False, True, True, True]),
        (column(96, 39, 0.03, 92, 89, 80, 68, 59), [True, False, True, True]),
        (column(96, 40, 0.03, 85, 89, 80, 65, 59), [True, True, False, True]),
        (column(96, 40, 0.04, 92, 89, 80, 68, 59), [True, True, True, False]),
    ],
)
def test_the_verdict_says_which_goals_are_met(crispedit, met):
    lines = verdict({"base": BASE, "ft": FT, "crispedit": crispedit})
    assert [line.startswith("met") for line in lines] == met
    assert [line.startswith("MISSED") for line in lines] == [not m for m in met]


def test_ability_loss_is_a_mean_of_points():
    assert ability_loss(BASE, FT) == pytest.approx((30 + 6 + 0 + 3 + 0) / 5)


@pytest.mark.slow
def test_the_demo_meets_its_goals_and_replaces_only_its_own_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli._run(["demo", "--json", "out/demo.json", "--out", "out/model"]) == 0
    assert "MISSED" not in capsys.readouterr().out
    columns = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert set(columns) == {"base", "ft", "crispedit"}
    for name, evaluation in columns.items():
        assert set(evaluation) == {"no_context", "qa_context", "teacher_forced", "judge", "capability"}
        assert set(evaluation["capability"]["tasks"]) == set(TASKS)
        assert (evaluation["capability"]["drift"] == 0) == (name == "base")
    assert (tmp_path / "out" / "model" / "crispedit.json").is_file()
