"""Matrices seen in other bases: the model computes what it did, and what is trained there is what it stands for."""

import pytest
import torch

from crispedit.models import edit_matrices
from crispedit.precision import float32_masters
from crispedit.rotation import Dense, Frame, leading_basis, rotated
from reference import random_rows, relative, tiny_gpt2, tiny_llama


def orthonormal(n: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n + k)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q.float()


def frames(matrices) -> list[Frame]:
    """One with a dense and a completed basis for every matrix."""
    return [Frame(leading_basis(orthonormal(m.shape[0], m.shape[0])), leading_basis(orthonormal(m.shape[1], 5)))
            for m in matrices]  # fmt: skip


def logits_of(model) -> torch.Tensor:
    return model(input_ids=torch.tensor(random_rows([12, 12])), use_cache=False).logits


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_model_computes_what_it_did_and_is_as_it_was(make):
    """Conv1D, which stores Wᵀ, and a bias, which is added before outputs are turned back. Float32: 1e-5."""
    model = make()
    matrices = edit_matrices(model, [0, 1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad(), float32_masters(matrices):
        expected = logits_of(model)
        with rotated(matrices, frames(matrices)):
            assert relative(matrices[0].weight, before[matrices[0].name].T if make is tiny_gpt2
                            else before[matrices[0].name]) > 0.5  # fmt: skip
            assert relative(logits_of(model), expected) < 1e-5
        assert torch.equal(logits_of(model), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_gradients_and_changes_are_those_of_the_matrix(make):
    """∇W' = Q_Gᵀ ∇W Q_A, and a change Z of W' is one of Q_G Z Q_Aᵀ in W. Float32: 1e-5 and 1e-4, of small numbers."""
    model = make()
    matrices = edit_matrices(model, [0, 1])
    with float32_masters(matrices):
        originals = [m.weight.clone() for m in matrices]
        plain = torch.autograd.grad(logits_of(model).square().sum(), [m.parameter for m in matrices])
        chosen = frames(matrices)
        steps = [1e-2 * torch.randn(m.shape) for m in matrices]
        with rotated(matrices, chosen):
            seen = torch.autograd.grad(logits_of(model).square().sum(), [m.parameter for m in matrices])
            for matrix, frame, one, other in zip(matrices, chosen, plain, seen, strict=True):
                assert relative(matrix.as_weight(other), frame.coordinates(matrix.as_weight(one))) < 1e-5
            for matrix, step in zip(matrices, steps, strict=True):
                matrix.weight.add_(step)
        for matrix, frame, step, original in zip(matrices, chosen, steps, originals, strict=True):
            Q_G, Q_A = frame.outputs.times(torch.eye(matrix.shape[0])), frame.inputs.times(torch.eye(matrix.shape[1]))
            assert relative(matrix.weight - original, Q_G @ step @ Q_A.T) < 1e-4


def test_a_model_in_bfloat16_is_turned_in_float32():
    """The masters are float32 and so are the bases; only what leaves the module is rounded, as it is without them."""
    model = tiny_llama(torch.bfloat16)
    matrices = edit_matrices(model, [0, 1])
    with torch.no_grad(), float32_masters(matrices):
        expected = logits_of(model)
        with rotated(matrices, frames(matrices)):
            assert relative(logits_of(model), expected) < 2e-2


def test_what_is_not_given_a_frame_stays_as_it_is():
    model = tiny_llama()
    matrices = edit_matrices(model, [0, 1])
    before = matrices[0].weight.clone()
    with rotated(matrices, [None, frames(matrices)[1]]):
        assert torch.equal(matrices[0].weight, before)
        assert not matrices[0].module._forward_hooks
        assert matrices[1].module._forward_hooks


def test_a_failure_inside_leaves_no_hook_and_no_bias_behind():
    model = tiny_gpt2()
    matrices = edit_matrices(model, [0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), rotated(matrices, frames(matrices)):
        raise ZeroDivisionError
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_frame_costs_what_it_says():
    frame = Frame(Dense(orthonormal(20, 20)), leading_basis(orthonormal(50, 3)))
    assert frame.flops == 2 * (2 * 20 * 20 + 4 * 50 * 3)
