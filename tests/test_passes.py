"""Passes that are interrupted, killed, or cannot save their state: they go on, with the same factors bit for bit."""

import random
import shutil
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from builders import WordTokenizer, long_texts
from crispedit import curvature, estimation, halves
from crispedit.curvature import Curvature
from crispedit.errors import ArtifactError
from crispedit.texts import text_batches
from reference import tiny_llama


def resumable(tmp_path, progress=None, **options):
    return Curvature.estimate(
        tiny_llama(), WordTokenizer(), long_texts(), layers=[0, 1], resume=tmp_path / "passes",
        progress=progress or (lambda *_: None), **options,
    )  # fmt: skip


def same(one: Curvature, other: Curvature) -> bool:
    pairs = [(one.factors[n], other.factors[n]) for n in one.factors]
    return all(torch.equal(a.A, b.A) and torch.equal(a.G, b.G) for a, b in pairs) and (
        one.description == other.description
    )


@pytest.fixture
def small_batches(monkeypatch):
    """Many batches, the state saved after each."""

    monkeypatch.setattr(estimation, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(estimation, "SAVE_TIMES", 0)
    monkeypatch.setattr(halves, "text_batches", partial(text_batches, batch_tokens=40))


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("at", [1, 4, 9, 13])
def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path, caplog, at):
    caplog.set_level("INFO", "crispedit")
    whole = resumable(tmp_path / "other")
    steps = []

    def interrupt(what, done, total):
        steps.append(total)
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resumable(tmp_path, interrupt)
    assert steps[0] > 13, "there are batches on both sides of the interruption, in both halves"
    assert "the same command goes on from there" in caplog.text
    first = []
    again = resumable(tmp_path, lambda what, done, total: first.append(done))
    assert first[0] > at
    assert same(again, whole)
    assert list((tmp_path / "passes").iterdir())
    again.save(tmp_path / "curvature")
    assert not list((tmp_path / "passes").iterdir())


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("change", [{"seed": 1}, {"fisher": "empirical"}, {"factors": "sketch"}])
def test_another_pass_begins_at_the_beginning(tmp_path, change):
    resumable(tmp_path)
    first = []
    resumable(tmp_path, lambda what, done, total: first.append(done), **change)
    assert first[0] == 1


@pytest.mark.usefixtures("small_batches")
def test_a_damaged_state_is_as_good_as_none(tmp_path):
    whole = resumable(tmp_path)
    for file in (tmp_path / "passes").rglob("half-*"):
        file.write_bytes(file.read_bytes()[:-100])
    first = []
    assert same(resumable(tmp_path, lambda what, done, total: first.append(done)), whole)
    assert first[0] == 1


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("missing", ["last tensor", "row of the last tensor"])
def test_a_state_with_something_wrong_leaves_nothing_behind(tmp_path, missing):
    """Found out after some sums were read: they must not be counted on top of."""
    whole = resumable(tmp_path / "other")

    def interrupt(what, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resumable(tmp_path, interrupt)
    (file,) = (tmp_path / "passes").rglob("half-*")
    with safe_open(file, "pt") as opened:
        about, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    last = sorted(tensors)[-1]
    if missing == "row of the last tensor":
        tensors[last] = tensors[last][:-1]
    else:
        del tensors[last]
    save_file(tensors, file, metadata=about)
    first = []
    assert same(resumable(tmp_path, lambda what, done, total: first.append(done)), whole)
    assert first[0] == 1


@pytest.mark.usefixtures("small_batches")
def test_batches_put_together_otherwise_are_another_pass(tmp_path, monkeypatch):
    resumable(tmp_path)
    monkeypatch.setattr(halves, "text_batches", partial(text_batches, batch_tokens=80))
    first = []
    resumable(tmp_path, lambda what, done, total: first.append(done))
    assert first[0] == 1


@pytest.mark.usefixtures("small_batches")
def test_a_pass_begun_with_another_kind_of_factors_goes_on_with_it(tmp_path, monkeypatch):
    def interrupt(what, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resumable(tmp_path, interrupt)
    monkeypatch.setattr(curvature, "affordable_kind", lambda matrices: "sketch")
    assert resumable(tmp_path / "other").kind == "sketch"
    assert resumable(tmp_path).kind == "dense"


@pytest.mark.usefixtures("small_batches")
def test_another_process_that_ends_the_same_pass_first_takes_nothing_away(tmp_path):
    """Its state is removed while the second half is under way."""
    whole = resumable(tmp_path / "other")

    def remove(what, done, total):
        if done == total - 1:
            shutil.rmtree(tmp_path / "passes")

    assert same(resumable(tmp_path, remove), whole)


@pytest.mark.usefixtures("small_batches")
def test_without_a_place_for_its_state_a_pass_promises_nothing(caplog):
    caplog.set_level("INFO", "crispedit")

    def interrupt(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Curvature.estimate(tiny_llama(), WordTokenizer(), long_texts(), layers=[0], progress=interrupt)
    assert "goes on from there" not in caplog.text


@pytest.mark.usefixtures("small_batches")
def test_a_save_on_the_way_that_fails_does_not_stop_the_pass(tmp_path, caplog):
    caplog.set_level("INFO", "crispedit")
    whole = resumable(tmp_path / "other")

    def block(what, done, total):
        if done == 2:
            shutil.rmtree(tmp_path / "passes")
            (tmp_path / "passes").write_text("a file")
        if done == 4:
            (tmp_path / "passes").unlink()

    assert same(resumable(tmp_path, block), whole)
    assert "the pass goes on" in caplog.text


@pytest.mark.usefixtures("small_batches")
def test_a_state_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "passes").write_text("a file")
    with pytest.raises(ArtifactError, match="cannot write the state of the curvature pass"):
        resumable(tmp_path)


KILLED = """
import sys
from functools import partial
from pathlib import Path
import torch
from crispedit import curvature, estimation, halves, texts
from crispedit.bundled import corpus
from crispedit.models import load_model
estimation.SAVE_SECONDS = estimation.SAVE_TIMES = 0
halves.text_batches = partial(texts.text_batches, batch_tokens=512)
torch.set_num_threads(1)
loaded = load_model("bundled")
print("loaded", flush=True)
found = curvature.Curvature.estimate(
    loaded.model, loaded.tokenizer, corpus.capability_texts()[:100], layers=[2, 3], resume=Path(sys.argv[1]),
    progress=lambda what, done, total: print(done, total, flush=True),
)
found.save(sys.argv[2])
"""


def run_until(kill_after: int | None, *arguments: str) -> int:
    """Runs the pass in a process of its own and kills it after so many batches of this run; its exit status."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for number, _ in enumerate(process.stdout):
        if number == kill_after:
            time.sleep(random.random() * 0.05)  # anywhere in the batch that follows, or in the saving of its state
            process.kill()
            break
    process.stdout.close()
    return process.wait()


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_pass_killed_at_random_moments_gives_the_same_factors_bit_for_bit(tmp_path, kills):
    assert run_until(None, str(tmp_path / "a"), str(tmp_path / "whole")) == 0
    for _ in range(kills):
        status = run_until(random.randint(0, 3), str(tmp_path / "b"), str(tmp_path / "resumed"))
        if status == 0:
            break
        assert status == -9
        assert not (tmp_path / "resumed").exists()
    assert run_until(None, str(tmp_path / "b"), str(tmp_path / "again")) == 0
    whole, again = Curvature.load(tmp_path / "whole"), Curvature.load(tmp_path / "again")
    assert same(whole, again)
    assert whole.manifest() == again.manifest()
