"""The constraints of the experiment: what they remove against dense projectors, γ at its ends, and the descent.

Bases are float32 (6e-8 per number, some 1e-6 after four small products): dense float64 truths are met to 1e-5.
"""

import pytest
import torch
from torch import nn

from crispedit.errors import ConfigError, NumericsError
from crispedit.experiments.area import area, envelope, height, intervals, paired, reach
from crispedit.experiments.constraints import CONSTRAINTS, DenseCut, Known, KroneckerCut, chosen_constraints
from crispedit.experiments.projected import Above, Descent, Inputs, descend, gradients, moved, scores
from reference import low_curvature_projector, relative
from test_layer_curvature import D_IN, D_OUT, gauss_newton_by_autograd, hessian_by_autograd, layer_of

TOLERANCE = 1e-5
ENERGIES = [0.999, 0.9, 0.5, 0.1]
HARD = ["hessian", "gnh", "kfac", "kfac-empirical", "ekfac", "activation-covariance", "optimal-kronecker"]


def some_gradients(count: int) -> torch.Tensor:
    return torch.randn(count, D_OUT, D_IN, generator=torch.Generator().manual_seed(1))


def projector(matrix: torch.Tensor, energy: float) -> torch.Tensor:
    """Onto the eigenvectors but the fewest of largest |λ| whose |λ| hold the energy."""
    values, vectors = torch.linalg.eigh(matrix)
    order = values.abs().argsort(descending=True)
    sums = values.abs()[order].cumsum(0)
    low = vectors[:, order[int((sums < energy * sums[-1]).sum()) + 1 :]]
    return low @ low.T


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("name", ["hessian", "gnh"])
def test_exact_constraints_are_the_projectors_of_dense_autograd(name, activation):
    """Of tanh the Hessian is indefinite: |λ| decides. Its dense diagonalisation is float32: eigenvectors to 1e-4."""
    layer, X = layer_of(activation), some_gradients(len(ENERGIES))
    truth = hessian_by_autograd(layer) if name == "hessian" else gauss_newton_by_autograd(layer)
    cut = CONSTRAINTS[name].function(Known(layer), ENERGIES)
    stepped = cut.step(X).double()
    for k, energy in enumerate(ENERGIES):
        expected = projector(truth, energy) @ X[k].double().flatten()
        tolerance = 1e-4 if name == "hessian" and activation is nn.Tanh else TOLERANCE
        assert (stepped[k].flatten() - expected).norm() < tolerance * X[k].norm()
        assert cut.captured[k] >= energy
    assert cut.removed == sorted(cut.removed, reverse=True)


def test_kfac_is_the_projector_of_the_kronecker_matrix():
    layer, X = layer_of(), some_gradients(len(ENERGIES))
    stepped = CONSTRAINTS["kfac"].function(Known(layer), ENERGIES).step(X)
    for k, energy in enumerate(ENERGIES):
        P, gap = low_curvature_projector(*layer.factors(layer.roots()), energy)
        assert gap > 1e-3, "the cut must separate two different curvatures, or the subspace is not unique"
        assert (stepped[k].flatten() - P @ X[k].double().flatten()).norm() < TOLERANCE * X[k].norm()


def test_activation_covariance_removes_inputs_alone():
    layer, (X,) = layer_of(), some_gradients(1)
    A, _ = layer.factors(layer.roots())
    (stepped,) = CONSTRAINTS["activation-covariance"].function(Known(layer), [0.9]).step(X[None])
    assert relative(stepped, X.double() @ projector(A, 0.9)) < TOLERANCE


def test_the_soft_filter_shrinks_by_mu_over_lambda_plus_mu():
    layer, (X,) = layer_of(), some_gradients(1)
    known = Known(layer)
    (stepped,) = CONSTRAINTS["soft-filter"].function(known, [0.8]).step(X[None])
    (mask,) = CONSTRAINTS["kfac"].function(known, [0.8]).weights
    products = torch.outer(known.kfac.beta, known.kfac.alpha)
    mu = products[mask == 0].min()
    U_G, U_A = known.kfac.output_basis.double(), known.kfac.input_basis.double()
    expected = U_G @ ((U_G.T @ X.double() @ U_A) * mu / (products + mu)) @ U_A.T
    assert relative(stepped, expected) < TOLERANCE


