"""The K-FAC factors against loops, curvlinops and the dense Gauss–Newton Hessian; their passes; the meaning of drift.

Factors are float32 sums of a few dozen products: relative error 1e-7 of a float64 model (the sums only) and some
1e-6 of a float32 one (its activations too), both well below ``TOLERANCE``. Sampled factors have the statistical
error 1/√samples; their tolerances say for how many samples.
"""

import copy
from dataclasses import replace

import pytest
import torch
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from torch import nn

from crispedit.capability import logits_of, measure_drift
from crispedit.errors import NumericsError
from crispedit.estimation import estimate_factors, estimate_second_moments
from crispedit.factors import Factors, FactorSums, choose_kind, dense_bytes, merge_factors
from crispedit.fisher import sampled
from crispedit.memory import free_memory
from crispedit.models import edit_matrices
from crispedit.moments import Sketch
from crispedit.spectrum import Spectrum
from crispedit.subspace import Subspace
from crispedit.texts import TokenBatch, pad
from reference import (
    factors_by_loop,
    gauss_newton,
    random_rows,
    relative,
    tiny_gpt2,
    tiny_llama,
    true_gradient_factor,
)

TOLERANCE = 1e-5
LENGTHS = [2, 5, 9, 3, 9, 12]
BUILDERS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def batch_of(rows: list[list[int]], padding: int = 0) -> list[TokenBatch]:
    return [pad(rows, padding)]


def assert_same(found: dict[str, Factors], wanted: dict[str, Factors], tolerance: float = TOLERANCE):
    assert found.keys() == wanted.keys()
    for name, factors in found.items():
        assert factors.num_tokens == wanted[name].num_tokens
        assert relative(factors.A, wanted[name].A) < tolerance
        assert relative(factors.G, wanted[name].G) < tolerance


# ---------------------------------------------------------------- against definitions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", BUILDERS)
def test_factors_are_those_of_a_loop_over_sequences_and_tokens(family, dtype):
    model, rows = BUILDERS[family](dtype), random_rows(LENGTHS)
    matrices = edit_matrices(model, [0, 1])
    factors = estimate_factors(model, matrices, batch_of(rows), fisher="empirical")
    for matrix in matrices:
        A, G = factors_by_loop(model, matrix, rows)
        assert factors[matrix.name].num_tokens == sum(len(row) - 1 for row in rows)
        assert factors[matrix.name].A.dtype == factors[matrix.name].G.dtype == torch.float32
        assert relative(factors[matrix.name].A, A) < TOLERANCE
        assert relative(factors[matrix.name].G, G) < TOLERANCE


