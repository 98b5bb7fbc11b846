"""What ends one process ends all: soon, with one line, and with nothing half-written; the same command then goes on.

No launcher ends those that are left over here: they notice by themselves, as they would on another host.
"""

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from crispedit import cli, halves, stages
from crispedit.plan_job import PlanJob
from crispedit.texts import text_batches
from families import tiny_model, tiny_tokenizer
from test_distributed import run
from together import ROWS, TEXTS

SETTINGS = "--texts texts.txt --layers 1,2 --epochs 6 --lr 0.004"
EDIT = f"edit model edits.json {SETTINGS} --out"
EVALUATE = "evaluate whole edits.json --base model --texts texts.txt --json"
CURVATURE = "curvature model --texts texts.txt --layers 1,2 --out"

ACCIDENTS = [  # each is begun where the one before was ended, but that whose model is there already
    {"name": "curvature", "command": f"{EDIT} resumed", "accident": "die", "place": "curvature", "rank": 0},
    {"name": "three", "command": f"{CURVATURE} x", "accident": "die", "place": "curvature", "rank": 0, "size": 3},
    {"name": "edit", "command": f"{EDIT} resumed", "accident": "die", "place": "edit", "rank": 1},
    {"name": "save", "command": f"{EDIT} resumed", "accident": "die", "place": "save", "rank": 0},
    {"name": "saved", "command": f"{EDIT} resumed", "accident": "die", "place": "saved", "rank": 1},
    {"name": "evaluate", "command": f"{EVALUATE} killed.json", "accident": "die", "place": "evaluate", "rank": 1},
]
DISK = {"name": "disk", "command": f"{EDIT} full", "accident": "full disk", "place": "save", "rank": 0}
HANG = {"name": "hang", "command": f"{EDIT} hung", "accident": "hang", "place": "edit", "rank": 1}


def prepare(directory, rows=ROWS):
    directory.mkdir(exist_ok=True, parents=True)
    tiny_model("llama").save_pretrained(directory / "model")
    tiny_tokenizer().save_pretrained(directory / "model")
    (directory / "edits.json").write_text(json.dumps(rows))
    (directory / "texts.txt").write_text("\n\n".join(TEXTS + [text.replace("mill", "ship") for text in TEXTS]))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """How all scenarios went, and where."""
    root = tmp_path_factory.mktemp("failures")
    prepare(root)
    for rank, rows in enumerate((ROWS, ROWS[:-1])):
        prepare(root / "hosts" / f"host{rank}", rows)
    (root / "hosts" / "host1" / "texts.txt").write_text("\n\n".join(TEXTS[1:]))
    own = [{"CRISPEDIT_CACHE": str(root / "cache" / name)} for name in ("whole", "resumed", "sharded", "again")]
    *begun, evaluate = ACCIDENTS
    lanes = {  # what goes on with something, or takes an edited model, follows it
        "whole": [
            {"name": "whole", "command": f"{EDIT} whole", "env": own[0], "counted": True},
            {**DISK, "env": own[0]},
            {**evaluate, "env": own[0]},
            {"name": "evaluated", "command": f"{EVALUATE} evaluated.json", "env": own[0]},
            {"name": "texts", "command": f"{CURVATURE} out", "env": own[0], "directory": str(root / "hosts")},
            {"name": "hosts", "command": f"{EDIT} out", "env": own[0], "directory": str(root / "hosts")},
            {"name": "session", "command": "session init model s"},
            {"name": "ask", "command": "ask model Hello"},
            {"name": "sharded", "command": f"{EDIT} sharded --shard", "env": own[2], "counted": True},
        ],
        "resumed": [
            *({**scenario, "env": own[1]} for scenario in begun),
            {"name": "resumed", "command": f"{EDIT} resumed", "env": own[1]},
        ],
        "again": [
            {**ACCIDENTS[0], "name": "shard killed", "command": f"{EDIT} again --shard", "env": own[3]},
            {"name": "again", "command": f"{EDIT} again --shard", "env": own[3]},
        ],
    }
    scenarios = [{"lane": lane, **scenario} for lane, some in lanes.items() for scenario in some]
    return root, run([{"size": 2, **scenario} for scenario in scenarios], root)


@pytest.mark.parametrize("stage", [scenario["name"] for scenario in ACCIDENTS])
def test_a_killed_process_ends_the_others(ended, stage):
    _, found = ended
    went = found[stage]
    rank = next(scenario["rank"] for scenario in ACCIDENTS if scenario["name"] == stage)
    assert went["statuses"][rank] == -signal.SIGKILL
    others = [status for other, status in enumerate(went["statuses"]) if other != rank]
    assert set(others) == {1}, went
    assert went["seconds"] < 60
    lines = [line for said in went["said"] for line in said.splitlines() if line.startswith("crispedit: ")]
    # who is first says it; where the store went with rank 0, two cannot know of each other
    assert 1 <= len(lines) <= len(others)
    assert all("has ended" in line or "cannot be reached" in line for line in lines)
    assert "Traceback" not in "".join(went["said"])


