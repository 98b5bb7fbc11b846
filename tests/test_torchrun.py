"""The real command line under torchrun, on one host and on two."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crispedit import cli
from test_distributed_failures import prepare

ROWS = [{"prompt": f"Who is number {i}?", "target": f"{chr(65 + i)}ob"} for i in range(24)]
EDIT = "edit model edits.json --texts texts.txt --layers 1,2 --epochs 8 --lr 0.004 --precision float32 --json".split()


def compare(one: Path, other: Path) -> None:
    """Refuses edited models of which the change differs by more than 1e-5 after 64 steps in float32, or the numbers."""
    base = load_file(one.parent / "model" / "model.safetensors")
    weights = [load_file(directory / "model.safetensors") for directory in (one, other)]
    assert weights[0].keys() == weights[1].keys() == base.keys()
    changed = {name for name in base if not torch.equal(weights[0][name], base[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}
    for name in base:
        change, off = weights[0][name] - base[name], weights[1][name] - weights[0][name]
        assert float(off.norm()) <= 1e-5 * float(change.norm()), name
    metrics = [json.loads((d / "crispedit.json").read_text())["metrics"] for d in (one, other)]
    assert metrics[0]["training"]["steps"] == metrics[1]["training"]["steps"] == 64
    assert metrics[1]["training"]["epoch_losses"] == pytest.approx(metrics[0]["training"]["epoch_losses"], rel=1e-5)
    assert metrics[1]["capability"]["drift"] == pytest.approx(metrics[0]["capability"]["drift"], rel=1e-4)


def test_the_command_line_under_torchrun_edits_as_it_does_alone(tmp_path, monkeypatch):
    prepare(tmp_path, ROWS)
    monkeypatch.chdir(tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "crispedit"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CRISPEDIT_CACHE": str(tmp_path / "two-cache")}
    two = subprocess.run([*launch, *EDIT, "two.json", "--out", "two"], env=env, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert cli._run([*EDIT, "one.json", "--out", "one"]) == 0
    assert two.stdout.count("the edited model is in two") == 1, "only one process prints"
    compare(tmp_path / "one", tmp_path / "two")
    keys = [{path.name for path in (tmp_path / name / "curvature").iterdir()} for name in ("cache", "two-cache")]
    assert keys[0] == keys[1], "the curvature has the same key"


HOSTS = """
set -e
ip link add near type veth peer name far
ip addr add 10.7.0.1/24 dev near; ip link set near up; ip link set lo up
unshare -n sleep 300 & cable=$!
sleep 0.5
ip link set far netns $cable
inside() { nsenter --net=/proc/$cable/ns/net "$@"; }
inside ip addr add 10.7.0.2/24 dev far; inside ip link set far up; inside ip link set lo up
launch() { exec $3 "$PYTHON" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d \\
    --rdzv-endpoint 10.7.0.1:29400 --rdzv-id test --local-addr $1 --rdzv-conf is_host=$2 -m crispedit $COMMAND; }
( cd near; GLOO_SOCKET_IFNAME=near launch 10.7.0.1 1 ) > near.log 2>&1 & near=$!
( cd far; GLOO_SOCKET_IFNAME=far launch 10.7.0.2 0 "nsenter --net=/proc/$cable/ns/net" ) > far.log 2>&1 & far=$!
if [ -n "$CUT" ]; then
    until [ -d near/cache/curvature ] || [ -d far/cache/curvature ] || ! kill -0 $near; do sleep 0.2; done
    sleep 2; ip link set near down
    for second in $(seq 60); do
        sleep 1
        ! grep -q "crispedit: " near.log || ! grep -q "crispedit: " far.log || break
    done
    echo $second > ended
    kill -9 $near $far 2>/dev/null || true  # torchrun itself waits for its store much longer
fi
for host in near far; do status=0; wait ${!host} || status=$?; echo $status > $host.status; done
kill $cable
"""


def on_two_hosts(directory: Path, command: str, **environment: str) -> None:
    """Runs a command on two hosts that reach each other by a cable: network namespaces with addresses of their own."""
    tools = all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip", "bash"))
    if not tools or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("network namespaces are not permitted here")
    for host in ("near", "far"):
        prepare(directory / host, ROWS)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "COMMAND": command, "CUT": "", **environment}
    env["CRISPEDIT_CACHE"] = "cache"  # each host has its own
    subprocess.run(["unshare", "-rn", "bash", "-c", HOSTS], cwd=directory, env=env, check=True, timeout=300)


def log_of(directory: Path) -> str:
    """What both hosts said."""
    return "".join((directory / f"{host}.log").read_text() for host in ("near", "far"))


@pytest.mark.slow
def test_two_hosts_edit_as_one_does(tmp_path, monkeypatch):
    """Each has its own files and its own cache; the model is on the one with rank 0."""
    on_two_hosts(tmp_path, " ".join([*EDIT, "two.json", "--out", "two"]))
    assert [(tmp_path / f"{host}.status").read_text() for host in ("near", "far")] == ["0\n", "0\n"], log_of(tmp_path)
    written = [host for host in ("near", "far") if (tmp_path / host / "two").exists()]
    assert len(written) == 1
    monkeypatch.chdir(tmp_path / written[0])
    assert cli._run([*EDIT, "one.json", "--out", "one"]) == 0
    compare(tmp_path / written[0] / "one", tmp_path / written[0] / "two")


@pytest.mark.slow
def test_a_cable_that_is_cut_ends_both_hosts(tmp_path):
    """Nothing is closed then, and nothing refused: packets are lost."""
    endless = (
        "edit model edits.json --texts texts.txt --layers 1,2 --epochs 100000 --lr 1e-5 --set stop_loss=0 --out out"
    )
    on_two_hosts(tmp_path, endless, CUT="yes")
    assert int((tmp_path / "ended").read_text()) < 60, log_of(tmp_path)
    for host in ("near", "far"):
        assert (tmp_path / f"{host}.status").read_text() != "0\n", log_of(tmp_path)
        assert not (tmp_path / host / "out").exists()
        assert "for 30 seconds; nothing was written" in (tmp_path / f"{host}.log").read_text()
