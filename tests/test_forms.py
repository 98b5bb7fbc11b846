"""The forms of the projection: equal where they must be, minimal where they claim it, and known from the top alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crispedit import eigen
from crispedit.errors import ConfigError
from crispedit.spectrum import Spectrum
from crispedit.subspace import Subspace
from crispedit.threshold import cross_threshold, energy_threshold
from crispedit.updates import LeadingCoordinates
from reference import project_by_equation_6, random_factor, relative

ENERGIES = [0.0, 0.1, 0.5, 0.8, 0.95, 0.999]
SHAPES = [(40, 90), (64, 33), (7, 9), (1, 7), (8, 1)]


def power_law(n: int, p: float = 1.0) -> torch.Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64) ** -p


def factors(d_out: int, d_in: int, p: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    return random_factor(power_law(d_in, p), 0), random_factor(power_law(d_out, 0.83 * p), 1)


def cross_by_search(alpha, beta, energy) -> int:
    """The fewest pairs of any cross that holds the energy, by trying all of them."""
    products = torch.outer(beta, alpha)
    total, fewest = float(products.sum()), math.inf
    for r in range(len(beta) + 1):
        for c in range(len(alpha) + 1):
            if total - float(products[r:, c:].sum()) >= energy * total * (1 - 1e-12):
                fewest = min(fewest, r * len(alpha) + c * (len(beta) - r))
    return int(fewest)


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_the_pivot_is_equation_6(d_out, d_in, energy):
    """Float32 products of float32 bases: some 1e-7 of X, asked for to 1e-5."""
    A, G = factors(d_out, d_in)
    spectrum, X = Spectrum.of(A, G), torch.randn(d_out, d_in)
    truth = project_by_equation_6(A, G, energy, X) if energy else X
    for form in ("pivot", "equation6"):
        subspace = Subspace.of(spectrum, energy, form)
        assert subspace.form == form
        assert (subspace.project(X) - truth).norm() <= 1e-5 * X.norm()
        share = float((X - truth).norm() / X.norm())
        assert subspace.share_outside(X) == pytest.approx(share, abs=1e-5)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    alpha=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    beta=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    energy=st.floats(0, 0.999),
)
def test_the_pivot_is_equation_6_on_any_staircase(alpha, beta, energy):
    """Ties, zeros and staircases of every outline, in the identity's basis."""
    A, G = (torch.tensor(sorted(v, reverse=True), dtype=torch.float64).diag() for v in (alpha, beta))
    spectrum = Spectrum.of(A, G)
    X = torch.randn(len(beta), len(alpha), generator=torch.Generator().manual_seed(0))
    pivot, dense = (Subspace.of(spectrum, energy, form) for form in ("pivot", "equation6"))
    assert (pivot.project(X) - dense.project(X)).norm() <= 1e-5 * X.norm()
    assert pivot.share_outside(X) == pytest.approx(dense.share_outside(X), abs=1e-6)


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_the_cross_is_a_two_sided_projection_off_the_fewest_pairs(d_out, d_in, energy):
    A, G = factors(d_out, d_in)
    spectrum, X = Spectrum.of(A, G), torch.randn(d_out, d_in, dtype=torch.float64)
    subspace = Subspace.of(spectrum, energy, "cross")
    U_G, U_A = (torch.linalg.eigh(M)[1].flip(1) for M in (G, A))
    r, c = subspace.threshold.cross
    off_G = torch.eye(d_out, dtype=torch.float64) - U_G[:, :r] @ U_G[:, :r].T
    off_A = torch.eye(d_in, dtype=torch.float64) - U_A[:, :c] @ U_A[:, :c].T
    assert (subspace.project(X.float()) - off_G @ X @ off_A).norm() <= 1e-5 * X.norm()
    assert subspace.threshold.num_high == cross_by_search(spectrum.alpha, spectrum.beta, energy)
    high = torch.outer(spectrum.beta, spectrum.alpha)[subspace.mask == 0].sum()
    assert subspace.threshold.captured == pytest.approx(float(high / (A.trace() * G.trace())), abs=1e-9)
    assert subspace.threshold.captured >= energy - 1e-9


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    alpha=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    beta=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    energy=st.floats(1e-9, 0.999),
)
def test_no_cross_with_the_energy_is_smaller(alpha, beta, energy):
    alpha, beta = (torch.tensor(sorted(v, reverse=True), dtype=torch.float64) for v in (alpha, beta))
    found = cross_threshold(alpha, beta, energy)
    assert found.num_high == int(found.counts.sum())
    if float(alpha.sum() * beta.sum()) > 0:
        assert found.num_high == pytest.approx(cross_by_search(alpha, beta, energy))
    else:
        assert found.num_high == 0


