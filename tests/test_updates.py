"""Update rules: what they keep inside the subspace, and that their gradients are those of what they stand for."""

from typing import get_args

import pytest
import torch

from crispedit.eigen import full_eigenpairs
from crispedit.errors import ConfigError
from crispedit.moments import Sketch
from crispedit.rule_choice import (
    AFFORDABLE,
    TOKENS,
    chosen_update,
    coordinates_cost_little,
    step_flops,
    update_rule,
)
from crispedit.spectrum import Spectrum
from crispedit.subspace import Subspace
from crispedit.threshold import cross_threshold, energy_threshold
from crispedit.updates import (
    Coordinates,
    Filter,
    LeadingCoordinates,
    Projected,
    ProjectedGradient,
    Update,
    leading_counts,
)
from reference import project_by_equation_6, random_factor, relative

D_OUT, D_IN, ENERGY = 20, 30, 0.8


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    spectra = (torch.arange(1, n + 1, dtype=torch.float64) ** -1.0 for n in (D_IN, D_OUT))
    A, G = (random_factor(spectrum, seed) for seed, spectrum in enumerate(spectra))
    return A, G


@pytest.fixture
def subspace() -> Subspace:
    return Subspace.of(Spectrum.of(*factors()), ENERGY)


def applied(rule) -> torch.Tensor:
    """The change of W that a rule stands for, whatever the bases in which it is written."""
    return rule.delta() if rule.frame is None else rule.frame.matrix(rule.delta())


def after_adam(rule, steps: int = 20) -> torch.Tensor:
    """What a rule has become of a loss ½ ‖W − target‖², by Adam."""
    target = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([rule.parameter], lr=1e-2)
    for _ in range(steps):
        gradient = applied(rule) - target
        rule.parameter.grad = rule.gradient(gradient if rule.frame is None else rule.frame.coordinates(gradient))
        optimizer.step()
    return applied(rule)


@pytest.mark.parametrize("name", get_args(Update))
def test_what_stays_in_the_subspace_and_what_does_not(name, subspace):
    """Float32 products: 1e-6. Whether a rule keeps to the subspace is its definition; the published one does not."""
    if name == "leading":
        return  # of a cross: below
    delta = after_adam(update_rule(name, subspace))
    truth = project_by_equation_6(*factors(), ENERGY, delta)
    outside = float((truth - delta).norm() / delta.norm())
    assert delta.norm() > 0.5
    if name in ("coordinates", "projected", "update-projected"):
        assert outside < 1e-5
    else:
        assert outside > 0.05


@pytest.mark.parametrize("rule", [Coordinates, Projected])
def test_a_gradient_is_that_of_what_the_parameter_stands_for(rule, subspace):
    rule = rule(subspace)
    weight_gradient = torch.randn(D_OUT, D_IN)
    rule.parameter = rule.parameter.clone().requires_grad_()
    (expected,) = torch.autograd.grad((weight_gradient * rule.delta()).sum(), rule.parameter)
    assert relative(rule.gradient(weight_gradient), expected) < 1e-6


def test_the_filter_is_the_penalised_step(subspace):
    """argmin over z of −g z + (z² + (λ/μ) z²) / 2 is g μ / (λ + μ), for every pair of directions."""
    rule = Filter(subspace)
    spectrum, tau = subspace.spectrum, subspace.threshold.tau
    products = torch.outer(spectrum.beta, spectrum.alpha)
    assert relative(rule.shrinkage, 1 / (1 + products / tau)) < 1e-6
    assert float(rule.shrinkage.flatten()[(products - tau).abs().argmin()]) == pytest.approx(0.5, abs=1e-6)
    rule.parameter = torch.randn(D_OUT, D_IN)
    assert (
        relative(spectrum.output_basis.T @ rule.delta() @ spectrum.input_basis, rule.shrinkage * rule.parameter) < 1e-5
    )
    unfiltered = Filter(Subspace.of(spectrum, 0.0))
    assert bool((unfiltered.shrinkage == 1).all())


def test_the_published_rule_projects_the_gradient_only(subspace):
    rule = ProjectedGradient(subspace)
    g = torch.randn(D_OUT, D_IN)
    assert relative(rule.gradient(g), project_by_equation_6(*factors(), ENERGY, g)) < 1e-5
    rule.parameter = torch.randn(D_OUT, D_IN)
    assert torch.equal(rule.delta(), rule.parameter)


