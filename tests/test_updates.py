"""Update rules: what they keep inside the subspace, and that their gradients are those of what they stand for."""

from typing import get_args

import pytest
import torch

from crispedit.errors import ConfigError
from crispedit.moments import Sketch
from crispedit.spectrum import Spectrum
from crispedit.subspace import Subspace
from crispedit.updates import Coordinates, Filter, Projected, ProjectedGradient, Update, update_rule
from reference import project_by_equation_6, random_factor, relative

D_OUT, D_IN, ENERGY = 20, 30, 0.8


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    spectra = (torch.arange(1, n + 1, dtype=torch.float64) ** -1.0 for n in (D_IN, D_OUT))
    A, G = (random_factor(spectrum, seed) for seed, spectrum in enumerate(spectra))
    return A, G


@pytest.fixture
def subspace() -> Subspace:
    return Subspace.of(Spectrum.of(*factors()), ENERGY)


def after_adam(rule, steps: int = 20) -> torch.Tensor:
    """What a rule has become of a loss ½ ‖W − target‖², by Adam."""
    target = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([rule.parameter], lr=1e-2)
    for _ in range(steps):
        rule.parameter.grad = rule.gradient(rule.delta() - target)
        optimizer.step()
    return rule.delta()


@pytest.mark.parametrize("name", get_args(Update))
def test_what_stays_in_the_subspace_and_what_does_not(name, subspace):
    """Float32 products: 1e-6. Whether a rule keeps to the subspace is its definition; the published one does not."""
    delta = after_adam(update_rule(name, subspace))
    truth = project_by_equation_6(*factors(), ENERGY, delta)
    outside = float((truth - delta).norm() / delta.norm())
    assert delta.norm() > 0.5
    if name in ("coordinates", "projected"):
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
    with pytest.raises(ConfigError, match=rf"update {name} needs all eigenvectors.*use update projected"):
        update_rule(name, cross)
    delta = after_adam(update_rule("projected", cross))
    assert cross.share_outside(delta) < 1e-5


def test_a_filter_needs_a_threshold(subspace):
    with pytest.raises(ConfigError, match="a soft mask needs a threshold"):
        Filter(Subspace.of(subspace.spectrum, ENERGY, "cross"))


def test_a_filter_of_measured_curvatures_is_that_of_products_if_they_are_products(subspace):
    measured = torch.outer(subspace.spectrum.beta, subspace.spectrum.alpha)
    assert relative(Filter(Subspace.of_table(subspace.spectrum, measured, ENERGY)).shrinkage, subspace.shrinkage) < 1e-6
