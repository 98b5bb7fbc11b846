"""The cache finds a curvature by what it is of, and is not stopped by damage."""

import os

import pytest
import torch

from builders import curvature_of
from crispedit import cache
from crispedit.curvature import Curvature
from crispedit.factors import Factors
from crispedit.moments import Sketch

DENSE = {"w": Factors(A=torch.eye(3), G=torch.eye(2), num_tokens=5)}


def curvature(fingerprint="f", layers=(1,), sha256="t", factors=DENSE, **changes) -> Curvature:
    texts = {"source": "s", "sha256": sha256, "seed": 0, "samples": None}
    return curvature_of(factors, layers=layers, model_fingerprint=fingerprint, texts=texts, **changes)


def test_a_kept_curvature_is_found_by_its_content():
    cache.keep(curvature())
    cache.keep(curvature(layers=(2,), sha256="other"))
    found = cache.find("f", (1,), "k")
    assert found is not None
    assert found.num_tokens == 5
    assert found.held_out == ("a text",)
    assert cache.find("f", (1,), "k", texts_sha256="t", fisher="mc", seed=0) is not None
    assert cache.find("f", (2,), "k", texts_sha256="other") is not None


@pytest.mark.parametrize(
    "change", [{"fingerprint": "g"}, {"layers": (1, 2)}, {"sha256": "u"}, {"tokenizer": "l"}, {"fisher": "empirical"},
               {"seed": 1}, {"dtype": "bfloat16"}], ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_factors_depend_on_is_in_their_name(change):
    cache.keep(curvature())
    cache.keep(curvature(**change))
    assert len(list(cache.cache_directory().iterdir())) == 2
    cache.keep(curvature(**change, model_name="by another name"))
    assert len(list(cache.cache_directory().iterdir())) == 2


@pytest.mark.parametrize(
    "other", [{"texts_sha256": "u"}, {"fisher": "empirical"}, {"seed": 1}], ids=lambda other: next(iter(other))
)
def test_another_one_is_not(other):
    cache.keep(curvature())
    assert cache.find("g", (1,), "k") is None
    assert cache.find("f", (1, 2), "k") is None
    assert cache.find("f", (1,), "l") is None
    assert cache.find("f", (1,), "k", **other) is None


def test_dense_factors_are_found_before_sketched_ones():
    sketch = {"w": Factors(A=Sketch.of(torch.eye(3)), G=Sketch.of(torch.eye(2)), num_tokens=5)}
    cache.keep(curvature(factors=sketch))
    assert cache.find("f", (1,), "k").kind == "sketch"
    assert cache.find("f", (1,), "k", factors="dense") is None
    kept = cache.keep(curvature())
    os.utime(kept / "curvature.json", (0, 0))
    assert cache.find("f", (1,), "k").kind == "dense"


def test_states_of_passes_that_nobody_goes_on_with_are_removed(tmp_path):
    root = cache.passes_directory()
    for name in ("old", "new"):
        (root / name).mkdir(parents=True)
    os.utime(root / "old", (0, 0))
    assert [entry.name for entry in cache.passes_directory().iterdir()] == ["new"]


def test_a_curvature_elsewhere_is_pointed_to_until_it_is_gone(tmp_path):
    kept = curvature()
    kept.save(tmp_path / "mine")
    assert cache.keep(kept) == tmp_path / "mine"
    assert cache.find("f", (1,), "k").path == tmp_path / "mine"
    (tmp_path / "mine" / "curvature.json").unlink()
    assert cache.find("f", (1,), "k") is None


def test_damaged_entries_are_passed_over():
    path = cache.keep(curvature())
    (path / "factors.safetensors").write_bytes(b"short")
    (cache.cache_directory() / "x.json").write_text("{")
    assert cache.find("f", (1,), "k") is None
