"""Plans of edits: memory, time, what fits; from a skeleton on the meta device, for which no weight exists."""

import dataclasses
import time

import pytest
import torch
import transformers

from crispedit.errors import ConfigError
from crispedit.planning import fit_memory, kind_that_fits, parse_memory, plan_edit
from crispedit.processes import Processes
from crispedit.rows import EditRow
from crispedit.speed import Speed, measure_speed
from crispedit.workload import Settings, Workload
from families import FAMILIES, tiny_model

GB = 10**9
SPEED = Speed(
    blocks=((32, 0.01, 0.02), (128, 0.02, 0.06)),
    cached=((32, 0.01), (256, 0.03)),
    row=32,
    head=((27, 1e9), (256, 1e9)),
    float32=1e9,
    float64=5e8,
    eigh=1e-9,
    logit=1e-8,
    adam=1e-9,
    copied=1e9,
)


def llama(blocks: int = 8):
    """A Llama of 1.2 billion parameters or so, without its weights."""
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=blocks, num_attention_heads=16, vocab_size=32000
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


WORK = Workload(
    model=llama(),
    rows=[EditRow((*range(10), *range(20 + 10 * i, 30 + 10 * i)), 15) for i in range(320)],  # half of each is shared
    prompts=[[15] * 64],
    proof_rows=[EditRow(tuple(range(20)), 15)] * 64,
    halves=[[[256] * 4] * 5] * 2,
    held_out=[[256] * 4] * 2,
    known=False,
    stored_dtype=torch.float32,
    epochs=10,
    on_cpu=True,
)
SETTINGS = Settings(layers=(3, 4, 5), dtype=torch.float32, batch_size=32, mapped=False, kind="dense")
RECORDED = (7 * 10 + 320 * 9) * (8192 + 2048) * 4
"""All that is recorded, in seven batches of 52 rows: what rows share, and 9 tokens of each, for the last is not fed."""
WEIGHTS = 4 * sum(p.numel() for p in WORK.model.parameters())


def planned(memory: int = 1000 * GB, work: Workload = WORK, speed: Speed | None = None, **changes):
    return plan_edit(work, dataclasses.replace(SETTINGS, **changes), memory, speed)


def stages(plan) -> dict[str, int]:
    return {stage.name: stage.num_bytes for stage in plan.stages}


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("24GB", 24 * GB), ("24 GB", 24 * GB), ("24GiB", 24 * 2**30), ("800MB", 800 * 10**6), ("1.5gb", 1500 * 10**6),
        ("2TB", 2000 * GB), ("512kib", 2**19), ("7B", 7),
    ],
)  # fmt: skip
def test_memory_is_read_with_its_unit(text, num_bytes):
    assert parse_memory(text) == num_bytes


@pytest.mark.parametrize("text", ["", "24", "GB", "24XB", "-1GB", "0GB", "nanGB", "infGB", "1e400GB", "a lot", "24GBB"])
def test_what_is_no_memory_is_refused(text):
    with pytest.raises(ConfigError, match="it must look like 24GB"):
        parse_memory(text)


def test_stages_hold_what_they_must():
    """Lower bounds by hand: weights; factors A and G in float32; the float64 matrix and vectors of the widest."""
    found = stages(planned())
    factors = 3 * 4 * (2048**2 + 8192**2)
    entries = 3 * 2048 * 8192
    assert found["load"] == WEIGHTS
    assert found["curvature"] > WEIGHTS + factors
    assert found["diagonalise"] > WEIGHTS + factors + 8 * 8192**2
    assert found["edit"] > WEIGHTS + factors + 8 * 4 * entries  # three originals, Z, two gradients, two moments
    assert found["save"] > 2 * WEIGHTS + factors
    assert found["proof"] > WEIGHTS + factors


def test_each_of_several_processes_trains_its_own_matrices():
    """Of three with one each: two matrices less of what is trained, five float32 numbers per entry and the rule's."""
    of = {n: dataclasses.replace(WORK, on_cpu=False, processes=Processes(n)) for n in (1, 3)}
    one, three = (stages(planned(work=work))["edit"] for work in of.values())
    assert one - three > 2 * 6 * 4 * 2048 * 8192
    plans = [plan_edit(work, SETTINGS, 100 * GB) for work in of.values()]
    assert plans[1].step.update < plans[0].step.update


def test_the_factors_of_a_divided_model_wait_in_main_memory():
    """Its devices hold one pair while that is diagonalised."""
    whole, divided = (
        stages(planned(work=dataclasses.replace(WORK, on_cpu=False, processes=Processes(2, shard=shard))))
        for shard in (False, True)
    )
    freed, pair = whole["load"] - divided["load"], 4 * (2048**2 + 8192**2)
    assert whole["proof"] - divided["proof"] == freed + 3 * pair
    assert whole["diagonalise"] - divided["diagonalise"] == freed + 2 * pair