@pytest.mark.parametrize("name", ["coordinates", "filter"])
def test_coordinates_need_all_eigenvectors(name):
    A, G = factors()
    spectrum = Spectrum.of_pairs(Sketch.of(A).eigenpairs, Sketch.of(G).eigenpairs)
    cross = Subspace.of(spectrum, 0.3)
    with pytest.raises(ConfigError, match=rf"update {name} needs all eigenvectors.*use update leading"):
        update_rule(name, cross)
    for inside in ("projected", "update-projected", "leading", "auto"):
        delta = after_adam(update_rule(inside, cross))
        assert delta.norm() > 0.5
        assert cross.share_outside(delta) < 1e-5


def cross_of(d_out: int, d_in: int, energy: float = ENERGY) -> Subspace:
    """A cross for spectra like 1/j, with the identity's bases."""
    alpha, beta = (torch.arange(1, n + 1, dtype=torch.float64) ** -1.0 for n in (d_in, d_out))
    spectrum = Spectrum.of_pairs(full_eigenpairs(alpha.diag()), full_eigenpairs(beta.diag()))
    return Subspace.of(spectrum, energy, "cross")


@pytest.mark.parametrize("energy", [0.0, 0.3, 0.6, 0.9])
def test_leading_coordinates_stay_off_the_cross_for_any_number_of_leading_vectors(energy):
    """Against the dense two-sided projection, in float64, by the eigenvectors themselves. Float32 bases: 1e-6."""
    A, G = factors()
    cross = Subspace.of(Spectrum.of(A, G), energy, "cross")
    U_G, U_A = (torch.linalg.eigh(M)[1].flip(1) for M in (G, A))
    r, c = cross.threshold.cross
    off_G = torch.eye(D_OUT, dtype=torch.float64) - U_G[:, :r] @ U_G[:, :r].T
    off_A = torch.eye(D_IN, dtype=torch.float64) - U_A[:, :c] @ U_A[:, :c].T
    seen = set()
    for rotation in (0.0, 0.1, 0.5, 1.0, 2.0, 4.0):
        counts = leading_counts(cross, rotation)
        assert counts[0] >= r
        assert counts[1] >= c
        seen.add(counts)
        delta = after_adam(LeadingCoordinates(cross, rotation)).double()
        assert delta.norm() > 0.5
        assert (off_G @ delta @ off_A - delta).norm() <= 1e-5 * delta.norm()
    assert len(seen) > 2
    assert (D_OUT, D_IN) in seen


def test_with_all_vectors_leading_they_are_the_coordinates():
    """Of the same cross. An eigenvector's sign is free, and Adam's steps do not depend on it."""
    cross = Subspace.of(Spectrum.of(*factors()), ENERGY, "cross")
    assert relative(after_adam(LeadingCoordinates(cross, 4.0)), after_adam(Coordinates(cross))) < 1e-5


def test_leading_coordinates_are_for_a_cross(subspace):
    with pytest.raises(ConfigError, match="update leading leaves out whole rows and columns: use constraint cross"):
        update_rule("leading", subspace)


def test_the_flops_of_leading_coordinates_are_those_of_their_bases():
    cross = cross_of(60, 150, 0.5)
    frame = LeadingCoordinates(cross).frame
    assert step_flops("leading", cross, tokens=7) == 7 * frame.flops


@pytest.mark.parametrize(
    ("shape", "energy", "counts"),
    [((768, 3072), 0.8, (768, 134)), ((4096, 14336), 0.8, (4096, 643)), ((4096, 14336), 0.9, (4096, 709))],
)
def test_what_leading_coordinates_cost_at_full_size(shape, energy, counts):
    """Spectra like 1/j, all of G known: four tenths of what the matrix itself costs unless the cross takes more. A
    staircase is projected off in the cheaper way."""
    d_out, d_in = shape
    alpha, beta = (torch.arange(1, n + 1, dtype=torch.float64) ** -1.0 for n in (d_in, d_out))
    spectrum = Spectrum(
        alpha=alpha, beta=beta, input_basis=torch.empty(d_in, 0), output_basis=torch.empty(d_out, 0),
        traces=(float(alpha.sum()), float(beta.sum())), residuals=(0 * alpha, 0 * beta),
    )  # fmt: skip
    cross = Subspace(spectrum=spectrum, threshold=cross_threshold(alpha, beta, energy), form="cross")
    assert leading_counts(cross) == counts
    assert step_flops("leading", cross) <= (0.4 if energy == 0.8 else 0.43) * 6 * d_out * d_in * TOKENS
    stairs = Subspace(spectrum=spectrum, threshold=energy_threshold(alpha, beta, energy), form="pivot")
    assert chosen_update(cross) == "leading"
    assert chosen_update(stairs) == "update-projected"
    assert not coordinates_cost_little(shape)


