"""The curvature of a loss in one matrix, exactly and in every Kronecker form. Pure tensors; float64.

With y = W a + b and a frozen rest of the network, both exact curvatures are sums of Kronecker products, one of every
image n (row-major vec, as everywhere in this package):

    Hessian = E_n [ H_n ⊗ a_n a_nᵀ ],   H_n = ∂²ℓ/∂y²
    GNH     = E_n [ G_n ⊗ a_n a_nᵀ ],   G_n = Jᵀ (diag p − p pᵀ) J

with J = ∂z/∂y the Jacobian of the *logits* z and p = softmax(z) (CrispEdit, arXiv 2602.15823, section 3.2). G_n = Bᵀ B
with B = Sᵀ J, S Sᵀ = diag p − p pᵀ, S = diag √p − p √pᵀ. So a d_out d_in × d_out d_in matrix comes from one product of
two thin matrices, that of all vec(H_n) with all vec(a_n a_nᵀ), in seconds and without ten thousand passes through the
network; tests compare it with curvlinops' operators.

Everything approximate is made of the same a_n and B_n, with expectations over labels taken exactly, not by sampling:
K-FAC's factors are E[a aᵀ] and E[G_n] (Martens & Grosse 2015), EK-FAC's moments E[(u_iᵀ G_n u_i) (v_jᵀ a_n)²] (George
et al. 2018), and the optimal factors the leading singular pair of the rearranged GNH.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import hessian, jacrev, vmap

CHUNK = 1000
ROUNDS, SETTLED = 200, 1e-10
"""Of the power iteration for the optimal factors: it ends when the factors change by less than this, relatively."""


@dataclass(frozen=True, kw_only=True)
class LayerCurvature:
    """What all curvatures of one matrix are made of.

    Args:
        weight: W, (d_out, d_in) float64.
        bias: b, (d_out,) float64.
        inputs: a_n, (n, d_in) float64.
        labels: (n,) int64.
        above: y (…, d_out) to logits (…, classes), in float64, its parameters frozen.
    """

    weight: Tensor
    bias: Tensor
    inputs: Tensor
    labels: Tensor
    above: nn.Module

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        d_out, d_in = self.weight.shape
        return d_out, d_in

    @cached_property
    def outputs(self) -> Tensor:
        """y_n, (n, d_out)."""
        return self.inputs @ self.weight.T + self.bias

    def _logits(self, y: Tensor) -> Tensor:
        """(classes,), of one image."""
        z: Tensor = self.above(y)
        return z

    def roots(self) -> Tensor:
        """B_n, (n, classes, d_out): G_n = B_nᵀ B_n."""

        def root(y: Tensor) -> Tensor:
            p = self._logits(y).softmax(0)
            S = p.sqrt().diag() - torch.outer(p, p.sqrt())
            scaled: Tensor = S.T @ jacrev(self._logits)(y)
            return scaled

        return torch.cat([vmap(root)(part) for part in torch.split(self.outputs, CHUNK)])

    def label_gradients(self) -> Tensor:
        """g_n, (n, d_out): the gradient of the loss at the data's own labels in y."""

        def gradient(y: Tensor, label: Tensor) -> Tensor:
            one = nn.functional.one_hot(label, self._logits(y).shape[-1])
            g: Tensor = (self._logits(y).softmax(0) - one) @ jacrev(self._logits)(y)
            return g

        parts = zip(torch.split(self.outputs, CHUNK), torch.split(self.labels, CHUNK), strict=True)
        return torch.cat([vmap(gradient)(y, label) for y, label in parts])

    def hessian(self) -> Tensor:
        """The exact Hessian of the mean cross-entropy in W, (d_out d_in, d_out d_in), row-major."""

        def loss(y: Tensor, label: Tensor) -> Tensor:
            z = self._logits(y)
            return z.logsumexp(0) - z.gather(0, label[None])[0]

        parts = zip(torch.split(self.outputs, CHUNK), torch.split(self.labels, CHUNK), strict=True)
        return self._sum_of_products(vmap(hessian(loss))(y, label) for y, label in parts)

    def gauss_newton(self, roots: Tensor) -> Tensor:
        """The exact Gauss–Newton Hessian in W, (d_out d_in, d_out d_in), row-major; ``roots`` as :meth:`roots`."""
        return self._sum_of_products(B.mT @ B for B in torch.split(roots, CHUNK))

    def _sum_of_products(self, blocks: Iterator[Tensor]) -> Tensor:
        """E_n [ H_n ⊗ a_n a_nᵀ ] of symmetric H_n that come in chunks (m, d_out, d_out)."""
        d_out, d_in = self.shape
        upper_out, upper_in = torch.triu_indices(d_out, d_out), torch.triu_indices(d_in, d_in)
        thin = self.inputs.new_zeros(upper_out.shape[1], upper_in.shape[1])
        for H, a in zip(blocks, torch.split(self.inputs, CHUNK), strict=True):
            thin.addmm_(H[:, upper_out[0], upper_out[1]].T, a[:, upper_in[0]] * a[:, upper_in[1]])
        thin /= len(self.inputs)
        rows, columns = _places(upper_out, d_out), _places(upper_in, d_in)
        dense = thin.new_empty(d_out, d_in, d_out, d_in)
        for i in range(d_out):
            dense[i] = thin[rows[i]][:, columns.flatten()].view(d_out, d_in, d_in).transpose(0, 1)
        return dense.view(d_out * d_in, d_out * d_in)

    def factors(self, roots: Tensor) -> tuple[Tensor, Tensor]:
        """K-FAC's A = E[a aᵀ], (d_in, d_in), and G = E[G_n], (d_out, d_out)."""
        n = len(self.inputs)
        flat = roots.flatten(0, 1)
        return self.inputs.T @ self.inputs / n, flat.T @ flat / n

    def empirical_factors(self) -> tuple[Tensor, Tensor]:
        """A, and G = E[g gᵀ] with gradients at the data's own labels: the empirical Fisher, a different matrix."""
        n, g = len(self.inputs), self.label_gradients()
        return self.inputs.T @ self.inputs / n, g.T @ g / n

    def moments(self, roots: Tensor, U_G: Tensor, U_A: Tensor) -> Tensor:
        """EK-FAC's λ_ij = E[(u_iᵀ G_n u_i) (v_jᵀ a_n)²], (d_out, d_in): the GNH's diagonal in a Kronecker basis."""
        U_G, U_A = U_G.double(), U_A.double()
        of_outputs = torch.cat([(B @ U_G).square().sum(1) for B in torch.split(roots, CHUNK)])
        return of_outputs.T @ (self.inputs @ U_A).square() / len(self.inputs)

    def optimal_factors(self, roots: Tensor) -> tuple[Tensor, Tensor]:
        """A and G that minimise ‖GNH − G ⊗ A‖_F: the nearest Kronecker product (Van Loan & Pitsianis 1993).

        The leading singular pair of the rearranged GNH, Σ_n vec(G_n) vec(a_n a_nᵀ)ᵀ, by power iteration from K-FAC's
        factors, without forming it. Both stay positive semidefinite, as sums of such matrices with weights ≥ 0. For the
        Fisher matrix: KFOC (Koroko et al. 2022); one round from the identity is Shampoo's square (Morwani et al. 2024).

        Args:
            roots: As :meth:`roots`.

        Returns:
            A, (d_in, d_in), and G, (d_out, d_out), of equal Frobenius norm.
        """
        A, G = self.factors(roots)
        for _ in range(ROUNDS):
            of_outputs = torch.cat([((B @ G) * B).sum((1, 2)) for B in torch.split(roots, CHUNK)])  # ⟨G_n, G⟩
            new_A = (self.inputs * of_outputs[:, None]).T @ self.inputs
            of_inputs = ((self.inputs @ new_A) * self.inputs).sum(1)  # aᵀ A a
            weighted = (roots * of_inputs.clamp(min=0).sqrt()[:, None, None]).flatten(0, 1)
            new_G = weighted.T @ weighted
            new_A, new_G = (M / M.norm().clamp(min=1e-300) for M in (new_A, new_G))
            moved = max(
                float((new - old / old.norm().clamp(min=1e-300)).norm()) for new, old in ((new_A, A), (new_G, G))
            )
            A, G = new_A, new_G
            if moved < SETTLED:
                break
        inner = torch.cat([((B @ G) * B).sum((1, 2)) for B in torch.split(roots, CHUNK)])
        scale = float((inner * ((self.inputs @ A) * self.inputs).sum(1)).mean())
        return A * scale**0.5, G * scale**0.5


def relative_difference(one: Tensor, other: Tensor) -> float:
    """‖one − other‖_F / ‖other‖_F, row by row: no third matrix of that size is made."""
    apart = sum(
        float((a - b).square().sum()) for a, b in zip(torch.split(one, CHUNK), torch.split(other, CHUNK), strict=True)
    )
    whole = sum(float(b.square().sum()) for b in torch.split(other, CHUNK))
    return float((apart / whole) ** 0.5)


def _places(upper: Tensor, size: int) -> Tensor:
    """(size, size): where the entry (i, i') of a symmetric matrix lies among those of its upper triangle."""
    places = torch.empty(size, size, dtype=torch.int64)
    number = torch.arange(upper.shape[1])
    places[upper[0], upper[1]] = number
    places[upper[1], upper[0]] = number
    return places