class _FlatLogits(nn.Module):
    """Ids to logits of all tokens, (tokens, V): the form in which curvlinops takes a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)


def curvlinops_factors(model, matrices, rows, *, fisher_type: str, reduction: str) -> dict[str, Factors]:
    """Factors of rows of equal length by curvlinops, brought to the scale of this package.

    curvlinops averages a aᵀ over every token that it is given; the last token of a row, which predicts
    nothing, is therefore left out of its inputs. It *sums* g gᵀ over tokens when the loss is a sum,
    which is E[g gᵀ] times the number of tokens; when the loss is a mean it takes that scale out itself.
    """
    ids = torch.tensor(rows)
    num_tokens = ids[:, 1:].numel()
    operator = KFACLinearOperator(
        _FlatLogits(model),
        nn.CrossEntropyLoss(reduction=reduction),
        [matrix.parameter for matrix in matrices],
        [(part[:, :-1], part[:, 1:].flatten()) for part in ids.split(2)],
        fisher_type=fisher_type,
        kfac_approx="expand",
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    A, G = operator._input_covariances, operator._gradient_covariances
    scale = num_tokens if reduction == "sum" else 1
    modules = {matrix.name: f"model.{matrix.name.removesuffix('.weight')}" for matrix in matrices}
    return {n: Factors(A=A[module], G=G[module] / scale, num_tokens=num_tokens) for n, module in modules.items()}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_empirical_factors_are_those_of_curvlinops(reduction):
    model, rows = tiny_llama(torch.float64, layers=3), random_rows([9] * 5)
    matrices = edit_matrices(model, [0, 1, 2])
    factors = estimate_factors(model, matrices, batch_of(rows), fisher="empirical")
    assert_same(factors, curvlinops_factors(model, matrices, rows, fisher_type="empirical", reduction=reduction))


def test_the_true_fisher_of_the_last_block_is_the_type_2_fisher_of_curvlinops():
    """In the last block only: below it, curvlinops 3.0.1 backpropagates one column for all tokens at once.

    That keeps cross terms S_t S_t'ᵀ between the tokens of a sequence, which labels drawn independently
    do not have; :func:`true_gradient_factor` has none.
    """
    model, rows = tiny_llama(torch.float64, hidden=16, intermediate=24), random_rows([5] * 2)
    matrices = edit_matrices(model, [1])
    theirs = curvlinops_factors(model, matrices, rows, fisher_type="type-2", reduction="sum")
    assert relative(true_gradient_factor(model, matrices[0], rows), theirs[matrices[0].name].G) < 1e-7


@pytest.mark.parametrize("layer", [0, 1])
def test_sampled_factors_tend_to_the_true_fisher(layer):
    """2,000 samples of each label: six seeds come to 2 to 3.5 % from the truth; the empirical Fisher is 100 % away."""
    model, rows = tiny_llama(torch.float64, hidden=16, intermediate=24), random_rows([3, 5, 4])
    (matrix,) = edit_matrices(model, [layer])
    truth = true_gradient_factor(model, matrix, rows)
    batches = batch_of(rows * 2000)
    mc, empirical = (estimate_factors(model, [matrix], batches, fisher=f)[matrix.name] for f in ("mc", "empirical"))
    assert relative(mc.G, truth) < 0.06
    assert relative(empirical.G, truth) > 0.3
    assert torch.equal(mc.A, empirical.A)


def test_for_one_token_the_kronecker_product_is_the_gauss_newton_hessian():
    """With one loss term nothing is approximated but the expectation over labels: 4,000 samples of it, 4 to 8 %."""
    model, rows = tiny_llama(torch.float64, hidden=16, intermediate=24), random_rows([2])
    (matrix,) = edit_matrices(model, [0])
    factors = estimate_factors(model, [matrix], batch_of(rows * 4000), fisher="mc")[matrix.name]
    truth = gauss_newton(model, matrix, rows)
    assert relative(torch.kron(factors.G, factors.A), truth) < 0.12
    exact = torch.kron(true_gradient_factor(model, matrix, rows), factors.A.double())
    assert relative(exact, truth) < TOLERANCE


@pytest.mark.parametrize("family", BUILDERS)
def test_for_one_token_the_kronecker_product_is_the_outer_product_of_the_gradient(family):
    model, rows = BUILDERS[family](torch.float64), random_rows([2])
    (matrix,) = edit_matrices(model, [1])
    factors = estimate_factors(model, [matrix], batch_of(rows), fisher="empirical")[matrix.name]
    loss = nn.functional.cross_entropy(model(input_ids=torch.tensor(rows)).logits[0, :1], torch.tensor(rows)[0, 1:])
    gradient = matrix.as_weight(torch.autograd.grad(loss, matrix.parameter)[0]).flatten()
    assert relative(torch.kron(factors.G, factors.A), torch.outer(gradient, gradient)) < TOLERANCE


@pytest.mark.parametrize("layer", [0, 1])
def test_drift_is_half_the_quadratic_form_of_the_gauss_newton_hessian(layer):
    """½ vec(Δ)ᵀ GNH vec(Δ) for Δ that move the model by 1e-4 to 1e-3 nats.

    The third order is some √drift, 1 to 3 %; measure_drift works on float32 logits, good to 1e-7 nats, 0.1 %.
    """
    base, rows = tiny_llama(hidden=16, intermediate=24), random_rows([3, 6, 5, 6])
    double = copy.deepcopy(base).double()
    block = gauss_newton(double, *edit_matrices(double, [layer]), rows)
    for seed in range(4):
        edited = copy.deepcopy(base)
        (matrix,) = edit_matrices(edited, [layer])
        delta = 0.003 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(seed))
        matrix.weight.add_(delta)
        predicted = float(delta.double().flatten() @ block @ delta.double().flatten()) / 2
        measured = measure_drift(logits_of(base), logits_of(edited), batch_of(rows)).drift
        assert 5e-5 < predicted < 1e-3
        assert measured == pytest.approx(predicted, rel=0.04)


# ---------------------------------------------------------------- second moments in the eigenbasis (EK-FAC)


@pytest.mark.parametrize("family", BUILDERS)
def test_second_moments_are_those_of_the_gradient_of_every_sequence(family):
    """Against autograd's gradient in W, sequence by sequence; float32 bases, 1e-6."""
    model, rows = BUILDERS[family](torch.float64), random_rows(LENGTHS)
    matrices = edit_matrices(model, [0, 1])
    factors = estimate_factors(model, matrices, batch_of(rows), fisher="empirical")
    spectra = {name: Spectrum.of(f.A, f.G) for name, f in factors.items()}
    found = estimate_second_moments(model, matrices, batch_of(rows), spectra, fisher="empirical")
    for matrix in matrices:
        U_A, U_G = spectra[matrix.name].input_basis.double(), spectra[matrix.name].output_basis.double()
        expected = torch.zeros(matrix.shape, dtype=torch.float64)
        for row in rows:
            ids = torch.tensor([row])
            loss = nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum")
            (gradient,) = torch.autograd.grad(loss, matrix.parameter)
            expected += (U_G.T @ matrix.as_weight(gradient) @ U_A).square()
        assert relative(found[matrix.name], expected / sum(len(row) - 1 for row in rows)) < TOLERANCE