def test_the_cross_of_the_design():
    """Spectra that fall like 1/j at 4096 × 14336, γ = 0.8: r = 59, c = 201, 2.8 % of the pairs (design, section 3)."""
    found = cross_threshold(power_law(14336), power_law(4096), 0.8)
    assert found.cross == (59, 201)
    assert found.num_high / (4096 * 14336) == pytest.approx(0.028, abs=5e-4)


@pytest.fixture
def partial(monkeypatch):
    """Narrow blocks, and never the dense diagonalisation."""
    monkeypatch.setattr(eigen, "DENSE_SIZE", 0)
    monkeypatch.setattr(eigen, "DENSE_SHARE", float("inf"))
    monkeypatch.setattr(eigen, "BLOCK", 8)


J = torch.arange(1, 301, dtype=torch.float64)
TOPS = {
    "1 / j": 1 / J,
    "1 / j ** 1.5": J**-1.5,
    "a step": torch.where(J <= 9, 1.0, 0.01) * (1 + 1e-4 / J),
    "rank 5": torch.where(J <= 5, 1 / J, 0.0),
    "clusters": 2.0 ** -torch.div(J - 1, 10, rounding_mode="floor"),
    "one dominant direction": torch.where(J == 1, 1e4, J**-1.5),
}


def same_cross(top: Spectrum, A: torch.Tensor, G: torch.Tensor, energy: float) -> None:
    """Of the complete spectrum: the same cross, the same energy, the same drift ½⟨Δ, GΔA⟩ of what is left of a step.

    Where the cut is inside a cluster, the spaces are not determined, and the drift is the same for the mean of all
    steps alone: the product of what the bases leave of A and of G. Float32 bases are orthonormal to some 1e-7.
    """
    whole = Spectrum.of(A, G)
    expected, found = Subspace.of(whole, energy, "cross"), Subspace.of(top, energy, "cross")
    r, c = expected.threshold.cross
    assert found.threshold.cross == (r, c)
    assert found.threshold.captured == pytest.approx(expected.threshold.captured, abs=1e-11)

    def left(M: torch.Tensor, basis: torch.Tensor, count: int) -> float:
        U = basis[:, :count].double()
        return 1 - float((U * (M @ U)).sum() / M.trace())

    for M, count, mine, theirs in (
        (A, c, top.input_basis, whole.input_basis),
        (G, r, top.output_basis, whole.output_basis),
    ):
        assert left(M, mine, count) == pytest.approx(left(M, theirs, count), rel=1e-6, abs=1e-7)

    cuts = [(values, k) for values, k in ((whole.alpha, c), (whole.beta, r)) if k]
    if all(values[k - 1] - values[k] > 1e-3 * values[k - 1] for values, k in cuts):
        X = torch.randn(*top.shape, generator=torch.Generator().manual_seed(5))
        assert relative(found.project(X), expected.project(X)) < 1e-5
        drifts = [float((P * (G @ P @ A)).sum()) / 2 for P in (s.project(X).double() for s in (found, expected))]
        of_X = float((X.double() * (G @ X.double() @ A)).sum()) / 2
        assert drifts[0] == pytest.approx(drifts[1], rel=1e-6, abs=1e-9 * of_X)


