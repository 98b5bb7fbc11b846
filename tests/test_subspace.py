"""The low-curvature subspace: the cut, the projection, and what they refuse.

Bases are kept in float32 (relative error 6e-8 per number; some 1e-6 after four small products), so dense
float64 truths are met to 1e-5. Spectra are float64, so cuts are met exactly.
"""

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from crispedit.errors import ConfigError, NumericsError
from crispedit.spectrum import Spectrum
from crispedit.subspace import Subspace, cross_overlap
from crispedit.threshold import energy_threshold, table_threshold
from reference import low_curvature_projector, project_by_equation_6, random_factor, relative, threshold_by_sorting

TOLERANCE = 1e-5
ENERGIES = [0.0, 1e-12, 0.1, 0.5, 0.8, 0.9, 0.99, 0.999]
SHAPES = [(3, 5), (6, 4), (5, 5), (1, 7), (8, 1)]


def power_law(n: int, p: float = 1.0) -> torch.Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64) ** -p


def descending(values: list[float]) -> torch.Tensor:
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


def random_factors(d_out: int, d_in: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric positive definite A and G whose products λ_ij are well apart (exponents without common multiples)."""
    return random_factor(power_law(d_in, 1.37), seed), random_factor(power_law(d_out, 0.83), seed + 1)


def subspace_of(d_out: int, d_in: int, energy: float) -> Subspace:
    return Subspace.of(Spectrum.of(*random_factors(d_out, d_in)), energy)


# ---------------------------------------------------------------- projection


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_row_major_curvature_is_G_kron_A(d_out, d_in):
    A, G = random_factors(d_out, d_in)
    X = torch.randn(d_out, d_in, dtype=torch.float64)
    assert relative((torch.kron(G, A) @ X.flatten()).view_as(X), G @ X @ A) < 1e-12  # float64 throughout


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_project_is_equation_6_and_the_eigenprojection_of_the_kronecker_matrix(d_out, d_in, energy):
    A, G = random_factors(d_out, d_in)
    X = torch.randn(d_out, d_in)
    projected = Subspace.of(Spectrum.of(A, G), energy).project(X)
    by_kronecker, gap = low_curvature_projector(A, G, energy)
    assert gap > 1e-3, "the cut must separate two different curvatures, or the subspace is not unique"
    # relative to X: P(X) itself may be nothing but a small rest
    for truth in (project_by_equation_6(A, G, energy, X), (by_kronecker @ X.double().flatten()).view_as(X)):
        assert (projected - truth).norm() <= TOLERANCE * X.norm()


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95])
def test_the_projection_is_idempotent_symmetric_and_complementary_to_what_is_outside(energy):
    subspace = subspace_of(7, 9, energy)
    X, Y = torch.randn(7, 9), torch.randn(7, 9)
    P_X, P_Y = subspace.project(X), subspace.project(Y)
    assert relative(subspace.project(P_X), P_X) < TOLERANCE
    assert abs(float((Y * P_X).sum() - (P_Y * X).sum())) < TOLERANCE * float(X.norm() * Y.norm())
    assert subspace.share_outside(P_X) < TOLERANCE
    assert subspace.share_outside(X - P_X) == pytest.approx(1, abs=TOLERANCE)
    assert subspace.share_outside(X) == pytest.approx(float((X - P_X).norm() / X.norm()), abs=TOLERANCE)
    assert subspace.share_outside(torch.zeros(7, 9)) == 0


def test_coordinates_are_an_orthogonal_change_of_basis():
    subspace, X = subspace_of(7, 9, 0.8), torch.randn(7, 9)
    Z = subspace.to_coordinates(X)
    assert float(Z.norm()) == pytest.approx(float(X.norm()), rel=TOLERANCE)
    assert relative(subspace.from_coordinates(Z), subspace.project(X)) < TOLERANCE
    assert relative(subspace.to_coordinates(subspace.from_coordinates(Z)), subspace.mask * Z) < TOLERANCE


def test_without_energy_nothing_is_projected_away():
    subspace, X = subspace_of(7, 9, 0.0), torch.randn(7, 9)
    assert relative(subspace.project(X), X) < TOLERANCE
    assert subspace.share_outside(X) == 0


def test_of_equal_curvatures_all_are_high_and_nothing_is_left():
    subspace, X = Subspace.of(Spectrum.of(torch.eye(5), torch.eye(3)), 0.01), torch.randn(3, 5)
    assert subspace.project(X).norm() == 0
    assert subspace.share_outside(X) == pytest.approx(1, abs=TOLERANCE)


def test_the_mask_is_the_table_of_curvatures_below_tau():
    subspace = subspace_of(7, 9, 0.8)
    low = torch.outer(subspace.spectrum.beta, subspace.spectrum.alpha) < subspace.threshold.tau
    assert torch.equal(subspace.mask, low.float())


def test_a_spectrum_is_descending_not_negative_and_rebuilds_its_factors():
    A, G = random_factors(6, 4)
    spectrum = Spectrum.of(A, G)
    for values, basis, factor in (
        (spectrum.alpha, spectrum.input_basis, A),
        (spectrum.beta, spectrum.output_basis, G),
    ):
        assert values.dtype == torch.float64
        assert basis.dtype == torch.float32
        assert bool((values[:-1] >= values[1:]).all())
        assert bool((values >= 0).all())
        assert relative(basis.double() @ values.diag() @ basis.double().T, factor) < TOLERANCE


def test_entries_that_rounding_set_apart_count_alike():
    A = random_factors(3, 4)[0] + 1e-3 * torch.randn(4, 4).triu(1)
    assert torch.equal(Spectrum.of(A, torch.eye(2)).alpha, Spectrum.of(A.T, torch.eye(2)).alpha)


def test_a_factor_of_rank_one_has_no_negative_eigenvalue_left():
    a = torch.randn(20)
    assert float(Spectrum.of(torch.outer(a, a), torch.eye(2)).alpha.min()) >= 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["A", "G"])
def test_factors_that_are_not_finite_are_refused_by_name(name, bad):
    factors = {"A": torch.eye(4), "G": torch.eye(3)}
    factors[name][0, 1] = bad
    with pytest.raises(NumericsError, match=f"factor {name} "):
        Spectrum.of(**factors)


# ---------------------------------------------------------------- threshold

SPECTRA = {
    "flat": (torch.full((5,), 0.5, dtype=torch.float64), torch.full((7,), 0.25, dtype=torch.float64)),
    "power law": (power_law(40), power_law(25)),
    "rank deficient": (descending([4.0, 2.5, 1.0, 0, 0, 0]), descending([3.3, 0.7, 0, 0])),
    "clustered": (descending([9.0] * 3 + [1.0] * 10 + [1e-6] * 7), descending([5.0] * 2 + [1e-3] * 8)),
    "one dominant direction": (descending([1e6, *[1.0] * 30]), descending([1e5, *[0.1] * 20])),
    "one pair": (descending([2.0]), descending([3.0])),
    "far apart": (power_law(30, 8.0), power_law(30, 6.0)),
    "random": (
        torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(descending=True).values,
        torch.rand(45, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).sort(descending=True).values,
    ),
    "nearly tied": (1 + 1e-11 * torch.arange(9, -1, -1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)),
    "zero": (torch.zeros(4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)),
}


def assert_as_by_sorting(alpha, beta, energy):
    tau, num_high, captured, counts = threshold_by_sorting(alpha, beta, energy)
    found = energy_threshold(alpha, beta, energy)
    assert found.tau == tau  # the very product, not a number near it
    assert found.num_high == num_high
    assert torch.equal(found.counts, counts)
    assert found.captured == pytest.approx(captured, rel=1e-12)  # sums in another order
    assert bool((found.counts[:-1] >= found.counts[1:]).all()), "the high pairs are no staircase"


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("name", SPECTRA)
def test_bisection_finds_what_sorting_all_products_finds(name, energy):
    assert_as_by_sorting(*SPECTRA[name], energy)


# whole numbers up to 12 have many equal products, and sums without rounding: ties and exact hits of the energy
tied = st.lists(st.integers(0, 12), min_size=1, max_size=12).map(descending)
scattered = st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=12).map(descending)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(alpha=tied, beta=tied, energy=st.floats(0, 0.999))
def test_bisection_finds_what_sorting_finds_in_any_tied_spectrum(alpha, beta, energy):
    assert_as_by_sorting(alpha, beta, energy)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(alpha=scattered, beta=scattered, energy=st.floats(0, 0.999))
def test_the_threshold_is_the_smallest_set_of_largest_curvatures_with_the_energy(alpha, beta, energy):
    """By its definition; sums are compared to 1e-9, because scattered numbers may hit the energy up to rounding."""
    found = energy_threshold(alpha, beta, energy)
    products = torch.outer(beta, alpha)
    total = float(products.sum())
    above = products > found.tau * (1 + 1e-12)
    assert found.captured >= energy - 1e-9
    assert float(products[above].sum()) < energy * total * (1 + 1e-9) or found.num_high == 0
    assert found.num_high == int(found.counts.sum()) >= int(above.sum())


def test_energy_zero_makes_no_pair_high():
    found = energy_threshold(*SPECTRA["power law"], 0)
    assert (found.tau, found.num_high, found.captured, int(found.counts.sum())) == (float("inf"), 0, 0.0, 0)


@pytest.mark.parametrize("energy", [1e-15, 1e-300])
def test_any_energy_above_zero_makes_the_largest_pair_high(energy):
    found = energy_threshold(*SPECTRA["power law"], energy)
    assert (found.tau, found.num_high, found.counts[0]) == (1.0, 1, 1)


def test_an_energy_too_small_for_float64_is_no_energy():
    assert energy_threshold(power_law(3) * 1e-3, power_law(3), 5e-324).num_high == 0


def test_all_ties_at_the_cut_are_high():
    # products 4, 2, 2, 2, 2, 1, 1, 1, 1 of 16: half of the energy needs 4 + 2 + 2
    found = energy_threshold(descending([2.0, 1.0, 1.0]), descending([2.0, 1.0, 1.0]), 0.5)
    assert (found.tau, found.num_high, found.captured, found.counts.tolist()) == (2.0, 5, 12 / 16, [3, 1, 1])


@pytest.mark.parametrize("energy", [-1e-9, -1.0, 1.0, 1.5, float("nan"), float("inf")])
def test_an_energy_outside_zero_to_one_is_refused(energy):
    with pytest.raises(ConfigError, match="energy is"):
        energy_threshold(*SPECTRA["power law"], energy)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation within makes."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel())
        return result


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.99])
def test_the_cut_at_full_size_takes_a_moment_and_no_table(energy):
    """LLaMA-3-8B's down-projection; section 3 of the design gives 1.7 % high pairs at γ = 0.8."""
    d_out, d_in = 4096, 14336
    alpha, beta = power_law(d_in), power_law(d_out)
    with LargestTensor() as largest:
        started = time.process_time()
        found = energy_threshold(alpha, beta, energy)
    assert time.process_time() - started < 1  # it is some 30 milliseconds
    assert largest.size <= 2 * d_in
    assert found.captured == pytest.approx(energy, abs=1e-4)
    if energy == 0.8:
        assert found.num_high / (d_out * d_in) == pytest.approx(0.017, abs=0.001)


# ---------------------------------------------------------------- other constraints


@pytest.mark.parametrize("energy", [0.0, 0.3, 0.8, 0.999])
def test_a_table_of_products_is_cut_where_the_spectrum_is(energy):
    A, G = random_factor(torch.rand(9) + 0.1, 0), random_factor(torch.rand(7) + 0.1, 1)
    spectrum = Spectrum.of(A, G)
    products = torch.outer(spectrum.beta, spectrum.alpha)
    staircase, table = Subspace.of(spectrum, energy), Subspace.of_table(spectrum, products, energy)
    assert torch.equal(staircase.mask, table.mask)
    assert table.threshold.num_high == staircase.threshold.num_high
    assert table.threshold.captured == pytest.approx(staircase.threshold.captured, abs=1e-12)
    X = torch.randn(7, 9)
    assert (table.project(X) - staircase.project(X)).norm() < 1e-5 * X.norm()


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 5), min_size=6, max_size=6), st.floats(1e-6, 0.999))
def test_a_table_is_cut_at_the_smallest_set_of_its_largest_numbers(numbers, energy):
    threshold = table_threshold(torch.tensor(numbers).reshape(2, 3).float(), energy)
    if sum(numbers) == 0:
        assert threshold.num_high == 0
        return
    high = [n for n in numbers if n >= threshold.tau]
    assert sum(high) >= energy * sum(numbers) - 1e-6
    assert sum(n for n in numbers if n > threshold.tau) < energy * sum(numbers)
    assert threshold.num_high == len(high) == int(threshold.counts.sum())
    assert threshold.captured == pytest.approx(sum(high) / sum(numbers))


