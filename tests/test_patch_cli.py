"""``crispedit patch`` from end to end, on the bundled model."""

import json

import pytest
import torch

import crispedit
from crispedit import cli
from crispedit.checkpoint import RECORD
from crispedit.models import fingerprint, load_model
from crispedit.paired import measure_rows
from crispedit.report import report_data
from crispedit.report_curvature import find_curvature
from crispedit.report_markdown import markdown
from evaluated import evaluated


def program(*arguments):
    assert cli._run(["patch", *arguments]) == 0


@pytest.fixture
def work(tmp_path, monkeypatch, bundled):
    """The current directory, with the bundled model as ``one``, and ``two`` and ``three``, each changed further."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    bundled.tokenizer.save_pretrained("one")
    model = bundled.model.half()
    for number, name in enumerate(("one", "two", "three")):
        if number:
            weight = model.get_parameter(f"model.layers.{number}.mlp.down_proj.weight")
            weight.data += (torch.randn(weight.shape, generator=generator) / 10).half()
        model.save_pretrained(name)
        bundled.tokenizer.save_pretrained(name)
    return tmp_path


def weights(name):
    return {key: tensor.clone() for key, tensor in load_model(str(name)).model.state_dict().items()}


def same(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_patches_are_made_shown_put_on_stacked_and_taken_off(work, capsys):
    program("diff", "one", "two", "--out", "first.safetensors")
    program("diff", "two", "three", "--out", "second.safetensors")
    program("stack", "first.safetensors", "second.safetensors", "--out", "both.safetensors")
    program("apply", "one", "first.safetensors", "second.safetensors", "--out", "by_two")
    program("apply", "one", "both.safetensors", "--out", "by_one")
    program("revert", "three", "first.safetensors", "second.safetensors", "--out", "back")
    assert same("by_two", "three")
    assert same("by_one", "three")
    assert same("back", "one")
    assert not same("one", "three")
    capsys.readouterr()
    program("show", "both.safetensors", "--json", "shown.json")
    printed = capsys.readouterr().out
    assert "2 patches in one" in printed
    assert "the difference to three" in printed
    shown = json.loads((work / "shown.json").read_text())
    assert shown["shapes"] == {f"model.layers.{n}.mlp.down_proj.weight": [256, 576] for n in (1, 2)}
    assert (work / "both.safetensors").stat().st_size < 2 * 256 * 576 * 2 + 20_000  # two bytes a weight, and a header


def test_a_patched_model_says_what_was_put_on_what(work, capsys):
    """And what reads records knows that there is no run to tell of or to repeat."""
    program("diff", "one", "two", "--out", "first.safetensors")
    program("diff", "two", "three", "--out", "second.safetensors")
    program("apply", "one", "first.safetensors", "second.safetensors", "--out", "new")
    program("revert", "new", "second.safetensors", "--out", "back")
    put, taken = (json.loads((work / name / RECORD).read_text()) for name in ("new", "back"))
    assert put["command"] == "patch apply"
    assert put["model"] == {"name": "one", "fingerprint": fingerprint(load_model("one").model), "dtype": "float32"}
    assert put["versions"]["crispedit"] == crispedit.__version__
    assert [(one["file"], one["result"]) for one in put["patches"]] == [
        ("first.safetensors", "two"),
        ("second.safetensors", "three"),
    ]
    assert (taken["command"], taken["model"]["name"]) == ("patch revert", "new")
    capsys.readouterr()
    for place in ("new", f"new/{RECORD}"):
        assert cli._run(["edit", "--rerun", place, "--out", "again"]) == 2
        said = capsys.readouterr().err
        assert said == f"crispedit: '{place}' was made by 'crispedit patch apply': there is no edit to repeat\n"
    found = evaluated(record=put, model="new", base="one")
    report = report_data(found, rows=measure_rows(found, resamples=300), curvature=find_curvature(put))
    assert report["run"] is None
    assert "How the model was edited" not in markdown(report)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["apply", "two", "first.safetensors", "--out", "new"], "nothing to do: the model is already"),
        (["apply", "one", "first.safetensors", "first.safetensors", "--out", "new"], "nothing to do: the model is"),
        (["apply", "three", "first.safetensors", "--out", "new"], "model.layers.2.mlp.down_proj.weight differs"),
        (["revert", "one", "first.safetensors", "--out", "new"], "nothing to do: the model is already"),
        (["apply", "one", "none.safetensors", "--out", "new"], "there is no patch 'none.safetensors'"),
        (["apply", "one", "one/model.safetensors", "--out", "new"], "'one/model.safetensors' is no patch of crispedit"),
        (["apply", "one", "one/config.json", "--out", "new"], "'one/config.json' is damaged, or no patch"),
        (["apply", "one", "first.safetensors", "--out", "two"], "the directory 'two' is not empty"),
        (["diff", "one", "two", "--out", "first.safetensors"], "the file 'first.safetensors' exists"),
        (["diff", "one", "two", "--out", "one"], "--out 'one' is a directory; name a file"),
        (["stack", "first.safetensors", "first.safetensors", "--out", "new"], "nothing to do"),
        (["show", "first.safetensors", "--json", "one"], "--json 'one' is a directory"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(work, capsys, arguments, said):
    program("diff", "one", "two", "--out", "first.safetensors")
    capsys.readouterr()
    assert cli._run(["patch", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (work / "new").exists()
