"""Completed bases: orthogonal, with the given vectors first, at the price they claim."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crispedit.completion import Completion


def orthonormal(n: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n + k)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q.float()


@pytest.mark.parametrize(("n", "k"), [(40, 0), (40, 1), (40, 7), (40, 39), (40, 40), (1, 1), (300, 60)])
def test_it_is_an_orthogonal_basis_that_begins_with_the_vectors(n, k):
    """Float32: rounding of 1e-7 a number."""
    vectors = orthonormal(n, k)
    basis = Completion.of(vectors)
    Q = basis.times(torch.eye(n))
    assert (Q.T @ Q - torch.eye(n)).norm() <= 1e-6 * n
    products = Q[:, :k].T @ vectors
    assert (products.abs() - torch.eye(k)).norm() <= 1e-6 * n  # the same directions, of either sign
    assert torch.allclose(basis.times(torch.eye(n), transposed=True), Q.T, atol=1e-6)


def test_vectors_of_the_identity_take_no_reflection():
    """LAPACK's τ is 0 where a column is as it should be; its inverse is never formed."""
    Q = Completion.of(torch.eye(9)[:, :4]).times(torch.eye(9))
    assert torch.equal(Q.abs(), torch.eye(9))


def test_the_flops_are_those_of_the_products():
    basis = Completion.of(orthonormal(30, 4))
    with FlopCounterMode(display=False) as counter:
        basis.times(torch.randn(5, 30))
    assert counter.get_total_flops() == 5 * basis.flops