@pytest.mark.parametrize("name", HARD)
def test_the_ends_of_gamma(name):
    """0 removes nothing; towards 1 what is left has no curvature: 4 of 7 input directions of 6 images are felt.

    A cut at γ leaves the share 1 − γ of its own curvature; of the true curvature activation covariance and K-FAC leave
    other shares, but none on what no input feels.
    """
    known = Known(layer_of(images=6, rank=4))
    nothing, all_but_null = CONSTRAINTS[name].function(known, [0.0]), CONSTRAINTS[name].function(known, [1 - 1e-9])
    (X,) = some_gradients(1)
    assert relative(nothing.step(X[None])[0], X) < TOLERANCE
    assert nothing.removed == [0]
    (left,) = all_but_null.step(X[None]).double()
    felt = left.flatten() @ known.layer.gauss_newton(known.roots) @ left.flatten()
    most = torch.linalg.eigvalsh(known.layer.gauss_newton(known.roots))[-1] * X.norm() ** 2
    assert float(felt / most) < 1e-6
    assert float(left.norm()) > 0.1, "the null directions are free"


def test_without_a_constraint_the_rate_is_what_differs():
    cut = CONSTRAINTS["none"].function(Known(layer_of()), [0.9, 0.5, 0.1])
    assert cut.removed == [0, 0, 0]
    assert cut.rates.flatten().tolist() == pytest.approx([1, 10**-1.5, 1e-3])
    X = some_gradients(3)
    assert torch.equal(cut.step(X), X)


def test_leading_pairs_cut_as_all_pairs_do():
    """Of a spectrum of which only the top is known the rest is spread evenly, which moves no cut above it."""
    values = torch.tensor([5, 3, 1, 0.5, 0.3, 0.2], dtype=torch.float64)
    whole, top = torch.eye(6), torch.eye(6)[:, :3]
    for energies in ([0.85, 0.7, 0.3], [0.0]):
        known, all_known = (
            DenseCut.of(values[: vectors.shape[1]], vectors, 10.0, energies) for vectors in (top, whole)
        )
        assert known.removed == all_known.removed
        assert known.captured == pytest.approx(all_known.captured)


# ---------------------------------------------------------------- names


def test_constraints_are_chosen_by_name():
    assert [c.name for c in chosen_constraints("ekfac, none", dense=True)] == ["none", "ekfac"]
    assert len(chosen_constraints("all", dense=False)) == len(CONSTRAINTS)
    assert not any(c.dense for c in chosen_constraints(None, dense=False))
    with pytest.raises(ConfigError, match=r"constraint is 'kfc'; .*did you mean 'kfac'"):
        chosen_constraints("kfc", dense=True)
    with pytest.raises(ConfigError, match="no constraint is named"):
        chosen_constraints(" ,", dense=True)


# ---------------------------------------------------------------- descent


def problem(seed: int = 0) -> tuple[torch.Tensor, Above, Inputs, Known]:
    layer = layer_of()
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(48, D_IN, generator=generator)
    above = nn.Sequential(*(module.float() for module in layer_of().above))
    return layer.weight.float(), Above(layer.bias.float(), above), Inputs(inputs, torch.arange(48) % 3), Known(layer)


def test_gradients_of_all_copies_are_those_of_autograd():
    start, above, data, _ = problem()
    W = start + some_gradients(4)
    found = gradients(W, above, data.inputs, data.labels)
    for k in range(4):
        copy = W[k].clone().requires_grad_()
        loss = nn.functional.cross_entropy(above.layers(data.inputs @ copy.T + above.bias), data.labels)
        assert relative(found[k], torch.autograd.grad(loss, copy)[0]) < TOLERANCE


@pytest.mark.parametrize("name", HARD)
def test_a_descent_stays_in_its_subspace_and_learns(name):
    start, above, data, known = problem()
    cut = CONSTRAINTS[name].function(known, [0.9, 0.5])
    W, renewed = descend(start, above, data, cut, Descent(lr=0.5, epochs=20, batch_size=16))
    assert renewed == [0, 0]
    change = W - start
    assert relative(cut.step(change), change) < TOLERANCE  # idempotent on what lies in it
    before, after = (
        nn.functional.cross_entropy(above.logits(w[None], data.inputs)[1][:, 0], data.labels) for w in (start, W[1])
    )
    assert after < before


