"""``crispedit session`` from end to end, on the bundled model."""

import json
import subprocess
import sys

import pytest
import torch

from crispedit import cli
from crispedit.bundled import world
from crispedit.models import load_model
from crispedit.store import ROUNDS

FAST = ("--editor", "ft", "--set", "epochs=4", "--set", "lr=0.01", "--layers", "6")


def program(*arguments):
    assert cli._run(["session", *map(str, arguments)]) == 0


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current directory, with three files of edits and a session that has none of them yet."""
    monkeypatch.chdir(tmp_path)
    rows = world.edit_rows("eval")
    for number in range(3):
        (tmp_path / f"{number + 1}.json").write_text(json.dumps(rows[4 * number : 4 * number + 4]))
    program("init", "bundled", "s", *FAST)
    return tmp_path


def weights(name):
    return load_model(name).model.state_dict()


def same(one, other):
    a, b = weights(one), weights(other)
    return all(torch.equal(a[key], b[key]) for key in a)


def test_rounds_are_made_shown_taken_back_and_exported(work, capsys):
    for number in (1, 2, 3):
        program("edit", "s", f"{number}.json", "--keep-edits", "--json", f"round{number}.json")
    assert json.loads((work / "round2.json").read_text())["number"] == 2
    capsys.readouterr()
    program("status", "s", "--verify", "--json", "status.json")
    printed = capsys.readouterr().out
    assert "2: 4 edits from 2.json" in printed
    status = json.loads((work / "status.json").read_text())
    assert [record["edits"]["count"] for record in status["rounds"]] == [4, 4, 4]
    assert status["damaged"] == []
    assert status["rounds"][2]["past"].keys() == {"1", "2", "3"}
    program("export", "s", "--round", 2, "--out", "second")
    program("export", "s", "--out", "third")
    record = json.loads((work / "third" / "crispedit.json").read_text())
    assert record["command"] == "session export"
    assert record["model"]["fingerprint"] == status["fingerprint"]
    assert [patch["edits"]["count"] for patch in record["patches"]] == [r["edits"]["count"] for r in status["rounds"]]
    program("export", "s", "--patch", "--out", "third.safetensors")
    assert cli._run(["patch", "apply", "bundled", "third.safetensors", "--out", "patched"]) == 0
    assert same("patched", "third")
    program("export", "s", "--lora-rank", 4, "--out", "adapter", "--json", "adapter.json")
    adapter = json.loads((work / "adapter.json").read_text())
    assert adapter["ranks"] == {"model.layers.6.mlp.down_proj.weight": 4}
    assert 0 < adapter["energy"]["model.layers.6.mlp.down_proj.weight"] < 1
    assert adapter["exact"]["past"].keys() == adapter["adapter"]["past"].keys() == {"1", "2", "3"}
    program("export", "s", "--lora-energy", 1, "--out", "whole", "--json", "whole.json")
    whole = json.loads((work / "whole.json").read_text())
    assert whole["adapter"]["past"] == whole["exact"]["past"]
    program("revert", "s", "--to", 2)
    program("export", "s", "--out", "again")
    assert same("again", "second")
    program("revert", "s", "--to", 0)
    program("edit", "s", "2.json")
    program("export", "s", "--out", "alone")
    program("revert", "s", "--to", 0)
    program("edit", "s", "1.json")
    program("edit", "s", "2.json")
    program("revert", "s", "--round", 1, "--edits", "2.json")
    program("export", "s", "--out", "without")
    assert same("without", "alone")
    capsys.readouterr()
    program("log", "s", "--json", "log.json")
    printed = capsys.readouterr().out
    assert "round 1: 4 edits from 1.json, by ft" in printed
    assert "reverted to round 2: 1 rounds taken back" in printed
    assert "round 1 taken out; 1 later rounds are to be made again" in printed
    assert len(json.loads((work / "log.json").read_text())) == len(printed.splitlines())


def test_rounds_whose_edits_are_at_hand_are_asked_about(work, capsys):
    program("edit", "s", "1.json")
    program("edit", "s", "2.json")
    capsys.readouterr()
    program("evaluate", "s", "--edits", "2.json", "--json", "some.json")
    some = json.loads((work / "some.json").read_text())
    assert [of_round["no_context"] is None for of_round in some["rounds"]] == [True, False]
    assert some["capability"]["tasks"].keys() >= {"arithmetic", "prose"}
    printed = " ".join(capsys.readouterr().out.split())
    assert "s after round 2, in a question, %, judge: exact" in printed
    assert "edits of rounds 1 were not kept: give their files by --edits" in printed


def test_a_session_is_drawn(work, capsys):
    pytest.importorskip("matplotlib")
    assert cli._run(["session", "status", "s", "--plot", "none.png"]) == 2
    assert "the session has no rounds to draw yet" in capsys.readouterr().err
    program("edit", "s", "1.json", "--keep-edits")
    program("status", "s", "--plot", "s.svg")
    drawn = (work / "s.svg").read_text()
    assert drawn.startswith("<?xml")
    assert [path.name for path in work.glob("*.svg")] == ["s.svg"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "s", "--edits", "1.json"], "1.json (4 edits) is of none of the 0 rounds"),
        (["evaluate", "s", "--round", "1"], "there is no round 1; the session has 0"),
        (["evaluate", "s", "--judge", "exakt"], "exakt"),
        (["status", "s", "--plot", "s.txt"], "cannot draw 's.txt'"),
        (["edit", "nothing", "1.json"], "'nothing' is no session"),
        (["edit", "s", "none.json"], "none.json: no such file"),
        (["init", "bundled", "s"], "the directory 's' is not empty"),
        (["init", "bundled", "t", "--editor", "crispit"], "crispit"),
        (["init", "bundled", "t", "--set", "energy"], "--set is 'energy'; it must be NAME=VALUE"),
        (["init", "bundled", "t", "--history-weight", "-1"], "it must be equal-trace or a number from 0 on"),
        (["revert", "s"], "give --to N"),
        (["revert", "s", "--to", "1", "--round", "1"], "give --to N"),
        (["revert", "s", "--to", "3"], "there is no round 3; the session has 0"),
        (["revert", "s", "--round", "1"], "there is no round 1; the session has 0"),
        (["export", "s", "--round", "1", "--out", "t"], "there is no round 1; the session has 0"),
        (["export", "s", "--patch", "--out", "t"], "the base model itself needs no patch"),
        (["export", "s", "--out", "s"], "the directory 's' is not empty"),
        (["export", "s", "--out", "t", "--lora-rank", "2"], "the base model itself needs no adapter"),
        (["export", "s", "--out", "t", "--lora-rank", "2", "--patch"], "give one of --merged, --patch"),
        (["export", "s", "--out", "t", "--lora-rank", "0"], "--lora-rank is 0; it must be 1 or more"),
        (
            ["export", "s", "--out", "t", "--lora-energy", "1.5"],
            "--lora-energy is 1.5; it must be above 0 and at most 1",
        ),
        (["status", "s", "--json", "s"], "--json 's' is a directory"),
        (["log", "1.json"], "'1.json' is no session"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(work, capsys, arguments, said):
    capsys.readouterr()
    assert cli._run(["session", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (work / "t").exists()


def test_a_session_is_listed_without_torch_and_without_its_tensors(work):
    program("edit", "s", "1.json")
    for path in (work / "s").rglob("*.safetensors"):
        path.unlink()
    for command, said in (("status", "1: 4 edits from 1.json"), ("log", "round 1: 4 edits from 1.json, by ft")):
        code = f"import sys; from crispedit import cli; cli._run(['session', '{command}', 's']); print(*sys.modules)"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        printed, modules = run.stdout.rstrip("\n").rsplit("\n", 1)
        assert said in printed
        assert not {"torch", "transformers", "safetensors"} & set(modules.split())


def test_a_damaged_file_is_named(work, capsys):
    program("edit", "s", "1.json")
    (patch,) = (work / "s" / ROUNDS).glob("*/patch.safetensors")
    content = patch.read_bytes()
    patch.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    capsys.readouterr()
    assert cli._run(["session", "status", "s", "--verify"]) == 2
    assert "1 files are damaged or missing" in capsys.readouterr().err
    assert cli._run(["session", "log", "s"]) == 0