@pytest.mark.usefixtures("partial")
@pytest.mark.parametrize("energy", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("name", TOPS)
def test_the_cross_is_known_from_the_top_alone(name, energy):
    """The partial spectrum gives the very cross of the complete one, proven by the traces, with a basis as good."""
    A, G = random_factor(TOPS[name], 0), random_factor(power_law(120, 1.2), 1)
    top = Spectrum.for_cross(A, G, energy)
    assert not top.complete
    same_cross(top, A, G, energy)
    r, c = Subspace.of(top, energy).threshold.cross
    assert len(top.alpha) <= c + 1  # no more is held than the cross and the pair beyond it
    assert len(top.beta) <= r + 1


@pytest.mark.usefixtures("partial")
def test_what_a_search_leaves_over_follows_the_eigenvectors():
    """Orthonormal to them and to each other, 1e-5 in float32; and nearly what holds most of the rest."""
    A, G = factors(120, 300, p=1.2)
    top = Spectrum.for_cross(A, G, 0.8)
    inputs, outputs = top.leading_vectors()
    assert top.num_vectors == (inputs.shape[1], outputs.shape[1])
    assert inputs.shape[1] > len(top.alpha)
    assert torch.equal(inputs[:, : len(top.alpha)], top.input_basis)
    assert (inputs.T @ inputs - torch.eye(inputs.shape[1])).norm() < 1e-5
    k = len(top.alpha) + 4
    held = float(((A @ inputs[:, :k].double()) * inputs[:, :k]).sum())
    assert held >= 0.99 * float(torch.linalg.eigvalsh(A).flip(0)[:k].sum())
    rule = LeadingCoordinates(Subspace.of(top, 0.8), rotation=0.4)
    assert rule.frame.inputs.V.shape[1] > top.known_cross(0.8).cross[1]
    Z = rule.gradient(torch.randn(120, 300))
    assert Subspace.of(top, 0.8).share_outside(rule.frame.matrix(Z)) < 1e-5
    assert top.leading(5, 5).num_vectors == (5, 5)


@pytest.mark.usefixtures("partial")
def test_the_cross_of_factors_that_changed_is_that_of_a_fresh_start():
    """New tokens turn the leading directions, and bring one that the old spectrum knows nothing of."""
    A, G = factors(120, 300, p=1.2)
    tokens = torch.randn(50, 300, generator=torch.Generator().manual_seed(7), dtype=torch.float64) / 300**0.5
    tokens[:, 17] += 1.0
    later = 0.99 * A + 0.01 * tokens.T @ tokens
    top = Spectrum.for_cross(later, G, 0.8, start=Spectrum.for_cross(A, G, 0.8))
    assert not top.complete
    same_cross(top, later, G, 0.8)


def test_a_flat_spectrum_is_diagonalised_whole():
    """Its cross takes more eigenvectors than a search is worth."""
    A, G = (
        random_factor(torch.ones(600, dtype=torch.float64) + 1e-3 * power_law(600), 0),
        random_factor(power_law(30), 1),
    )
    top = Spectrum.for_cross(A, G, 0.99)
    assert top.complete
    same_cross(top, A, G, 0.99)


def test_a_partial_spectrum_refuses_what_it_does_not_know():
    spectrum = Spectrum.of(*factors(30, 50))
    first = {"alpha": spectrum.alpha[:5], "beta": spectrum.beta[:4]}
    bases = {"input_basis": spectrum.input_basis[:, :5], "output_basis": spectrum.output_basis[:, :4]}
    partial = Spectrum(**first, **bases, traces=spectrum.traces, residuals=spectrum.residuals)
    with pytest.raises(ConfigError, match="form pivot needs all eigenvectors; this spectrum has only leading ones"):
        Subspace.of(partial, 0.8, "pivot")
    with pytest.raises(ConfigError, match=r"a cross at energy 0\.99 takes more than the 4 .* of G and 5 of A"):
        Subspace.of(partial, 0.99)
    with pytest.raises(ConfigError, match=r"form is 'pivott'.*did you mean 'pivot'"):
        Subspace.of(spectrum, 0.8, "pivott")


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("p", [0.8, 1.0, 1.5])
def test_the_cheaper_exact_form_is_chosen(energy, p):
    d_out, d_in = 256, 896
    alpha, beta = power_law(d_in, p), power_law(d_out, p)
    spectrum = Spectrum(
        alpha=alpha, beta=beta, input_basis=torch.eye(d_in), output_basis=torch.eye(d_out),
        traces=(float(alpha.sum()), float(beta.sum())), residuals=(0 * alpha, 0 * beta),
    )  # fmt: skip
    forms = {form: Subspace.of(spectrum, energy, form) for form in ("pivot", "equation6", "cross", "auto")}
    assert forms["auto"].flops == min(forms["pivot"].flops, forms["equation6"].flops)
    assert forms["pivot"].flops <= 1.01 * forms["equation6"].flops
    assert forms["cross"].num_bytes < forms["pivot"].num_bytes <= forms["equation6"].num_bytes
    exact = energy_threshold(alpha, beta, energy)
    assert forms["cross"].threshold.num_high >= exact.num_high == forms["pivot"].threshold.num_high


@pytest.mark.parametrize(("energy", "less"), [(0.8, 10), (0.9, 4)])
def test_the_flops_of_the_pivot_at_full_size(energy, less):
    """The design counts a tenth of eq. 6 at γ 0.8 and a fourth at 0.9, for spectra like 1/j and no blocks."""
    from crispedit.subspace import _Pivot

    d_out, d_in = 4096, 14336
    pivot = _Pivot(energy_threshold(power_law(d_in), power_law(d_out), energy).counts, d_in)
    assert 4 * d_out * d_in * (d_out + d_in) / pivot.flops >= less


@pytest.mark.parametrize("form", ["pivot", "cross"])
def test_the_flops_are_those_of_the_products(form):
    from torch.utils.flop_counter import FlopCounterMode

    subspace = Subspace.of(Spectrum.of(*factors(60, 150)), 0.8, form)
    X = torch.randn(60, 150)

    def added_in_place(_, a, b, *__, **___):  # torch counts addmm, and not this
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_in_place}) as counter:
        subspace.project(X)
    assert counter.get_total_flops() == subspace.flops