def test_nothing_is_half_written_and_the_same_command_goes_on(ended):
    root, found = ended
    assert found["whole"]["statuses"] == found["resumed"]["statuses"] == [0, 0], found
    assert "goes on after batch" in found["edit"]["said"][0], "the killed pass left its state"
    weights = [(root / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]
    left = {name for name in os.listdir(root) if not name.endswith((".out", ".err"))}
    files = {
        "model",
        "edits.json",
        "texts.txt",
        "cache",
        "scenarios.json",
        "scenarios.done.json",
        "hosts",
        "sharded",
        "again",
        "evaluated.json",
    }
    assert left == {*files, "whole", "resumed"}
    assert not os.listdir(root / "cache" / "resumed" / "passes")


def test_an_evaluation_on_the_command_line_writes_what_one_process_writes(ended, monkeypatch):
    root, found = ended
    assert found["evaluated"]["statuses"] == [0, 0], found["evaluated"]
    monkeypatch.chdir(root)
    assert cli._run(f"{EVALUATE} alone.json".split()) == 0
    texts = [(root / f"{name}.json").read_text() for name in ("evaluated", "alone")]
    (root / "alone.json").unlink()
    assert texts[0] == texts[1]
    assert not (root / "killed.json").exists()


def test_a_sharded_model_is_edited_as_a_whole_one(ended):
    """To 1e-5 of the change, in float32; the saved model is an ordinary one."""
    root, found = ended
    assert found["sharded"]["statuses"] == [0, 0], found["sharded"]
    base, whole, sharded = (load_file(root / name / "model.safetensors") for name in ("model", "whole", "sharded"))
    for name, tensor in base.items():
        off, change = sharded[name] - whole[name], whole[name] - tensor
        assert float(off.norm()) <= 1e-5 * float(change.norm()), name
    configs = [json.loads((root / name / "config.json").read_text()) for name in ("whole", "sharded")]
    assert configs[0] == configs[1]
    # the same keys: what one has computed the other finds
    keys = [{path.name for path in (root / "cache" / name / "curvature").iterdir()} for name in ("whole", "sharded")]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("shard", [False, True])
def test_what_moves_between_processes_is_what_was_planned(ended, shard, monkeypatch):
    """Within 1 %: a sharded tensor is padded to equal parts; scalars and answers, some kB, are left out.

    But for the proof of a sharded model, where it is 10 %: how many tokens are generated is an estimate.
    """
    root, _ = ended
    monkeypatch.chdir(root)
    monkeypatch.setenv("CRISPEDIT_CACHE", "none")
    monkeypatch.setattr(halves, "text_batches", partial(text_batches, batch_tokens=160))  # as the processes did
    monkeypatch.setattr(stages, "UNDECIDED", 1.0)  # a random model has nothing in common with its drafts
    named: dict[str, Any] = {"texts": Path("texts.txt"), "layers": "1,2", "settings": {"epochs": 6}}
    found = PlanJob(model="model", edits="edits.json", processes=2, shard=shard, **named).run().record()["stages"]
    planned = {name: stage["moved_bytes"] for name, stage in found.items()}
    for rank in range(2):
        moved = json.loads((root / f"{'sharded' if shard else 'whole'}.{rank}.out").read_text())
        for name in ("curvature", "diagonalise", "edit", "save"):
            assert moved.get(name, 0) == pytest.approx(planned[name], rel=0.01, abs=2048), name
        assert moved["else"] < 2048
        assert moved["proof"] == pytest.approx(planned["proof"], rel=0.1 if shard else 0.01, abs=8192)


def test_a_pass_of_a_sharded_model_goes_on_too(ended):
    """Each process from where it was: one that has less to do runs along."""
    root, found = ended
    assert -signal.SIGKILL in found["shard killed"]["statuses"]
    assert found["again"]["statuses"] == [0, 0], found["again"]
    assert "goes on after batch" in "".join(found["again"]["said"])
    weights = [(root / name / "model.safetensors").read_bytes() for name in ("sharded", "again")]
    assert weights[0] == weights[1]


def test_another_number_of_processes_begins_its_own_pass(ended):
    """And leaves alone what two have begun, whose sums are of other batches: they go on with it afterwards."""
    _, found = ended
    assert "goes on after batch" not in "".join(found["three"]["said"])
    assert "goes on after batch" in found["edit"]["said"][0]


def test_a_full_disk_ends_all_with_one_line(ended):
    _, found = ended
    assert found["disk"]["statuses"] == [2, 2], found["disk"]
    lines = [line for said in found["disk"]["said"] for line in said.splitlines() if line.startswith("crispedit: ")]
    assert lines == ["crispedit: cannot write 'full': No space left on device"]


def test_what_runs_in_one_process_says_so_once(ended):
    _, found = ended
    assert found["session"]["statuses"] == [2, 2]
    lines = [line for said in found["session"]["said"] for line in said.splitlines()]
    assert lines == ["crispedit: 'crispedit session' runs in one process: start it without a launcher"]


def test_only_the_main_process_prints(ended):
    root, found = ended
    assert found["ask"]["statuses"] == [0, 0], found["ask"]
    assert "Hello" in (root / "ask.0.out").read_text()
    assert (root / "ask.1.out").read_text() == ""


@pytest.mark.parametrize(("name", "what"), [("hosts", "the edits"), ("texts", "the texts")])
def test_other_files_on_another_host_are_named(ended, name, what):
    root, found = ended
    went = found[name]
    assert went["statuses"] == [2, 2], went
    (line,) = [line for said in went["said"] for line in said.splitlines() if line.startswith("crispedit: ")]
    assert f"crispedit: {what} of rank 1 (on " in line
    assert not (root / "hosts" / "host0" / "out").exists()


@pytest.mark.slow
def test_a_process_that_hangs_is_not_waited_for_for_ever(tmp_path):
    prepare(tmp_path)
    env = {"CRISPEDIT_TIMEOUT": "5", "CRISPEDIT_CACHE": str(tmp_path / "cache")}
    went = run([{**HANG, "size": 2, "env": env}], tmp_path)["hang"]
    assert went["statuses"] == [1, 1], went
    assert went["seconds"] < 60
    assert "did not come to 'sum' within 5 seconds" in went["said"][0]