def test_second_moments_are_those_of_curvlinops():
    model, rows = tiny_llama(torch.float64, layers=3), random_rows([9] * 5)
    matrices = edit_matrices(model, [0, 2])
    ids = torch.tensor(rows)
    operator = EKFACLinearOperator(
        _FlatLogits(model),
        nn.CrossEntropyLoss(reduction="sum"),
        [matrix.parameter for matrix in matrices],
        [(part[:, :-1], part[:, 1:].flatten()) for part in ids.split(2)],
        fisher_type="empirical",
        kfac_approx="expand",
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    operator.compute_eigenvalue_correction()
    spectra, expected = {}, {}
    for position, matrix in enumerate(matrices):
        module = f"model.{matrix.name.removesuffix('.weight')}"
        U_A, U_G = operator._input_covariances_eigenvectors[module], operator._gradient_covariances_eigenvectors[module]
        pairs = Spectrum.of(torch.eye(len(U_A)), torch.eye(len(U_G)))
        spectra[matrix.name] = replace(pairs, input_basis=U_A.float(), output_basis=U_G.float())
        expected[matrix.name] = operator._corrected_eigenvalues[module][position] / ids[:, 1:].numel()
    found = estimate_second_moments(model, matrices, batch_of(rows), spectra, fisher="empirical")
    for name, moments in found.items():
        assert relative(moments, expected[name]) < TOLERANCE


def test_for_one_token_a_sequence_second_moments_sum_to_the_energy():
    """Then ∇W = g aᵀ, and the sum over all pairs of (u_i g)² (v_j a)² is E[|g|² |a|²] in any basis."""
    model, rows = tiny_llama(torch.float64), random_rows([2] * 12)
    (matrix,) = edit_matrices(model, [1])
    factors = estimate_factors(model, [matrix], batch_of(rows), fisher="empirical")[matrix.name]
    spectra = {matrix.name: Spectrum.of(factors.A, factors.G)}
    found = estimate_second_moments(model, [matrix], batch_of(rows), spectra, fisher="empirical")[matrix.name]
    total = 0.0
    for row in rows:
        one = estimate_factors(model, [matrix], batch_of([row]), fisher="empirical")[matrix.name]
        total += float(one.A.trace() * one.G.trace()) / len(rows)
    assert float(found.sum()) == pytest.approx(total, rel=TOLERANCE)
    subspace = Subspace.of_table(spectra[matrix.name], found, 0.8)
    assert subspace.threshold.captured >= 0.8
    assert subspace.share_outside(subspace.project(torch.randn(matrix.shape))) < TOLERANCE


# ---------------------------------------------------------------- dense or sketched


def test_a_sketched_pass_has_the_sketches_of_the_dense_factors():
    model, rows = tiny_llama(), random_rows(LENGTHS)
    matrices = edit_matrices(model, [0, 1])
    dense = estimate_factors(model, matrices, batch_of(rows))
    sketched = estimate_factors(model, matrices, batch_of(rows), kind="sketch")
    for name, factors in sketched.items():
        for found, of_matrix in ((factors.A, dense[name].A), (factors.G, dense[name].G)):
            expected = Sketch.of(of_matrix)
            assert relative(found.product, expected.product) < TOLERANCE
            assert found.trace == pytest.approx(expected.trace, rel=TOLERANCE)


def test_the_memory_rule():
    """Five down-projections of LLaMA-3-8B: 4 × 5 × (4096² + 14336²) bytes, and 24 × 14336² beside them: 9.4 GB."""
    shapes = [(4096, 14336)] * 5
    assert dense_bytes(shapes) == 4 * 5 * (4096**2 + 14336**2) + 24 * 14336**2 == pytest.approx(9.4e9, rel=0.01)
    assert choose_kind(shapes, 2 * dense_bytes(shapes)) == "dense"
    assert choose_kind(shapes, 2 * dense_bytes(shapes) - 2) == "sketch"
    assert 10**7 < free_memory(torch.device("cpu")) < 10**14


# ---------------------------------------------------------------- rows and batches

COMPOSITIONS = {
    "one by one": [[0], [1], [2], [3], [4], [5]],
    "short and long together": [[0, 5], [1, 4], [2, 3]],
    "backwards": [[5, 4, 3], [2, 1, 0]],
}


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("family", BUILDERS)
def test_padding_order_and_composition_of_batches_do_not_matter(family, composition):
    model, rows = BUILDERS[family](), random_rows(LENGTHS)
    matrices = edit_matrices(model, [0, 1])
    together = estimate_factors(model, matrices, batch_of(rows), fisher="empirical")
    batches = [pad([rows[i] for i in group], padding=7) for group in COMPOSITIONS[composition]]
    assert_same(estimate_factors(model, matrices, batches, fisher="empirical"), together)


def test_merging_two_halves_gives_the_factors_of_the_whole():
    model, rows = tiny_llama(), random_rows(LENGTHS)
    matrices = edit_matrices(model, [0, 1])
    whole, first, second = (
        estimate_factors(model, matrices, batch_of(part), fisher="empirical") for part in (rows, rows[:2], rows[2:])
    )
    assert_same({name: merge_factors([first[name], second[name]]) for name in whole}, whole)
    assert_same({name: merge_factors([of_matrix]) for name, of_matrix in whole.items()}, whole)


def test_sums_of_tokens_are_outer_products_in_float32():
    inputs, gradients = torch.randn(10, 4, dtype=torch.bfloat16), torch.randn(10, 3, dtype=torch.bfloat16)
    sums = FactorSums((3, 4), torch.device("cpu"))
    sums.add(inputs[:3], gradients[:3])
    sums.add(inputs[3:], gradients[3:])
    assert sums.mean().num_tokens == 10
    assert relative(sums.mean().A, sum(torch.outer(a, a) for a in inputs.double()) / 10) < TOLERANCE
    assert relative(sums.mean().G, sum(torch.outer(g, g) for g in gradients.double()) / 10) < TOLERANCE


def test_sampled_labels_are_reproducible_by_their_seed():
    model, rows = tiny_llama(), random_rows(LENGTHS)
    (matrix,) = edit_matrices(model, [0])
    one, same, other = (
        estimate_factors(model, [matrix], batch_of(rows), fisher="mc", seed=seed)[matrix.name] for seed in (1, 1, 2)
    )
    assert torch.equal(one.G, same.G)
    assert relative(other.G, one.G) > 0.01
    assert torch.equal(one.A, other.A), "the inputs do not depend on labels"


def test_sampled_labels_do_not_depend_on_padding_or_on_where_batches_are_cut():
    model, rows = tiny_llama(), random_rows(LENGTHS)
    matrices = edit_matrices(model, [0, 1])
    together = estimate_factors(model, matrices, batch_of(rows), fisher="mc")
    one_by_one = [pad([row], padding=7) for row in rows]
    assert_same(estimate_factors(model, matrices, one_by_one, fisher="mc"), together)


def test_labels_are_sampled_from_the_softmax():
    """Pearson's χ² with 39 degrees of freedom is below 72.1 in 99.9 % of cases (the seed is fixed)."""
    logits, count = 2 * torch.randn(40, generator=torch.Generator().manual_seed(0)), 400_000
    found = sampled(logits.expand(count, -1), torch.rand(count, generator=torch.Generator().manual_seed(1)))
    wanted = logits.double().softmax(-1) * count
    assert float(((found.bincount(minlength=40) - wanted).square() / wanted).sum()) < 72.1


def test_every_number_has_the_label_in_whose_share_of_the_line_it_lies():
    logits = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log()
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999])
    assert sampled(logits.expand(6, -1), uniform).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("vocabulary", [3, 1_000, 128_256])
