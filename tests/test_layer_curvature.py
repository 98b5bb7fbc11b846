"""The exact curvatures of one matrix, and all that is made of the same terms, against brute force and curvlinops.

A network with 7 inputs, 5 hidden units and 3 classes, in float64; sums of some forty terms in another order agree to
1e-12. Dense truths come from autograd through the whole network, which knows of no Kronecker product.
"""

import pytest
import torch
from curvlinops import EKFACLinearOperator, GGNLinearOperator, HessianLinearOperator, KFACLinearOperator
from torch import nn
from torch.autograd.functional import hessian as dense_hessian

from crispedit.experiments.constraints import CONSTRAINTS, Known
from crispedit.experiments.layer import LayerCurvature, relative_difference
from crispedit.experiments.oracle import against_curvlinops
from crispedit.experiments.quality import qualities
from crispedit.spectrum import Spectrum
from reference import relative

EXACT = 1e-12
D_IN, D_OUT, CLASSES, IMAGES = 7, 5, 3, 40


def layer_of(activation: type[nn.Module] = nn.ReLU, *, images: int = IMAGES, rank: int = D_IN) -> LayerCurvature:
    """A small network; inputs that span only ``rank`` directions."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    above = nn.Sequential(activation(), nn.Linear(D_OUT, CLASSES, dtype=torch.float64))
    above[1].weight.data, above[1].bias.data = normal(CLASSES, D_OUT), normal(CLASSES)
    return LayerCurvature(
        weight=normal(D_OUT, D_IN),
        bias=normal(D_OUT),
        inputs=normal(images, rank) @ normal(rank, D_IN),
        labels=torch.arange(images) % CLASSES,
        above=above.requires_grad_(False),
    )


def logits(layer: LayerCurvature, weight: torch.Tensor) -> torch.Tensor:
    return layer.above(layer.inputs @ weight.view(D_OUT, D_IN).T + layer.bias)


def hessian_by_autograd(layer: LayerCurvature) -> torch.Tensor:
    return dense_hessian(lambda w: nn.functional.cross_entropy(logits(layer, w), layer.labels), layer.weight.flatten())


def gauss_newton_by_autograd(layer: LayerCurvature) -> torch.Tensor:
    """E[Jᵀ (diag p − p pᵀ) J] with the Jacobian of the logits in W."""
    J = torch.autograd.functional.jacobian(lambda w: logits(layer, w), layer.weight.flatten())
    p = logits(layer, layer.weight).softmax(1)
    return sum(Jn.T @ (pn.diag() - torch.outer(pn, pn)) @ Jn for Jn, pn in zip(J, p, strict=True)) / len(p)


def operator_inputs(layer: LayerCurvature) -> tuple:
    linear = nn.Linear(D_IN, D_OUT, dtype=torch.float64)
    linear.weight.data, linear.bias.data = layer.weight.clone(), layer.bias.clone()
    data = [(layer.inputs, layer.labels)]
    return nn.Sequential(linear, layer.above), nn.CrossEntropyLoss(), [linear.weight], data


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_both_exact_curvatures_are_those_of_autograd_and_of_curvlinops(activation):
    layer, identity = layer_of(activation), torch.eye(D_OUT * D_IN, dtype=torch.float64)
    for ours, truth, operator, kind in (
        (layer.hessian(), hessian_by_autograd(layer), HessianLinearOperator, "hessian"),
        (layer.gauss_newton(layer.roots()), gauss_newton_by_autograd(layer), GGNLinearOperator, "gnh"),
    ):
        assert relative(ours, truth) < EXACT
        assert relative(ours, operator(*operator_inputs(layer), check_deterministic=False) @ identity) < EXACT
        assert against_curvlinops(layer, ours, kind) < EXACT
        assert against_curvlinops(layer, 2 * ours, kind) == pytest.approx(1)


def test_the_hessian_is_the_gnh_with_relu_and_is_not_with_tanh():
    """Between its kinks a ReLU network is linear in one matrix: ∂²z/∂W² = 0."""
    for activation, same in ((nn.ReLU, True), (nn.Tanh, False)):
        layer = layer_of(activation)
        difference = relative_difference(layer.hessian(), layer.gauss_newton(layer.roots()))
        assert difference < EXACT if same else difference > 0.05


def test_sums_over_chunks_are_those_of_one(monkeypatch):
    layer = layer_of(nn.Tanh)
    roots = layer.roots()
    whole = layer.hessian(), layer.gauss_newton(roots), *layer.optimal_factors(roots)
    monkeypatch.setattr("crispedit.experiments.layer.CHUNK", 7)
    layer = layer_of(nn.Tanh)
    parts = layer.hessian(), layer.gauss_newton(layer.roots()), *layer.optimal_factors(layer.roots())
    assert max(relative(part, one) for part, one in zip(parts, whole, strict=True)) < EXACT


def test_kfac_factors_are_those_of_curvlinops():
    """Type 2: expectation over labels, exactly. curvlinops takes the scale of the mean out of the factor itself."""
    layer = layer_of()
    for fisher, (A, G) in (("type-2", layer.factors(layer.roots())), ("empirical", layer.empirical_factors())):
        operator = KFACLinearOperator(*operator_inputs(layer), fisher_type=fisher, check_deterministic=False)
        operator.compute_kronecker_factors()
        assert relative(A, operator._input_covariances["0"]) < EXACT
        assert relative(G, operator._gradient_covariances["0"]) < EXACT


def test_ekfac_moments_are_those_of_curvlinops_and_the_diagonal_of_the_gnh():
    layer = layer_of()
    operator = EKFACLinearOperator(*operator_inputs(layer), fisher_type="type-2", check_deterministic=False)
    operator.compute_kronecker_factors()
    operator.compute_eigenvalue_correction()
    U_A, U_G = operator._input_covariances_eigenvectors["0"], operator._gradient_covariances_eigenvectors["0"]
    ours, roots = layer.moments(layer.roots(), U_G, U_A), layer.roots()
    assert relative(ours, operator._corrected_eigenvalues["0"][0]) < EXACT
    basis = torch.kron(U_G, U_A)
    assert relative(ours.flatten(), (basis.T @ layer.gauss_newton(roots) @ basis).diagonal()) < EXACT


def test_optimal_factors_are_the_leading_singular_pair_of_the_rearrangement():
    """The iteration ends at relative changes of 1e-10; its error is at most some ten times that."""
    layer = layer_of()
    roots = layer.roots()
    A, G = layer.optimal_factors(roots)
    dense = layer.gauss_newton(roots)
    rearranged = dense.view(D_OUT, D_IN, D_OUT, D_IN).transpose(1, 2).reshape(D_OUT**2, D_IN**2)
    U, s, Vh = torch.linalg.svd(rearranged)
    nearest = (s[0] * torch.outer(U[:, 0], Vh[0])).view(D_OUT, D_OUT, D_IN, D_IN).transpose(1, 2)
    assert relative(torch.kron(G, A), nearest.reshape_as(dense)) < 1e-8
    kfac_A, kfac_G = layer.factors(roots)
    assert (torch.kron(G, A) - dense).norm() < (torch.kron(kfac_G, kfac_A) - dense).norm()
    for factor in (A, G):
        assert float(torch.linalg.eigvalsh(factor)[0]) > -1e-12


def test_the_null_space_of_activation_covariance_is_inside_that_of_the_gnh():
    """Proposition 1 of CrispEdit: a direction X that no input feels, X a_n = 0 for all n, has no curvature.

    Inputs of rank 4 of 7 leave 5 · 3 such directions. Eigenvalues of matrices of norm 1 are right to 1e-14; null ones
    are told from others, which begin at 1e-6 here, by 1e-10.
    """
    layer = layer_of(images=6, rank=4)
    A, _ = layer.factors(layer.roots())
    GNH = layer.gauss_newton(layer.roots())
    values, vectors = torch.linalg.eigh(A / A.norm())
    null = vectors[:, values < 1e-10]
    assert null.shape[1] == 3
    unfelt = torch.kron(torch.eye(D_OUT, dtype=torch.float64), null)  # X = e_i ⊗ null vector
    assert float((GNH @ unfelt).norm() / GNH.norm()) < 1e-10
    of_gnh = int((torch.linalg.eigvalsh(GNH / GNH.norm()) < 1e-10).sum())
    assert of_gnh >= unfelt.shape[1]
    # every image adds 2 directions at most, for softmax does not feel all 3 logits rising alike: 12 of the other 20
    assert of_gnh >= D_OUT * D_IN - 12, "the inclusion is strict: the GNH leaves more free"


def test_quality_is_what_dense_projectors_say():
    """Against the projectors themselves; eigenvectors are float32, so to 1e-5."""
    layer, energies = layer_of(), [0.95, 0.6]
    known = Known(layer)
    exact = known.exact(energies)
    dense = layer.gauss_newton(layer.roots())
    for name in ("kfac", "ekfac", "activation-covariance", "optimal-kronecker"):
        cut = CONSTRAINTS[name].function(known, energies)
        basis = torch.kron(cut.output_basis[0], cut.input_basis[0]).double()
        order = cut.curvatures.flatten().argsort(descending=True)
        for k, quality in enumerate(qualities(known, cut, exact, energies)):
            removed = basis[:, (cut.weights[k] == 0).flatten()]
            assert quality.removed == removed.shape[1]
            assert quality.captured == pytest.approx(
                float((removed.T @ dense @ removed).trace() / dense.trace()), abs=1e-5
            )
            count = exact.removed[k]
            equal, true = basis[:, order[:count]], exact.vectors[:, :count].double()
            cosines = torch.linalg.svdvals(equal.T @ true).clamp(max=1)
            assert quality.overlap == pytest.approx(float(cosines.square().mean()), abs=1e-5)
            assert quality.captured_equal <= quality.exact_captured + 1e-5
            assert 0 <= quality.median_angle <= quality.largest_angle <= 90.001


def test_of_a_kronecker_product_every_approximation_is_exact():
    """One image: GNH = G ⊗ a aᵀ, and K-FAC, EK-FAC and the nearest product are all it; all overlaps are 1."""
    layer = layer_of(images=1)
    known, dense = Known(layer), layer.gauss_newton(layer.roots())
    for A, G in (layer.factors(layer.roots()), layer.optimal_factors(layer.roots())):
        assert relative(torch.kron(G, A), dense) < EXACT
    spectrum = Spectrum.of(*layer.factors(layer.roots()))
    moments = layer.moments(layer.roots(), spectrum.output_basis, spectrum.input_basis)
    assert relative(moments, torch.outer(spectrum.beta, spectrum.alpha)) < 1e-5  # float32 bases
    exact = known.exact([0.5])
    for name in ("kfac", "ekfac", "optimal-kronecker"):
        (quality,) = qualities(known, CONSTRAINTS[name].function(known, [0.5]), exact, [0.5])
        assert quality.overlap == pytest.approx(1, abs=1e-5)
