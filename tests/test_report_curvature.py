"""The curvature in a report: found again where it was, and drawn as the numbers are."""

import json
import math
from itertools import pairwise

import pytest
import torch

from builders import curvature_of
from crispedit import cache
from crispedit.errors import ArtifactError, ModelError
from crispedit.factors import Factors
from crispedit.report_curvature import APART, curvature_data, find_curvature, last_name


def factor(size: int, seed: int) -> torch.Tensor:
    rows = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows *= torch.arange(1, size + 1, dtype=torch.float64) ** -0.7
    return (rows.T @ rows / (3 * size)).float()


def example(**changes):
    factors = {"w": Factors(A=factor(60, 0), G=factor(40, 1), num_tokens=1234)}
    return curvature_of(
        factors, texts={"source": "/a/b/texts.txt", "sha256": "t", "seed": 0, "samples": None}, **changes
    )


def test_the_staircase_is_that_of_the_largest_products():
    """Against all 40 × 60 products, sorted."""
    (found,) = curvature_data(example(), 0.8)["matrices"]
    beta, alpha = (torch.linalg.eigvalsh(factor(n, seed).double()).flip(0) for n, seed in ((40, 1), (60, 0)))
    products = torch.outer(beta, alpha)
    ordered = products.flatten().sort(descending=True).values
    k = int((ordered.cumsum(0) < 0.8 * ordered.sum()).sum()) + 1
    high = products >= ordered[k - 1]
    stairs = found["staircase"]
    assert stairs["directions"] == pytest.approx(k / 2400, rel=1e-5)
    assert stairs["captured"] == pytest.approx(float(ordered[:k].sum() / ordered.sum()), rel=1e-5)
    assert (stairs["rows"], stairs["columns"]) == (int(high.any(1).sum()), int(high.any(0).sum()))
    assert found["inputs"][0] == [1, pytest.approx(float(alpha[0] / alpha.sum()), rel=1e-4)]
    crossed = found["cross"]
    left = float(
        (1 - beta[: crossed["rows"]].sum() / beta.sum()) * (1 - alpha[: crossed["columns"]].sum() / alpha.sum())
    )
    assert crossed["captured"] == pytest.approx(1 - left, rel=1e-5)


def test_what_is_drawn_is_thinned_to_pixels_and_ready_for_json():
    data = curvature_data(example(), 0.9)
    (found,) = data["matrices"]
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["texts"] == "texts.txt"
    for line in (found["inputs"], found["outputs"], found["staircase"]["line"], found["held"]):
        logs = [[math.log10(value) for value in point] for point in line]
        assert all(math.dist(a, b) >= APART * 0.99 for a, b in pairwise(logs[:-1]))
    assert found["inputs"][-1][0] == 60


def test_leading_pairs_alone_have_no_staircase():
    from crispedit.moments import Sketch

    sketch = Factors(A=Sketch.of(factor(300, 0)), G=Sketch.of(factor(200, 1)), num_tokens=9)
    (found,) = curvature_data(curvature_of({"w": sketch}), 0.5)["matrices"]
    assert found["staircase"] is None
    assert found["held"] == []
    assert found["cross"]["captured"] >= 0.5


def record_of(curvature, path=None):
    return {
        "model": {"fingerprint": curvature.model_fingerprint},
        "curvature": curvature.manifest(with_texts=False),
        "job": {"curvature": path and str(path)},
    }


def test_a_curvature_is_found_where_the_record_says_and_in_the_cache(tmp_path):
    made = example()
    made.save(tmp_path / "curv")
    record = record_of(made, tmp_path / "curv")
    assert find_curvature(record).path == tmp_path / "curv"
    elsewhere = record_of(made, tmp_path / "gone")
    assert find_curvature(elsewhere) is None
    cache.keep(example())
    assert find_curvature(elsewhere).factors.keys() == {"w"}
    assert find_curvature(record_of(made)).num_tokens == 1234
    assert find_curvature(None) is None
    assert find_curvature({"curvature": None}) is None


def test_another_curvature_in_its_place_is_not_taken_for_it(tmp_path):
    example(seed=1).save(tmp_path / "curv")
    assert find_curvature(record_of(example(), tmp_path / "curv")) is None


def test_a_curvature_that_is_named_must_be_of_the_edited_weights(tmp_path):
    example().save(tmp_path / "curv")
    assert find_curvature(None, tmp_path / "curv").fisher == "mc"
    with pytest.raises(ModelError, match="of other weights"):
        find_curvature(record_of(example(model_fingerprint="g")), tmp_path / "curv")
    with pytest.raises(ArtifactError):
        find_curvature(None, tmp_path / "nowhere")


def test_names_lose_their_directories_and_hub_names_do_not(tmp_path):
    assert last_name("/home/somebody/model") == "model"
    assert last_name(str(tmp_path)) == tmp_path.name
    assert last_name("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert last_name("bundled:demo") == "bundled:demo"
