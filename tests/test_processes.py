"""What one of several processes has: against FSDP2 in two processes, what they measure, and counts by hand."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crispedit.assumed import Method
from crispedit.budget import DAMPING, estimate_need
from crispedit.costs import block_costs, recording_flops
from crispedit.drift_meter import DriftMeter
from crispedit.errors import ConfigError
from crispedit.forward import batch_size
from crispedit.models import edit_matrices
from crispedit.planning import plan_edit
from crispedit.priced import PricedCoordinates
from crispedit.processes import ALONE, Processes
from crispedit.replay import row_logits
from crispedit.rows import EditRow
from crispedit.spectrum import Spectrum
from crispedit.stages import Planner
from crispedit.subspace import Subspace
from crispedit.texts import row_batches
from crispedit.workload import Settings
from families import tiny_model
from reference import random_factor
from test_planning import GB, SETTINGS, WORK

SHARDED = """
import torch
from crispedit import distributed
from crispedit.models import edit_matrices
from crispedit.processes import Processes
from crispedit.sharding import shard_model
from families import tiny_model
distributed.start()
model = tiny_model("llama")
matrices = edit_matrices(model, [1, 2])
planned = Processes(2, True).weight_bytes(model, matrices, torch.float32)
shard_model(model, matrices, torch.device("cpu"))
held = sum(getattr(p, "_local_tensor", p).nbytes for p in set(model.parameters()))
print(planned, held)
distributed.stop()
"""


def stages(plan):
    return {stage.name: stage for stage in plan.stages}


def of(size: int, shard: bool = False, **changes):
    """A plan for GPUs, where nothing stays that was freed."""
    work = dataclasses.replace(WORK, on_cpu=False, processes=Processes(size, shard))
    return stages(plan_edit(work, dataclasses.replace(SETTINGS, **changes), 1000 * GB))


def test_a_process_holds_what_fsdp_leaves_it():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    said = []
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in running:
        said.append(process.communicate(timeout=120)[0].split()[-2:])
        assert process.returncode == 0
    assert all(planned == held for planned, held in said), said


def test_what_is_gathered_by_hand():
    """What is in no block, and two blocks without their edited matrices."""
    model = tiny_model("llama")
    matrices = edit_matrices(model, [3])
    blocks = model.model.layers
    rest = sum(p.numel() for p in set(model.parameters())) - sum(p.numel() for b in blocks for p in b.parameters())
    largest = 2 * sum(p.numel() for p in blocks[0].parameters())
    assert Processes(3, True).gathered_bytes(model, matrices, torch.bfloat16) == 2 * (rest + largest)
    assert Processes(3).gathered_bytes(model, matrices, torch.bfloat16) == 0
    assert ALONE.weight_bytes(model, matrices, torch.float32) == 4 * sum(p.numel() for p in set(model.parameters()))


def test_work_is_shared_as_processes_share_it():
    three = Processes(3)
    assert (three.part(32), three.part(3), three.asking, Processes(3, True).asking) == (11, 1, 3, 1)
    assert three.busiest([[1], [2, 2], [9], [1], [1]]) == [[9]]
    assert three.owned("abcd", [1.0, 8.0, 2.0, 2.0]) == [["b"], ["a", "c"], ["d"]]


@pytest.mark.parametrize(("size", "shard"), [(0, False), (-1, False), (1, True)])
def test_what_are_no_processes_is_refused(size, shard):
    with pytest.raises(ConfigError):
        Processes(size, shard)


def test_what_moves_by_hand():
    """Edited matrices exchanged in float32; of a sharded model blocks, in its own dtype, without what is edited."""
    assert all(stage.moved == 0 for stage in of(1).values())
    model, steps = WORK.model, -(-len(WORK.rows) // SETTINGS.batch_size) * WORK.epochs
    matrices = edit_matrices(model, SETTINGS.layers)
    edited = sum(matrix.parameter.numel() for matrix in matrices)
    whole, parts = of(2, dtype=torch.bfloat16), of(2, shard=True, dtype=torch.bfloat16)
    assert whole["edit"].moved == 4 * edited * (2 * steps + 1)
    assert whole["proof"].moved == 4 * edited
    assert whole["curvature"].moved == 2 * sum(4 * n * n for matrix in matrices for n in matrix.shape)
    assert whole["save"].moved == 0
    assert parts["save"].moved == 2 * (sum(p.numel() for p in set(model.parameters())) - edited)
    assert of(2, shard=True, save="delta")["save"].moved == 0
    *blocks, rest = Processes(2, True).divided(model, matrices)
    first = matrices[0].layer
    below, above, every = sum(blocks[: first + 1]), sum(blocks[first:]), sum(blocks)
    put_together = steps * (2 * above + rest) + len(WORK.recording()) * below + (every + rest) + above
    assert parts["edit"].moved - whole["edit"].moved == 2 * put_together
    budget = of(2, shard=True, method=Method(budget=True))["edit"]
    assert budget.moved > of(2, shard=True, method=Method(update="priced"))["edit"].moved


def test_processes_share_flops_and_do_some_again():
    one, two = of(1), of(2)
    assert two["curvature"].flops_of_all == one["curvature"].flops_of_all == one["curvature"].flops
    assert 0.5 <= two["curvature"].flops / one["curvature"].flops < 0.7  # five batches a half: three and two
    assert two["diagonalise"].flops < one["diagonalise"].flops == two["diagonalise"].flops_of_all
    assert 0.5 < two["edit"].flops / one["edit"].flops < 1  # rules and recording are everywhere
    assert two["edit"].flops_of_all > one["edit"].flops_of_all
    assert two["save"].flops == one["save"].flops == two["save"].flops_of_all


def test_a_shard_takes_less_memory_and_asks_everywhere():
    whole, parts = of(8), of(8, shard=True)
    assert all(parts[name].num_bytes < whole[name].num_bytes for name in whole)
    assert parts["proof"].flops_of_all == 8 * parts["proof"].flops
    assert parts["save"].flops == 0  # it is not asked


@pytest.mark.parametrize("shard", [False, True])
def test_drift_is_measured_by_all_processes(shard):
    """Each a part of it, or, where each has a part of the model, all of it.

    A part of the sample lies outside a process's part of all texts: it is recorded for itself. What the edits need is
    estimated everywhere.
    """
    settings = dataclasses.replace(SETTINGS, method=Method(budget=True))

    def edit_stage(size: int, shard: bool, measured: bool):
        work = dataclasses.replace(WORK, on_cpu=False, processes=Processes(size, shard))
        planner = Planner(work, settings, 1000 * GB, None)
        if not measured:  # the same metric in the same bases
            planner.settings = dataclasses.replace(settings, method=Method(update="priced"))
        return planner._edit()

    budget, priced = (edit_stage(2, shard, measured) for measured in (True, False))
    alone = edit_stage(1, False, True).flops - edit_stage(1, False, False).flops
    assert budget.flops_of_all - priced.flops_of_all == 2 * (budget.flops - priced.flops)
    if shard:
        assert budget.flops - priced.flops == alone
    else:
        matrices = edit_matrices(WORK.model, SETTINGS.layers)
        sample = recording_flops(WORK.model, matrices, [batch_size([EditRow((0,) * 256, 1)] * 4, None)])
        needed = Planner(WORK, settings, GB, None)._needed_flops()
        assert 2 * (budget.flops - priced.flops) - alone == 2 * sample + needed


def test_what_edits_need_costs_what_torch_counts():
    """But for the MLP of the last block, which is counted at every position and run before targets only."""
    model = tiny_model("llama").requires_grad_(False)
    model.set_attn_implementation("eager")
    matrices, rows = edit_matrices(model, [1, 2]), [EditRow(tuple(range(n, n + 12)), 8) for n in range(20)]
    rules = []
    for matrix in matrices:
        matrix.parameter.requires_grad_()
        G, A = (random_factor(torch.ones(size).double(), seed=size).float() for size in matrix.shape)
        rules.append(PricedCoordinates(Subspace.of(Spectrum.of(A, G), 0.5), 0.0, DAMPING))
    with FlopCounterMode(display=False) as counter:
        estimate_need(model, matrices, rules, rows)
    turned = sum(2 * d_out * d_in * (d_out + d_in) for d_out, d_in in (matrix.shape for matrix in matrices))
    settings = Settings(
        layers=(1, 2), dtype=torch.float32, batch_size=32, mapped=False, kind="dense", method=Method(budget=True)
    )
    found = Planner(dataclasses.replace(WORK, model=model, rows=rows), settings, GB, None)._needed_flops()
    without_loss = sum(row.prompt_length - 1 for row in rows)
    assert found - block_costs(model)[-1].mlp * without_loss == counter.get_total_flops() - turned


def test_measuring_drift_costs_what_torch_counts():
    """All texts first, after epochs 1 and 9, and last; a sample after each. The base model runs once: it is kept."""
    model = tiny_model("llama").requires_grad_(False)
    model.set_attn_implementation("eager")
    matrices = edit_matrices(model, [1, 2])
    batches = row_batches(model, [[first, *range(5, 16)] for first in range(40)])
    epochs = 10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meter = DriftMeter(model, matrices, batches)
        meter.measure()
        for _ in range(epochs):
            meter.estimate()
        meter.measure()
    with FlopCounterMode(display=False) as checked, torch.no_grad():  # a few rows of a replay are held against it
        logits = row_logits(model, matrices, meter._logits.rows, pack=False)
    with FlopCounterMode(display=False) as recorded, torch.no_grad():
        logits.record(matrices[0])
    lengths = [batch.mask.sum(1).tolist() for batch in batches]
    work = dataclasses.replace(WORK, model=model, held_out=lengths, epochs=epochs)
    settings = Settings(
        layers=(1, 2), dtype=torch.float32, batch_size=32, mapped=False, kind="dense", method=Method(budget=True)
    )
    found = Planner(work, settings, GB, None)._metering()
    assert found.flops == counter.get_total_flops() - (checked.get_total_flops() - recorded.get_total_flops())
    assert found.kept_bytes == meter.num_bytes
