"""``session edit`` killed in every stage of a round and given again; benchmarks/crash.py does it a hundred times."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from crispedit import cli
from crispedit.bundled import world
from crispedit.models import load_model
from crispedit.store import HEADS, ROUNDS, Store

SIGNS = {
    "files of the round": lambda session, before: set(os.listdir(session / ROUNDS)) - before,
    "joined patch": lambda session, before: set(os.listdir(session / HEADS)) - before,
    "renamed": lambda session, before: {
        name for name in os.listdir(session / ROUNDS) if not name.startswith(".") and name not in before
    },
}
"""What is seen in the directory when a stage begins."""


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = world.edit_rows("eval")
    for number in (1, 2):
        (tmp_path / f"{number}.json").write_text(json.dumps(rows[4 * number : 4 * number + 4]))
    fast = "--set", "epochs=2", "--set", "lr=0.002", "--layers", "6", "--samples", "20"
    assert cli._run(["session", "init", "bundled", "killed", *fast]) == 0
    shutil.copytree("killed", "alone")

    def edit(session, number):
        return subprocess.Popen([sys.executable, "-m", "crispedit", "session", "edit", session, f"{number}.json"])

    def num_rounds():
        assert cli._run(["session", "status", "killed", "--json", "status.json"]) == 0
        return len(json.loads((tmp_path / "status.json").read_text())["rounds"])

    left, signs = [], [*SIGNS, None]
    while (number := num_rounds() + 1) <= 2:
        process, sign = edit("killed", number), signs.pop(0) if signs else None
        before = {*os.listdir(tmp_path / "killed" / ROUNDS), *os.listdir(tmp_path / "killed" / HEADS)}
        while sign is not None and process.poll() is None and not SIGNS[sign](tmp_path / "killed", before):
            time.sleep(0.001)
        if sign is not None:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            with Store.reading(tmp_path / "killed") as store:
                left += store.strays()
        assert process.wait() in (0, -signal.SIGKILL)
    for number in (1, 2):
        assert edit("alone", number).wait() == 0

    with Store.writing(tmp_path / "killed") as killed, Store.reading(tmp_path / "alone") as alone:
        assert left
        for name in left:
            assert any("interrupted command had left" in entry and name in entry for _, entry in killed.entries())
        logs = [[entry for _, entry in one.entries() if entry.startswith("round")] for one in (killed, alone)]
        assert logs[0] == logs[1]
        assert len(logs[0]) == 2
        assert killed.strays() == killed.damaged() == []
        counted = {*killed.files(), "session.db", "session.lock"}
        for number in (1, 2):
            for name in ("patch.safetensors", "curvature/factors.safetensors"):
                assert killed.path(number, name).read_bytes() == alone.path(number, name).read_bytes()
    there = tmp_path / "killed"
    assert {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()} == counted
    models = []
    for name in ("killed", "alone"):
        assert cli._run(["session", "export", name, "--out", f"{name}-model"]) == 0
        models.append(load_model(f"{name}-model").model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
