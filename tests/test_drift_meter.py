"""Drift is what the whole model says, measured on what the edit can change alone."""

import logging

import pytest
import torch

from crispedit import distributed, drift_meter, ranks, remembered, room
from crispedit.capability import logits_of, logits_with, measure_drift
from crispedit.drift_meter import DriftMeter
from crispedit.models import edit_matrices
from crispedit.remembered import Remembered
from crispedit.replay import STARTS, RowLogits, row_logits
from crispedit.rows import EditRow
from crispedit.texts import row_batches
from families import tiny_model
from reference import relative, tiny_llama


def some_batches(model, *, count=40):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 60, (4 + n % 7,), generator=generator).tolist() for n in range(count)]
    return row_batches(model, rows, batch_tokens=64)


def moved(matrices, size=0.05, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for matrix in matrices:
        noise = torch.randn(matrix.shape, generator=generator)
        matrix.weight.add_((size * matrix.weight.float().std() * noise).to(matrix.weight.dtype))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", [[1, 2], [3]], ids=["from the middle", "the last alone"])
@torch.no_grad()
def test_it_is_the_drift_of_the_whole_model(family, layers):
    model = tiny_model(family)
    matrices, batches = edit_matrices(model, layers), some_batches(model)
    originals = {matrix.name: matrix.weight.clone() for matrix in matrices}
    meter = DriftMeter(model, matrices, batches)
    assert meter._logits.start == "matrix"
    assert meter._base.ended
    for seed in (1, 2):
        moved(matrices, seed=seed)
        expected = measure_drift(logits_with(model, matrices, originals), logits_of(model), batches)
        assert expected.drift > 1e-6
        # float32 logits, off by about 1e-6 of their size: of drift, a difference, that is more
        assert meter.measure() == pytest.approx((expected.drift, expected.loss_base), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_that_has_not_changed_has_not_drifted(dtype):
    """In lower precision two ways to the same logits would already be some 1e-4 nats apart."""
    model = tiny_llama(dtype, layers=4)
    meter = DriftMeter(model, edit_matrices(model, [1, 2]), some_batches(model))
    assert meter.measure()[0] < 1e-9
    assert meter.estimate() < 1e-9


@torch.no_grad()
def test_nothing_below_is_run_again_and_the_base_not_at_all():
    model, runs = tiny_llama(layers=4), []
    meter = DriftMeter(model, edit_matrices(model, [2, 3]), some_batches(model))
    for number, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(lambda *_, number=number: runs.append(number))
    meter.measure()
    assert set(runs) == {3}
    assert len(runs) == len(meter._whole)


@torch.no_grad()
def test_estimates_are_of_a_sample_and_measured_on_all_now_and_then(monkeypatch):
    """A sample is multiplied by what all texts said of it, so that it errs only in how drift has moved since."""
    monkeypatch.setattr(drift_meter, "SAMPLE", 4)
    model = tiny_llama()
    matrices, batches = edit_matrices(model, None), some_batches(model)
    meter = DriftMeter(model, matrices, batches)
    base = {id(batch): logits_of(model)(batch) for batch in batches}
    assert meter.measure()[0] < 1e-9
    drifts = []
    for number in range(drift_meter.WHOLE + 1):
        moved(matrices, size=0.02, seed=number)
        expected = measure_drift(lambda batch: base[id(batch)], logits_of(model), batches)
        estimate = meter.estimate()
        drifts.append((estimate, expected.drift))
        assert estimate == pytest.approx(expected.drift, rel=0.5)
        if number in (0, drift_meter.WHOLE):
            assert estimate == pytest.approx(expected.drift, rel=1e-4)  # the same but for rounding
    assert any(abs(estimate / drift - 1) > 1e-3 for estimate, drift in drifts)
    assert meter.measure() == pytest.approx((expected.drift, expected.loss_base), rel=1e-4)


@torch.no_grad()
def test_every_process_measures_its_share_and_all_of_it_is_there(monkeypatch):
    """Two halves, as two processes have them, against the whole."""
    model = tiny_llama(layers=4)
    matrices, batches = edit_matrices(model, [1, 2]), some_batches(model)
    parts, kept = [], []
    meters = []
    for rank, size in ((0, 2), (1, 2), (0, 1)):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(ranks, "size", lambda size=size: size)
        meters.append(DriftMeter(model, matrices, batches))
    kept = [set(meter._batches) for meter in meters]
    assert kept[0] | kept[1] == kept[2]
    assert not kept[0] & kept[1]
    assert meters[0].num_bytes < meters[2].num_bytes
    moved(matrices)
    for meter in meters:
        parts.append(
            {n: meter._logits(meter._batches[n])[0] - as_logits(meter._base(meter._place[n])) for n in meter._batches}
        )
    for number, whole in parts[2].items():
        half = next(part[number] for part in parts[:2] if number in part)
        assert relative(half, whole) < 1e-5  # float32


def test_a_process_that_has_no_texts_keeps_none_and_the_others_wait_for_nothing(monkeypatch):
    """Of fewer batches than processes: what is replayed of a share is nobody else's business."""
    model = tiny_llama(layers=4)
    batches = some_batches(model)[:1]

    def waits(*_, **__):
        raise AssertionError("others have no such texts, and would not come")

    for name in ("gather", "sum_tensors"):
        monkeypatch.setattr(distributed, name, waits)
    monkeypatch.setattr(ranks, "size", lambda: 2)
    kept = []
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        kept.append(DriftMeter(model, edit_matrices(model, [1, 2]), batches).num_bytes)
    assert kept[0] > 0
    assert kept[1] == 0


# ---------------------------------------------------------------- what a model said


def as_logits(hidden):
    """The logits that hidden states stand for, (targets, vocabulary), in the model's dtype."""
    return hidden.head(hidden.states)


def some_rows():
    generator = torch.Generator().manual_seed(3)
    return [EditRow(tuple(torch.randint(2, 60, (5 + n,), generator=generator).tolist()), 1 + n % 3) for n in range(6)]


@pytest.mark.parametrize("start", STARTS)
@torch.no_grad()
def test_it_is_remembered_wherever_rows_set_out_and_whatever_becomes_of_the_blocks(start):
    model = tiny_llama(layers=4)
    matrices, rows, batches = edit_matrices(model, [1, 2]), some_rows(), [[4, 0], [1, 2, 5], [3]]
    logits = row_logits(model, matrices, rows, start=start)
    before = [logits(chosen)[0].clone() for chosen in batches]
    found = Remembered(logits, batches)
    assert found.ended
    for parameter in model.model.layers.parameters():
        parameter.add_(1.0)
    for number, expected in enumerate(before):
        assert torch.equal(as_logits(found(number)), expected)


@torch.no_grad()
def test_where_blocks_do_not_end_in_what_the_head_reads_logits_are_kept(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    model = tiny_llama(layers=4)
    logits = RowLogits(model=model, rows=some_rows(), start="targets")
    truth = logits([0, 1])[0].clone()
    monkeypatch.setattr(remembered, "_alike", lambda *_: False)
    found = Remembered(logits, [[0, 1], [2]])
    assert not found.ended
    assert "logits are kept whole" in caplog.text
    for parameter in model.parameters():
        parameter.add_(1.0)
    assert torch.equal(as_logits(found(0)), truth)


@torch.no_grad()
def test_a_model_whose_head_reads_more_than_the_last_block_is_noticed():
    """Logits that also depend on the first block: what is kept would not give them."""
    model = tiny_llama(layers=4)
    seen = []
    model.model.layers[0].register_forward_hook(lambda _, __, output: seen.append(output))
    model.lm_head.register_forward_hook(lambda _, __, output: output + seen[-1].sum())
    assert not Remembered(RowLogits(model=model, rows=some_rows(), start="whole"), [[0, 1]]).ended


@torch.no_grad()
def test_it_may_lie_in_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "MEMORY_SHARE", 0.0)
    monkeypatch.setattr(room.tempfile, "tempdir", str(tmp_path))
    model = tiny_llama(layers=4)
    logits = RowLogits(model=model, rows=some_rows(), start="targets")
    found = Remembered(logits, [[0, 1], [2]])
    assert torch.equal(as_logits(found(1)), logits([2])[0])
    assert list(tmp_path.iterdir()) == []
