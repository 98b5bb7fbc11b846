"""Sketched second moments against the dense ones that they stand for.

Sums are float32: products of some hundred vectors are good to 1e-6 of the largest entry. What a sketch says of a
matrix of rank at most ℓ is exact but for that; of others it is a lower bound.
"""

import pytest
import torch

from crispedit.errors import NumericsError
from crispedit.moments import MAX_RANK, MomentSum, Sketch, captured, sketch_rank, trace, weighted_sum

SIZE = 120


def vectors(count: int, rank: int = SIZE, seed: int = 0) -> torch.Tensor:
    """Vectors whose second moment falls like 1/j over ``rank`` directions of a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator))[0]
    scale = torch.arange(1, rank + 1).float() ** -0.5
    return (torch.randn(count, rank, generator=generator) * scale) @ basis[:, :rank].T


def both(V: torch.Tensor) -> tuple[torch.Tensor, Sketch]:
    sums = [MomentSum(SIZE, kind, torch.device("cpu")) for kind in ("dense", "sketch")]
    for total in sums:
        total.add(V[:50])
        total.add(V[50:])
    dense, sketch = (total.mean(len(V)) for total in sums)
    assert isinstance(dense, torch.Tensor)
    assert isinstance(sketch, Sketch)
    return dense, sketch


def approximation(sketch: Sketch) -> torch.Tensor:
    pairs = sketch.eigenpairs
    return (pairs.vectors * pairs.values) @ pairs.vectors.T


def test_the_trace_is_exact_and_the_streamed_sketch_is_that_of_the_matrix():
    dense, sketch = both(vectors(500))
    assert sketch.rank == sketch_rank(SIZE) == 30
    assert sketch.trace == pytest.approx(float(dense.trace()), rel=1e-6)
    assert trace(sketch) == sketch.trace
    assert trace(dense) == pytest.approx(sketch.trace, rel=1e-6)
    again = Sketch.of(dense)
    assert again.trace == pytest.approx(sketch.trace, rel=1e-6)
    assert (again.product - sketch.product).norm() < 1e-5 * sketch.product.norm()


@pytest.mark.parametrize("rank", [1, 5, 25])
def test_a_matrix_of_low_rank_is_known_whole(rank):
    dense, sketch = both(vectors(400, rank))
    assert len(sketch.eigenpairs) == rank
    assert (approximation(sketch) - dense).norm() < 1e-5 * dense.norm()


def test_fewer_vectors_than_columns_are_known_whole():
    dense, sketch = both(vectors(20))
    assert (approximation(sketch) - dense).norm() < 1e-4 * dense.norm()


def test_a_sketch_never_says_more_than_there_is():
    """0 ⪯ M_nys ⪯ M up to the rounding of float32 sums, so what leading vectors are said to hold they do hold."""
    dense, sketch = both(vectors(2000))
    pairs = sketch.eigenpairs
    left = torch.linalg.eigvalsh(dense.double() - approximation(sketch))
    assert left[0] > -1e-5 * float(dense.norm())
    assert bool((pairs.values <= torch.linalg.eigvalsh(dense.double()).flip(0)[: len(pairs)] + 1e-5).all())
    assert (pairs.vectors.T @ pairs.vectors - torch.eye(len(pairs))).abs().max() < 1e-8
    for count in (1, 5, 20):
        U = pairs.vectors[:, :count]
        said, held = float(pairs.values[:count].sum()), captured(dense, U)
        assert said <= held * (1 + 1e-5)
        assert held == pytest.approx(float((U * (dense.double() @ U)).sum()), rel=1e-5)
        assert captured(sketch, U) == pytest.approx(said, rel=1e-8)
        assert said > 0.8 * float(torch.linalg.eigvalsh(dense).flip(0)[:count].sum())
    true = (dense.double() @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert bool((true <= pairs.residuals + 1e-5).all())


def test_sketches_add_as_moments_do():
    one, other = vectors(300), vectors(200, seed=1)
    whole_dense, whole = both(torch.cat([one, other]))
    (dense_one, sketch_one), (dense_other, sketch_other) = both(one), both(other)
    added = weighted_sum([sketch_one, sketch_other], [0.6, 0.4])
    assert isinstance(added, Sketch)
    assert (added.product - whole.product).norm() < 1e-5 * whole.product.norm()
    assert added.trace == pytest.approx(whole.trace, rel=1e-6)
    mixed = weighted_sum([dense_one, sketch_other], [0.6, 0.4])
    assert isinstance(mixed, Sketch)
    assert (mixed.product - whole.product).norm() < 1e-5 * whole.product.norm()
    dense = weighted_sum([dense_one, dense_other], [0.6, 0.4])
    assert isinstance(dense, torch.Tensor)
    assert (dense - whole_dense).norm() < 1e-5 * whole_dense.norm()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_where_a_sketch_would_save_nothing_there_is_none(size):
    total = MomentSum(size, "sketch", torch.device("cpu"))
    V = torch.randn(7, size)
    total.add(V)
    mean = total.mean(7)
    if size == 1:
        assert isinstance(mean, torch.Tensor)
        assert mean.item() == pytest.approx(float(V.square().mean()))
    else:
        assert isinstance(mean, Sketch)
        assert len(mean.eigenpairs) == 1


def test_the_rank_is_a_quarter_at_most():
    assert [sketch_rank(n) for n in (1, 576, 4096, 14336)] == [1, 144, MAX_RANK, MAX_RANK]


def test_nothing_at_all_and_what_is_not_finite():
    empty = Sketch(torch.zeros(SIZE, 30), 0.0)
    assert len(empty.eigenpairs) in (0, 30)
    assert float(empty.eigenpairs.values.sum()) == 0
    with pytest.raises(NumericsError, match="not finite"):
        _ = Sketch(torch.full((SIZE, 30), float("nan")), 1.0).eigenpairs
