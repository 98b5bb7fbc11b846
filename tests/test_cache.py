"""The cache finds a curvature by what it is of, and is not stopped by damage."""

import pytest
import torch

from crispedit import cache
from crispedit.curvature import Curvature, Factors


def curvature(fingerprint="f", layers=(1,), sha256="t", fisher="mc", seed=0) -> Curvature:
    factors = {"w": Factors(A=torch.eye(3), G=torch.eye(2), num_tokens=5)}
    return Curvature(
        factors=factors,
        layers=layers,
        fisher=fisher,
        model_name="m",
        model_fingerprint=fingerprint,
        held_out=("a text",),
        texts={"source": "s", "sha256": sha256, "seed": 0, "samples": None},
        seed=seed,
    )


def test_a_kept_curvature_is_found_by_its_content():
    cache.keep(curvature())
    cache.keep(curvature(layers=(2,), sha256="other"))
    found = cache.find("f", (1,))
    assert found is not None
    assert found.num_tokens == 5
    assert found.held_out == ("a text",)
    assert cache.find("f", (1,), texts_sha256="t", fisher="mc", seed=0) is not None
    assert cache.find("f", (2,), texts_sha256="other") is not None


@pytest.mark.parametrize(
    "other", [{"texts_sha256": "u"}, {"fisher": "empirical"}, {"seed": 1}], ids=lambda other: next(iter(other))
)
def test_another_one_is_not(other):
    cache.keep(curvature())
    assert cache.find("g", (1,)) is None
    assert cache.find("f", (1, 2)) is None
    assert cache.find("f", (1,), **other) is None


def test_a_curvature_elsewhere_is_pointed_to_until_it_is_gone(tmp_path):
    kept = curvature()
    kept.save(tmp_path / "mine")
    assert cache.keep(kept) == tmp_path / "mine"
    assert cache.find("f", (1,)).path == tmp_path / "mine"
    (tmp_path / "mine" / "curvature.json").unlink()
    assert cache.find("f", (1,)) is None


def test_damaged_entries_are_passed_over():
    path = cache.keep(curvature())
    (path / "factors.safetensors").write_bytes(b"short")
    (cache.cache_directory() / "x.json").write_text("{")
    assert cache.find("f", (1,)) is None