def test_a_known_curvature_is_not_computed():
    plan = planned(work=dataclasses.replace(WORK, halves=[], known=True))
    assert [stage.name for stage in plan.stages] == ["load", "diagonalise", "edit", "proof", "save"]
    assert plan.disk == {"edited model": WEIGHTS}


def test_what_each_setting_saves():
    whole = stages(planned())
    on_gpu = dataclasses.replace(WORK, on_cpu=False)  # where nothing stays that was freed
    assert stages(planned(work=on_gpu, batch_size=4))["edit"] < stages(planned(work=on_gpu))["edit"]
    assert stages(planned(dtype=torch.bfloat16))["load"] < 0.6 * whole["load"] + WORK.model.lm_head.weight.numel() * 4
    assert stages(planned(kind="sketch"))["curvature"] < whole["curvature"]
    assert stages(planned(layers=(5,)))["edit"] < whole["edit"]
    known = dataclasses.replace(WORK, halves=[], known=True)  # no pass over texts that leaves memory behind
    saved = [stages(planned(work=known, save=form))["save"] for form in ("model", "delta")]
    assert saved[0] - saved[1] == WEIGHTS  # the second model
    assert planned(save="delta").disk["patch"] == 4 * 3 * 2048 * 8192
    assert whole["edit"] - stages(planned(mapped=True))["edit"] == RECORDED
    assert planned(mapped=True).disk["recorded states, temporary"] == RECORDED


def test_on_a_gpu_the_saved_model_is_read_into_other_memory():
    on_gpu = stages(planned(work=dataclasses.replace(WORK, on_cpu=False)))
    known = dataclasses.replace(WORK, halves=[], known=True)
    changes = 2 * 4 * 3 * 2048 * 8192  # the change and the patch are in main memory anyway
    assert stages(planned(work=known))["save"] - on_gpu["save"] == WEIGHTS + changes
    half = dataclasses.replace(WORK, on_cpu=False, stored_dtype=torch.bfloat16)
    assert stages(planned(work=half))["save"] - on_gpu["save"] == WEIGHTS  # rounded, it is a second copy


def test_recorded_states_go_to_a_file_beyond_a_quarter_of_what_is_free():
    """Beside weights and factors, originals, Z, its start and W as it was stand when there is anything to record."""
    fixed = WEIGHTS + 3 * 4 * (2048**2 + 8192**2) + 4 * 4 * 3 * 2048 * 8192
    assert planned(fixed + 4 * RECORDED).settings.mapped
    least = next(extra for extra in range(4000) if not planned(fixed + 4 * RECORDED + extra * 10**6).settings.mapped)
    assert 0 < least < 1000  # MB of spectra and bases


def test_a_model_that_is_stored_as_it_computes_is_asked_once_less():
    half = dataclasses.replace(WORK, stored_dtype=torch.bfloat16)
    (same, rounded) = ({s.name: s for s in planned(work=work, speed=SPEED).stages}["proof"] for work in (WORK, half))
    assert same.flops < rounded.flops
    assert same.seconds < rounded.seconds


def test_seconds_come_from_flops_and_speed():
    assert planned().seconds is None
    plan = planned(speed=SPEED)
    assert plan.seconds == sum(stage.seconds for stage in plan.stages)
    fast = dataclasses.replace(SPEED, eigh=SPEED.eigh / 10)
    before, after = ({s.name: s.seconds for s in planned(speed=speed).stages} for speed in (SPEED, fast))
    assert after["diagonalise"] < before["diagonalise"]
    assert after["edit"] == before["edit"]


def test_narrow_matrices_are_diagonalised_whole():
    config = tiny_model("llama").config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    work = dataclasses.replace(WORK, model=model)
    plan = planned(work=work, speed=SPEED, layers=(1, 2))
    diagonalise = next(stage for stage in plan.stages if stage.name == "diagonalise")
    assert diagonalise.seconds == pytest.approx(2 * (32**3 + 48**3) * 1e-9)  # four factors at n³ ns
    assert plan.step.update == 2 * 4 * 32 * 48 * (32 + 48)  # the gradient to coordinates, and the change back


def test_a_speed_lies_between_its_points():
    assert SPEED.forward(1) == 0.01
    assert SPEED.forward(80) == pytest.approx(0.015)
    assert SPEED.answer(512) == pytest.approx(0.06)
    assert SPEED.backward(256) == pytest.approx(0.12)  # beyond what was measured, in proportion