def test_auto_is_coordinates_where_they_cost_little(subspace):
    assert isinstance(update_rule("auto", subspace), Coordinates)
    assert coordinates_cost_little((256, 576))  # the bundled model's
    assert step_flops("coordinates", subspace) <= AFFORDABLE * 6 * D_OUT * D_IN * TOKENS
    assert step_flops("update-projected", subspace) * 2 == step_flops("projected", subspace) == 2 * subspace.flops


def test_a_filter_needs_a_threshold(subspace):
    with pytest.raises(ConfigError, match="a soft mask needs a threshold"):
        Filter(Subspace.of(subspace.spectrum, ENERGY, "cross"))


def test_a_filter_of_measured_curvatures_is_that_of_products_if_they_are_products(subspace):
    measured = torch.outer(subspace.spectrum.beta, subspace.spectrum.alpha)
    assert relative(Filter(Subspace.of_table(subspace.spectrum, measured, ENERGY)).shrinkage, subspace.shrinkage) < 1e-6


def other_subspace() -> Subspace:
    A, G = factors()
    turned = []
    for M in (A, G):
        noise = torch.randn(M.shape, generator=torch.Generator().manual_seed(len(M)))
        Q = torch.linalg.qr(noise.to(M.dtype)).Q
        turned.append(Q @ M @ Q.T)
    return Subspace.of(Spectrum.of(*turned), ENERGY)


def random_moments() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(D_OUT, D_IN), torch.rand(D_OUT, D_IN)


@pytest.mark.parametrize("update", ["coordinates", "filter"])
def test_moments_in_one_eigenbasis_are_turned_into_another(subspace, update):
    """The mean as a matrix; the square as the diagonal of R diag(square) Rᵀ, R written out as a Kronecker product."""
    mean, square = random_moments()
    before, after = update_rule(update, subspace), update_rule(update, other_subspace())
    of_mean, of_square = after.carried(before, mean, square)
    (U_G, U_A), (V_G, V_A) = ((s.spectrum.output_basis, s.spectrum.input_basis) for s in (subspace, after.subspace))
    expected = V_G.T @ (U_G @ mean @ U_A.T) @ V_A
    if update == "coordinates":
        expected = after.subspace.mask * expected
        assert (of_mean[after.subspace.mask == 0] == 0).all()  # or Adam would go on moving there
    assert relative(of_mean, expected) < 1e-5
    R = torch.kron(V_G.T @ U_G, V_A.T @ U_A)  # rows of matrices one after the other
    diagonal = (R @ torch.diag(square.flatten()) @ R.T).diagonal().reshape(D_OUT, D_IN)
    assert relative(of_square, diagonal) < 1e-5


def test_moments_in_the_same_basis_stay_and_others_are_projected_or_refused(subspace):
    mean, square = random_moments()
    same = Coordinates(subspace).carried(Coordinates(subspace), subspace.mask * mean, square)
    assert relative(same[0], subspace.mask * mean) < 1e-5
    assert relative(same[1], square) < 1e-5
    for rule in (Projected(subspace), ProjectedGradient(subspace)):
        of_mean, of_square = rule.carried(rule, mean, square)
        assert relative(of_mean, project_by_equation_6(*factors(), ENERGY, mean)) < 1e-4
        assert of_square is square
    cross = Subspace.of(Spectrum.of(*factors()), ENERGY, "cross")
    with pytest.raises(ConfigError, match="optimizer kept does not go with update leading"):
        LeadingCoordinates(cross).carried(LeadingCoordinates(cross), mean, square)