def test_a_descent_with_nothing_removed_is_sgd():
    start, above, data, known = problem()
    settings = Descent(lr=0.1, epochs=3, batch_size=16)
    (W,), _ = descend(start, above, data, CONSTRAINTS["kfac"].function(known, [0.0]), settings, seed=5)
    copy = start.clone().requires_grad_()
    optimizer, generator = torch.optim.SGD([copy], lr=0.1), torch.Generator().manual_seed(5)
    for _ in range(3):
        for indices in torch.randperm(48, generator=generator).split(16):
            z = above.layers(data.inputs[indices] @ copy.T + above.bias)
            optimizer.zero_grad()
            nn.functional.cross_entropy(z, data.labels[indices]).backward()
            optimizer.step()
    assert relative(W - start, copy.detach() - start) < 1e-4  # rounding of 9 float32 steps, relative to the change


def test_a_cut_is_renewed_where_the_weights_have_moved_far_and_only_there():
    start, above, data, known = problem()
    energies = [0.999999, 0.1]
    function, asked = CONSTRAINTS["kfac"].function, []

    def renew(k: int, weight: torch.Tensor) -> KroneckerCut:
        asked.append((k, float((weight - start).norm() / start.norm())))
        return function(known, [0.9])

    settings = Descent(lr=0.3, epochs=4, batch_size=16, refresh=0.05)
    W, renewed = descend(start, above, data, function(known, energies), settings, renew=renew)
    far = moved(W, start)
    assert far[1] > 0.05 > far[0]
    assert renewed[0] == 0
    assert renewed[1] == len(asked) > 0
    assert all(k == 1 and distance > 0.05 for k, distance in asked[:1])


def test_a_replaced_cut_is_the_other_one_in_its_place():
    known, X = Known(layer_of()), some_gradients(3)
    function = CONSTRAINTS["kfac"].function
    cut = function(known, [0.9, 0.5, 0.1])
    other = CONSTRAINTS["optimal-kronecker"].function(known, [0.3])
    stepped = cut.replaced(torch.tensor([1]), [other]).step(X)
    assert relative(stepped[[0, 2]], cut.step(X)[[0, 2]]) < TOLERANCE
    assert relative(stepped[1], other.step(X[1:2])[0]) < TOLERANCE


def test_a_descent_that_diverges_says_so():
    start, above, data, known = problem()
    with pytest.raises(NumericsError, match="lower --lr"):
        descend(start, above, data, CONSTRAINTS["none"].function(known, [0.5]), Descent(lr=float("inf"), epochs=3))


def test_scores_are_accuracies_and_the_divergence_from_the_base():
    start, above, data, _ = problem()
    W = torch.stack([start, start + 1])
    accuracies, drift = scores(W, above, data, start)
    z, other = (above.layers(data.inputs @ w.T + above.bias) for w in W)
    expected = nn.functional.kl_div(other.log_softmax(1), z.log_softmax(1), log_target=True, reduction="batchmean")
    assert accuracies == pytest.approx([float((out.argmax(1) == data.labels).float().mean()) for out in (z, other)])
    assert drift[0] == pytest.approx(0, abs=1e-7)
    assert drift[1] == pytest.approx(float(expected), rel=1e-4)


# ---------------------------------------------------------------- areas


def test_the_envelope_and_its_area():
    points = [(0.1, 1.0), (0.5, 0.9), (0.4, 0.8), (0.9, 0.5), (0.9, 0.2)]
    assert envelope(points) == [(0.1, 1.0), (0.5, 0.9), (0.9, 0.5)]
    assert area(points, 0.1, 0.9) == pytest.approx((0.4 * 0.95 + 0.4 * 0.7) / 0.8)
    assert area(points, 0.3, 0.5) == pytest.approx(0.925)
    assert area([(0.1, 1.0), (0.9, 1.0)], 0.1, 0.9) == 1
    assert area(points, 0.5, 0.5) == pytest.approx(0.9)
    assert height(envelope(points), 0.95) == 0
    assert height(envelope(points), 0.0) == 1
    assert area([(0.1, 1.0), (0.5, 1.0)], 0.1, 0.9) == pytest.approx(0.5)  # out of reach counts as nothing kept


def test_what_is_reached_while_so_much_is_kept():
    points = [(0.1, 1.0), (0.5, 0.9), (0.9, 0.5)]
    assert reach(points, 0.95) == pytest.approx(0.3)
    assert reach(points, 0.9) == pytest.approx(0.5)
    assert reach(points, 0.1) == 0.9


def test_intervals_are_over_seeds_and_differences_are_paired():
    values = [[0.5, 0.6, 0.7], [0.6, 0.7, 0.8]]
    (mean, low, high), _ = intervals(values)
    assert (mean, low, high) == pytest.approx((0.6, 0.5, 0.7))
    difference = paired(values, 0)[1]
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert intervals([[0.5]])[0] == pytest.approx((0.5, 0.5, 0.5))