def test_a_label_without_probability_is_never_sampled(vocabulary):
    """At both ends of the line either, where all that is left is rounding: a vocabulary may be padded."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(50, vocabulary, generator=generator)
    logits[:, 0] = logits[:, -1] = -torch.inf
    for uniform in (0.0, 1 - 2**-24):
        found = sampled(logits, torch.full((50,), uniform))
        assert found.min() > 0
        assert found.max() < vocabulary - 1


def test_logits_that_are_not_numbers_have_a_label_all_the_same():
    """A label beyond the vocabulary would end a GPU's process before it could be said what is wrong."""
    found = sampled(torch.full((2, 5), torch.nan), torch.tensor([0.0, 0.9]))
    assert ((found >= 0) & (found < 5)).all()


def test_the_global_random_state_plays_no_part():
    model, rows = tiny_llama(), random_rows(LENGTHS)
    (matrix,) = edit_matrices(model, [0])
    before = torch.get_rng_state()
    estimate_factors(model, [matrix], batch_of(rows), fisher="mc")
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- the model afterwards


def hooks_of(model: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training, broken):
    """Also where estimation fails, and for a model in training mode, whose dropout must be off meanwhile."""
    model, rows = tiny_gpt2(), random_rows(LENGTHS)
    matrices = edit_matrices(model, [0, 1])
    truth = estimate_factors(model, matrices, batch_of(rows), fisher="empirical")
    model.train(training)
    model.transformer.wte.weight.requires_grad_(False)
    if broken:
        model.transformer.ln_f.bias.data[0] = float("nan")
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state, hooks = copy.deepcopy(model.state_dict()), hooks_of(model)

    if broken:
        with pytest.raises(NumericsError, match="not finite"):
            estimate_factors(model, matrices, batch_of(rows), fisher="empirical")
    else:
        assert_same(estimate_factors(model, matrices, batch_of(rows), fisher="empirical"), truth, tolerance=1e-12)

    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == needed
    assert all(module.training == training for module in model.modules())
    assert hooks_of(model) == hooks
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0, equal_nan=True)


def test_an_activation_that_overflows_is_refused():
    model, rows = tiny_llama(), random_rows([4])
    (matrix,) = edit_matrices(model, [0])
    model.model.layers[0].mlp.up_proj.weight.data *= 1e30  # finite after the norm that follows, but its square is not
    with pytest.raises(NumericsError, match=r"not finite"):
        estimate_factors(model, [matrix], batch_of(rows))