def test_inputs_alone_are_a_projection_off_the_leading_directions_of_A():
    """G = I: all pairs of a column are equal, so columns are left out whole, as in Adam-NSCL."""
    A, G = random_factor(1 / torch.arange(1, 13).double(), 0), random_factor(torch.rand(5) + 0.1, 1)
    subspace = Subspace.of(Spectrum.of(A, G).of_inputs(), 0.8)
    values, vectors = torch.linalg.eigh(A)
    values, vectors = values.flip(0), vectors.flip(1)
    c = int((values.cumsum(0) < 0.8 * values.sum()).sum()) + 1
    off = torch.eye(12, dtype=torch.float64) - vectors[:, :c] @ vectors[:, :c].T
    X = torch.randn(5, 12, dtype=torch.float64)
    assert relative(subspace.project(X.float()), X @ off) < 1e-5
    assert subspace.threshold.num_high == 5 * c


def test_the_overlap_of_two_crosses_is_that_of_their_projectors():
    subspaces = [
        Subspace.of(
            Spectrum.of(
                random_factor(1 / torch.arange(1, 9).double(), seed), random_factor(torch.rand(6) + 0.1, seed + 1)
            ),
            0.6,
            "cross",
        )
        for seed in (0, 5)
    ]
    Q = []
    for subspace in subspaces:
        (r, c), spectrum = subspace.threshold.cross, subspace.spectrum
        P_G = spectrum.output_basis[:, :r] @ spectrum.output_basis[:, :r].T
        P_A = spectrum.input_basis[:, :c] @ spectrum.input_basis[:, :c].T
        Q.append(torch.eye(48) - torch.kron(torch.eye(6) - P_G, torch.eye(8) - P_A))
        assert float(Q[-1].trace()) == pytest.approx(subspace.threshold.num_high, abs=1e-4)
    expected = float((Q[0] @ Q[1]).trace() / (Q[0].trace() * Q[1].trace()) ** 0.5)
    assert cross_overlap(*subspaces) == pytest.approx(expected, abs=1e-5)
    assert cross_overlap(subspaces[0], subspaces[0]) == pytest.approx(1, abs=1e-5)


def test_what_is_not_known_is_counted_for_as_little_as_it_may_be():
    """A cross that is known for certain, where the smallest might lie among what is unknown."""
    A, G = random_factor(1 / torch.arange(1, 41).double(), 0), random_factor(1 / torch.arange(1, 31).double(), 1)
    whole = Spectrum.of(A, G)
    top = replace(
        whole, alpha=whole.alpha[:14], beta=whole.beta[:12], input_basis=whole.input_basis[:, :14],
        output_basis=whole.output_basis[:, :12],
    )  # fmt: skip
    for spectra in (top.at_most(), top.spread_out()):
        assert [len(s) for s in spectra] == [40, 30]
        assert [float(s.sum()) for s in spectra] == pytest.approx(list(whole.traces))
    found = [energy for energy in (0.3, 0.5, 0.7, 0.8, 0.9, 0.97) if top.known_cross(energy)]
    assert 0.3 in found
    assert 0.97 not in found
    for energy in found:
        r, c = top.known_cross(energy).cross
        held = 1 - float(whole.beta[r:].sum() / whole.traces[1]) * float(whole.alpha[c:].sum() / whole.traces[0])
        assert held >= energy - 1e-9
        assert top.known_cross(energy).captured == pytest.approx(held, abs=1e-9)