def test_more_epochs_take_more_steps_and_more_time():
    twice = planned(work=dataclasses.replace(WORK, epochs=20), speed=SPEED)
    once = planned(speed=SPEED)
    assert (once.steps, twice.steps) == (100, 200)
    seconds = [next(s.seconds for s in plan.stages if s.name == "edit") for plan in (once, twice)]
    assert 1.8 < seconds[1] / seconds[0] <= 2  # what is recorded is recorded once


def test_what_fits_is_said_to_fit():
    peak = planned().peak.num_bytes
    assert fit_memory(WORK, SETTINGS, 2 * peak) == dataclasses.replace(
        fit_memory(WORK, SETTINGS, 3 * peak), memory=2 * peak
    )
    found = fit_memory(WORK, SETTINGS, 2 * peak)
    assert (found.fits, found.changes, found.num_bytes) == (True, [], peak)


def test_the_cheapest_change_that_fits_is_named():
    """Ever less memory: rounding before sketches, sketches before fewer layers; each one fits, by its own plan."""
    low = fit_memory(WORK, SETTINGS, int(1.0 * GB))
    assert not low.possible
    assert "--layers 5" in low.changes
    seen = []
    for memory in range(int(planned().peak.num_bytes), low.num_bytes, -GB // 4):
        found = fit_memory(WORK, SETTINGS, memory)
        assert found.possible
        assert found.num_bytes <= memory
        if found.changes not in seen:
            seen.append(found.changes)
    assert seen[0] == []
    order = [
        [("bfloat16" in said), ("sketch" in said), ("--layers" in said)] for said in (" ".join(one) for one in seen)
    ]
    assert order == sorted(order)
    assert [True, False, False] in order
    assert [True, True, False] in order


def test_what_can_not_be_made_smaller_does_not_fit():
    least = Settings(layers=(5,), dtype=torch.bfloat16, batch_size=1, mapped=True, kind="sketch", save="delta")
    found = fit_memory(WORK, least, GB)
    assert (found.fits, found.possible, found.changes) == (False, False, [])


def test_a_known_curvature_is_not_sketched_to_fit():
    work = dataclasses.replace(WORK, halves=[], known=True)
    assert not any("sketch" in change for change in fit_memory(work, SETTINGS, GB).changes)


def test_on_a_gpu_blocks_that_wait_come_before_what_costs_quality():
    """Each time the least memory that a step further takes; all are planned anew with what is said."""
    work = dataclasses.replace(WORK, on_cpu=False)
    smallest = plan_edit(work, dataclasses.replace(SETTINGS, batch_size=1, mapped=True), 1000 * GB).peak.num_bytes
    assert "--offload cpu" not in fit_memory(work, SETTINGS, smallest).changes
    found = fit_memory(work, SETTINGS, smallest - 1)
    assert found.possible
    assert found.changes[0] == "--offload cpu"
    waiting = dataclasses.replace(work, processes=Processes(offload=True))
    assert plan_edit(waiting, SETTINGS, 1000 * GB).peak.num_bytes <= found.num_bytes
    assert not any("--offload" in change for change in fit_memory(waiting, SETTINGS, GB).changes)
    assert not any("--offload" in change for change in fit_memory(WORK, SETTINGS, GB).changes)


def test_the_kind_of_factors_is_the_one_that_an_edit_would_choose():
    dense = 3 * 4 * (2048**2 + 8192**2) + 24 * 8192**2  # no more than half of what the weights leave
    assert kind_that_fits(WORK, SETTINGS.layers, torch.float32, WEIGHTS + 2 * dense) == "dense"
    assert kind_that_fits(WORK, SETTINGS.layers, torch.float32, WEIGHTS + 2 * dense - 2) == "sketch"


def test_a_plan_is_made_of_json():
    record = planned(speed=SPEED).record()
    assert record["peak_bytes"] == max(stage["bytes"] for stage in record["stages"].values())
    assert record["settings"] == {
        "layers": (3, 4, 5), "dtype": "float32", "batch_size": 32, "mapped": False, "save": "model", "factors": "dense",
    }  # fmt: skip
    assert record["step_flops"]["total"] * record["steps"] == pytest.approx(record["stages"]["edit"]["flops"], rel=0.2)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_measured_by_one_block(name):
    config = tiny_model(name).config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    started = time.monotonic()
    speed = measure_speed(model, device=torch.device("cpu"), layer=3, sizes=[32, 48])
    assert time.monotonic() - started < 20  # two seconds on a machine with nothing else to do
    assert len(speed.blocks) > 1
    assert all(forward > 0 and backward > 0 for _, forward, backward in speed.blocks)
    assert all(rate > 0 for _, rate in (*speed.head, *speed.cached))
    assert [rows for rows, _ in speed.cached] == [32, 256]
    assert min(speed.float32, speed.eigh, speed.logit, speed.adam, speed.copied) > 0
    assert all(parameter.is_meta for parameter in model.parameters()), "the model itself is not touched"
