"""The partial eigensolver against dense diagonalisation, on prescribed spectra and on real factors."""

import pytest
import torch

from crispedit import eigen
from crispedit.eigen import TopSolver, full_eigenpairs, refreshed
from crispedit.errors import ConfigError, NumericsError
from crispedit.estimation import estimate_factors
from crispedit.models import edit_matrices
from crispedit.texts import text_batches

SIZE, COUNT = 400, 30
J = torch.arange(1, SIZE + 1, dtype=torch.float64)
SPECTRA = {
    "flat, with a step at the cut": torch.where(J <= COUNT, 1.0 + 1e-3, 1.0) + 1e-5 * (SIZE - J) / SIZE,
    "1 / j": 1 / J,
    "1 / j ** 1.5": J**-1.5,
    "rank below the cut": torch.where(J <= 12, 1 / J, 0.0),
    "clusters that end at the cut": 10.0 - torch.div(J - 1, COUNT, rounding_mode="floor") / 2,
    "clusters across the cut": 10.0 - torch.div(J - 1, 2 * COUNT, rounding_mode="floor") / 2,
    "one dominant direction": torch.where(J == 1, 1e4, 1 / J),
    "all the same": torch.ones(SIZE, dtype=torch.float64),
}


def matrix_with(spectrum: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix with a spectrum, and its eigenvectors."""
    noise = torch.randn(
        len(spectrum), len(spectrum), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    vectors = torch.linalg.qr(noise)[0]
    return (vectors * spectrum) @ vectors.T, vectors


def projector(vectors: torch.Tensor, count: int) -> torch.Tensor:
    return vectors[:, :count] @ vectors[:, :count].T


@pytest.fixture
def partial(monkeypatch):
    """Never the dense diagonalisation."""
    monkeypatch.setattr(eigen, "DENSE_SIZE", 0)
    monkeypatch.setattr(eigen, "DENSE_SHARE", float("inf"))
    monkeypatch.setattr(eigen, "full_eigenpairs", None)


@pytest.mark.usefixtures("partial")
@pytest.mark.parametrize("name", SPECTRA)
def test_the_leading_pairs_are_those_of_the_dense_diagonalisation(name):
    """Values to 1e-10 of the largest (their error is of the order of the residual squared); the projector to 1e-5 where
    the relative gap at the cut is at least 1e-3, and everywhere within the bound that is reported. The pair beyond
    the cut is there to bound the gap: its value is right to its residual."""
    spectrum = SPECTRA[name]
    matrix, vectors = matrix_with(spectrum)
    found = TopSolver(matrix).top(COUNT)
    assert len(found) > COUNT
    errors = (found.values - spectrum[: len(found)]).abs()
    assert errors[:COUNT].max() <= 1e-10 * spectrum[0]
    assert bool((errors <= found.residuals).all())
    assert (found.vectors.T @ found.vectors - torch.eye(len(found))).abs().max() < 1e-12
    true_residuals = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
    rounding = SIZE * torch.finfo(torch.float64).eps * spectrum[0]
    assert bool((true_residuals <= found.residuals + rounding).all())
    assert bool((found.residuals <= (eigen.VALUE * spectrum[: len(found)]).clamp(min=1.01 * float(rounding))).all())
    assert found.trace == pytest.approx(float(spectrum.sum()), rel=1e-12)

    error = float((projector(found.vectors, COUNT) - projector(vectors, COUNT)).norm())
    assert error <= found.projector_error(COUNT) + 1e-12
    gap = float(spectrum[COUNT - 1] - spectrum[COUNT])
    if gap >= 1e-3 * spectrum[COUNT - 1] > 0:
        assert error <= 1e-5 * COUNT**0.5
        assert found.projector_error(COUNT) <= 1e-5 * COUNT**0.5 * 1.01
    # whatever the gap: no projector of this rank captures more
    assert float((found.vectors[:, :COUNT] * (matrix @ found.vectors[:, :COUNT])).sum()) == pytest.approx(
        float(spectrum[:COUNT].sum()), rel=1e-10
    )


@pytest.mark.usefixtures("partial")
@pytest.mark.parametrize("name", SPECTRA)
def test_the_spectrum_is_bounded_from_above_at_every_stage(name):
    """The first k eigenvalues together, for every k, up to SAME: what closer eigenvalues differ by may be missed."""
    spectrum = SPECTRA[name]
    solver = TopSolver(matrix_with(spectrum)[0])
    slack = []
    while not slack or not solver.settled(COUNT):
        bounds = solver.at_most()
        assert float(bounds.sum()) == pytest.approx(float(spectrum.sum()), rel=eigen.SAME)
        assert bool((bounds.cumsum(0) >= spectrum.cumsum(0) * (1 - eigen.SAME)).all())
        slack.append(float((bounds.cumsum(0) - spectrum.cumsum(0)).max()))
        solver.search(COUNT)
    bounds = solver.at_most()
    assert (bounds - spectrum)[:COUNT].abs().max() <= 1e-10 * spectrum[0]
    assert float((bounds.cumsum(0) - spectrum.cumsum(0)).max()) <= slack[0]


@pytest.mark.usefixtures("partial")
@pytest.mark.parametrize("copies", [3, 4, 5, 11])
def test_an_eigenvalue_of_more_copies_than_a_block_has_columns_is_found_whole(monkeypatch, copies):
    """A block of four columns sees four copies of an eigenvalue; the cut is after copies that are not first in line."""
    monkeypatch.setattr(eigen, "BLOCK", 4)
    spectrum = torch.cat([torch.tensor([9.0, 8.0]), torch.full((copies,), 5.0), 1 / J[: SIZE - copies - 2]]).double()
    matrix, vectors = matrix_with(spectrum)
    for count in (copies + 2, copies + 3):
        found = TopSolver(matrix).top(count)
        assert (found.values[:count] - spectrum[:count]).abs().max() <= 1e-10 * spectrum[0]
        assert (projector(found.vectors, count) - projector(vectors, count)).norm() <= 1e-5 * count**0.5


@pytest.mark.usefixtures("partial")
@pytest.mark.parametrize("size", [1, 2, 9, 17, 33])
@pytest.mark.parametrize("rank", [0, 1, 40])
def test_matrices_that_a_few_blocks_exhaust(size, rank):
    spectrum = torch.where(J[:size] <= rank, 1 / J[:size], 0.0)
    found = TopSolver(matrix_with(spectrum)[0]).top(size - 1)
    assert len(found) == (size if size > 1 else 0)  # of a matrix of size 1 nothing was asked
    assert bool(((found.values - spectrum[: len(found)]).abs() <= 1e-14).all())
    assert (found.vectors.T @ found.vectors - torch.eye(len(found))).norm() < 1e-12


def test_a_search_that_grows_too_large_ends_in_the_dense_diagonalisation(monkeypatch):
    monkeypatch.setattr(eigen, "DENSE_SIZE", 0)
    spectrum = 1 / (J + 300)  # the gap at the cut is so small that it takes more than a quarter of all directions
    matrix, _ = matrix_with(spectrum)
    solver = TopSolver(matrix)
    found = solver.top(COUNT)
    assert 0 < solver.products <= SIZE / 4
    assert len(found) == SIZE
    assert (found.values - spectrum).abs().max() < 1e-14


@pytest.fixture(scope="module")
def real_factors():
    from crispedit.bundled import corpus
    from crispedit.models import load_model

    loaded = load_model("bundled")
    batches = text_batches(loaded.model, loaded.tokenizer, corpus.capability_texts()[:60])
    (factors,) = estimate_factors(loaded.model, edit_matrices(loaded.model, [3]), batches).values()
    return {"A": factors.A, "G": factors.G}


@pytest.mark.usefixtures("partial")
@pytest.mark.parametrize("count", [1, 10, 40])
@pytest.mark.parametrize("side", ["A", "G"])
def test_real_factors(real_factors, side, count):
    matrix = real_factors[side]
    double = (matrix.double() + matrix.double().T) / 2
    values, vectors = torch.linalg.eigh(double)
    values, vectors = values.flip(0), vectors.flip(1)
    found = TopSolver(matrix).top(count)
    assert (found.values[:count] / values[:count] - 1).abs().max() <= 1e-10
    error = float((projector(found.vectors, count) - projector(vectors, count)).norm())
    assert error <= found.projector_error(count) <= 1e-5 * count**0.5
    assert values[count - 1] - values[count] > 1e-3 * values[count - 1]


def test_the_dense_form_is_eigh():
    matrix, _ = matrix_with(SPECTRA["1 / j"])
    found = full_eigenpairs(matrix)
    assert len(found) == found.size == SIZE
    assert torch.equal(found.values, torch.linalg.eigh((matrix + matrix.T) / 2)[0].flip(0))
    assert bool(((matrix @ found.vectors - found.vectors * found.values).norm(dim=0) <= found.residuals).all())
    assert found.projector_error(SIZE) == found.projector_error(0) == 0


def test_a_matrix_of_which_much_is_wanted_is_diagonalised_whole():
    matrix, _ = matrix_with(SPECTRA["1 / j"])
    assert len(TopSolver(matrix).top(COUNT)) == SIZE


@pytest.mark.usefixtures("partial")
def test_more_pairs_are_found_from_where_the_search_is():
    matrix, _ = matrix_with(SPECTRA["1 / j"])
    solver = TopSolver(matrix)
    few = solver.top(10)
    before = solver.products
    more = solver.top(40)
    assert (more.values[:10] - few.values[:10]).abs().max() < 1e-12
    fresh = TopSolver(matrix)
    fresh.top(40)
    assert solver.products - before < fresh.products


@pytest.mark.usefixtures("partial")
def test_a_warm_start_saves_products_and_misses_no_new_direction(monkeypatch):
    """A direction that the old basis knows nothing of becomes the strongest."""
    monkeypatch.setattr(eigen, "BLOCK", 4)
    matrix, vectors = matrix_with(SPECTRA["1 / j ** 1.5"])
    old = TopSolver(matrix).top(COUNT)
    new_direction = vectors[:, -1:]
    changed = 0.99 * matrix + 2.0 * new_direction @ new_direction.T
    warm, cold = TopSolver(changed, start=old.vectors), TopSolver(changed)
    found, expected = warm.top(COUNT), cold.top(COUNT)
    assert warm.products < cold.products
    assert (found.values - expected.values)[:COUNT].abs().max() < 1e-12
    assert abs(float(found.vectors[:, 0] @ new_direction[:, 0])) == pytest.approx(1, abs=1e-10)


def test_what_lapack_cannot_count_is_refused(monkeypatch):
    monkeypatch.setattr(eigen, "WIDEST", 7)
    full_eigenpairs(torch.eye(7))
    with pytest.raises(ConfigError, match=r"factor \(A\) is 8 wide, and at most 7 can .*--factors sketch"):
        full_eigenpairs(torch.eye(8), "A")


def test_a_number_that_is_not_finite_is_refused():
    matrix = torch.eye(4)
    matrix[1, 2] = float("nan")
    for solve in (TopSolver, full_eigenpairs):
        with pytest.raises(NumericsError, match=r"shape \(4, 4\)"):
            solve(matrix)


# ---------------------------------------------------------------- refreshed


@pytest.mark.usefixtures("partial")
@pytest.mark.parametrize("name", ["1 / j", "1 / j ** 1.5", "one dominant direction", "clusters that end at the cut"])
def test_refreshed_vectors_hold_what_the_best_ones_hold_to_second_order(name):
    """One per cent of 2,000 new tokens: angles of some 1e-2, and of the energy 1e-4 at most is missed."""
    old, _ = matrix_with(SPECTRA[name])
    root = torch.linalg.cholesky(old + 1e-12 * torch.eye(SIZE))
    tokens = torch.randn(2000, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) @ root.T
    new = (0.99 * old + 0.01 * tokens.T @ tokens / 2000).float()
    start = TopSolver(old).top(COUNT).vectors
    found = refreshed(new, start)
    values = torch.linalg.eigvalsh(new.double()).flip(0)
    assert len(found) > COUNT
    assert found.trace == pytest.approx(float(values.sum()), rel=1e-6)
    U = found.vectors[:, :COUNT]
    held = float((U * (new.double() @ U)).sum())
    assert held == pytest.approx(float(found.values[:COUNT].sum()), rel=1e-5), "values are Rayleigh quotients"
    assert (1 - 1e-4) * float(values[:COUNT].sum()) <= held <= (1 + 1e-6) * float(values[:COUNT].sum())
    assert (found.vectors.T @ found.vectors - torch.eye(len(found))).abs().max() < 1e-5
    true = (new.double() @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert (true - found.residuals).abs().max() < 1e-5 * values[0]


@pytest.mark.usefixtures("partial")
def test_a_new_direction_is_taken_up():
    old, vectors = matrix_with(SPECTRA["1 / j ** 1.5"])
    start = TopSolver(old).top(COUNT).vectors
    new_direction = (vectors[:, -1:] + 0.1 * vectors[:, :1]) / 1.01**0.5
    found = refreshed((old + 2 * new_direction @ new_direction.T).float(), start)
    assert abs(float(found.vectors[:, 0] @ new_direction[:, 0])) > 0.99


@pytest.mark.usefixtures("partial")
@pytest.mark.parametrize("name", SPECTRA)
def test_of_quite_another_matrix_it_finds_what_it_promises_or_nothing(name, monkeypatch):
    """The estimate of what is missed is of second order; of a basis this far off it may be several times too small."""
    start = TopSolver(matrix_with(SPECTRA["1 / j"])[0]).top(COUNT).vectors
    other, _ = matrix_with(SPECTRA[name], seed=5)
    found = refreshed(other.float(), start)
    best = float(SPECTRA[name].sort(descending=True).values[: COUNT + 1].sum())
    if found is not None:
        assert float(found.values[: COUNT + 1].sum()) >= (1 - 10 * eigen.MISSED) * best
    monkeypatch.setattr(eigen, "ROUNDS", 0)
    assert refreshed(other.float(), start) is None


def test_a_small_matrix_is_not_refreshed_but_diagonalised():
    matrix, vectors = matrix_with(SPECTRA["1 / j"])
    assert len(refreshed(matrix.float(), vectors[:, :5])) == SIZE


@pytest.mark.usefixtures("partial")
def test_the_same_matrix_refreshed_is_as_it_was():
    matrix, _ = matrix_with(SPECTRA["1 / j"])
    old = TopSolver(matrix).top(COUNT)
    found = refreshed(matrix.float(), old.vectors)
    assert (found.values[:COUNT] - old.values[:COUNT]).abs().max() < 1e-5


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_approximate_pairs_hold_what_they_are_said_to_hold(exponent):
    """Rayleigh quotients of orthonormal float32 vectors: none above the eigenvalue at its place but for rounding."""
    truth = torch.arange(1, 601, dtype=torch.float64) ** -exponent
    matrix = matrix_with(truth)[0].float()
    found = eigen.approximate_pairs(matrix, 80)
    assert (found.values <= truth[:80] * (1 + 1e-5)).all()
    assert (found.values[:20] >= 0.98 * truth[:20]).all()
    assert (found.values[:40] >= 0.9 * truth[:40]).all()
    gram = found.vectors.T @ found.vectors
    assert (gram - torch.eye(80)).abs().max() < 1e-5
    held = (found.vectors.double().T @ matrix.double() @ found.vectors.double()).diagonal()
    assert torch.allclose(held, found.values, rtol=1e-4, atol=1e-6)
    off = (matrix.double() @ found.vectors.double() - found.vectors.double() * found.values).norm(dim=0)
    assert torch.allclose(found.residuals, off, rtol=1e-3, atol=1e-6)
    assert found.trace == pytest.approx(float(truth.sum()), rel=1e-5)


def test_approximate_pairs_of_a_small_matrix_are_all_of_them():
    truth = torch.tensor([3.0, 1.0, 0.0])
    found = eigen.approximate_pairs(matrix_with(truth)[0].float(), 256)
    assert torch.allclose(found.values, truth.double(), atol=1e-6)
