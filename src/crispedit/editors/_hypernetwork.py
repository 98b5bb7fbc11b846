"""MEND's hypernetwork: the input and the output gradient of a token become those of a better gradient.

For matrix ℓ, of shape (d_out, d_in), and a token with input h and output gradient g, D = d_in + d_out:

    z₀ = ([h; g] − μ) / σ
    z_k = z_{k−1} + max(0, s_kℓ ⊙ (U_k V_k z_{k−1} + b_k) + o_kℓ)      k = 1, 2;  V_k (r, D), U_k (D, r)
    [h̃; g̃] = z₂,   ∇̃W = Σ_t g̃_t h̃_tᵀ,   W' = W − α_ℓ ∇̃W

Matrices of equal shape share U, V and b; s, o and α are a matrix's own. U, b and o begin at zero, V at N(0, 1), s at
one: z₂ = z₀ then, and W' is a step of gradient descent with normalised factors. (MEND, Mitchell et al., arXiv
2110.11309, section 3. The paper writes the update with this sign; EasyEdit adds it, and has α learn the sign.)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..forward import RowBatch
from ..models import EditMatrix
from ._capture import RunningMoments, TokenFactors

LAYERS = 2
"""Residual layers of a network."""


class _Layer(nn.Module):
    """One low-rank residual layer, with a scale and a shift for every matrix that shares it."""

    def __init__(self, width: int, rank: int, members: int, generator: torch.Generator) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.zeros(width, rank))
        self.V = nn.Parameter(torch.randn(rank, width, generator=generator))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(members, width))
        self.shift = nn.Parameter(torch.zeros(members, width))

    def forward(self, z: Tensor, member: int) -> Tensor:
        mapped = z @ self.V.T @ self.U.T + self.bias
        # clamp and not relu: at zero, where it begins, its derivative is 1
        return z + (self.scale[member] * mapped + self.shift[member]).clamp(min=0)


class _Network(nn.Module):
    """What matrices of one shape share."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, rank: int, members: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width, rank, members, generator) for _ in range(LAYERS))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, joined: Tensor, member: int) -> Tensor:
        # a coordinate that never varied says nothing
        z = torch.where(self.std > 0, (joined - self.mean) / self.std.where(self.std > 0, 1.0), 0.0)
        for layer in self.layers:
            z = layer(z, member)
        return z


@dataclass(frozen=True, kw_only=True)
class LowRankUpdate:
    """ΔW of one matrix as a sum over tokens, −Σ_t left_t right_tᵀ, in groups that are updates of their own.

    Args:
        left: α g̃, (tokens, d_out).
        right: h̃, (tokens, d_in).
        groups: The group that a token is of, (tokens,) int64.
    """

    left: Tensor
    right: Tensor
    groups: Tensor

    def delta(self) -> Tensor:
        """ΔW of all groups together, (d_out, d_in)."""
        return -(self.left.T @ self.right)


class Hypernetwork(nn.Module):
    """The networks of all shapes, and a learned step size for every matrix.

    Args:
        shapes: (d_out, d_in) of the matrices, in their order.
        rank: r.
        step_size: Where every α begins.
        seed: Of V.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], rank: int, step_size: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.shapes = list(shapes)
        self.member = [self.shapes[:index].count(shape) for index, shape in enumerate(self.shapes)]
        self.networks = nn.ModuleDict(
            {
                self._key(shape): _Network(sum(shape), min(rank, sum(shape)), self.shapes.count(shape), generator)
                for shape in dict.fromkeys(self.shapes)
            }
        )
        self.step_sizes = nn.Parameter(torch.full((len(self.shapes),), step_size))

    @staticmethod
    def _key(shape: tuple[int, int]) -> str:
        return f"{shape[0]}x{shape[1]}"

    def set_moments(self, moments: dict[tuple[int, int], RunningMoments]) -> None:
        """Takes the mean and the standard deviation of every coordinate, by shape."""
        for shape, of_shape in moments.items():
            network = self.networks[self._key(shape)]
            assert isinstance(network, _Network)
            network.mean.copy_(of_shape.mean)
            network.std.copy_(of_shape.std)

    def update(self, index: int, factors: TokenFactors, groups: Tensor | None = None) -> LowRankUpdate:
        """The update of one matrix.

        Args:
            index: Of the matrix.
            factors: Its inputs and output gradients.
            groups: The group that every row of the factors' edits is of, (rows,) int64; one for all when omitted.

        Returns:
            The update; gradients flow through it into the network.
        """
        shape = self.shapes[index]
        used = (factors.inputs != 0).any(1) & (factors.gradients != 0).any(1)
        of_token = factors.rows.new_zeros(len(factors.rows)) if groups is None else groups[factors.rows]
        joined = factors.joined[used].to(self.step_sizes)
        mapped = self.networks[self._key(shape)](joined, self.member[index])
        right, left = mapped.split([shape[1], shape[0]], dim=1)
        device = used.device
        return LowRankUpdate(
            left=(self.step_sizes[index] * left).to(device),
            right=right.to(device),
            groups=of_token.to(device)[used],
        )


@contextmanager
def applied(
    matrices: Sequence[EditMatrix], updates: Sequence[LowRankUpdate], batch: RowBatch, groups: Tensor
) -> Iterator[None]:
    """Within, every row of a batch meets W + ΔW of its own group; the weights are as they were.

    W h + ΔW h, so that the rows of many edits, each of which changes the model in its own way, are one forward pass,
    and gradients flow into the updates exactly as they would through W + ΔW.

    Args:
        matrices: Whose modules are hooked.
        updates: One per matrix.
        batch: The rows, one sequence each.
        groups: The group of every row, (rows,) int64.

    Yields:
        Nothing.
    """
    width = batch.ids.shape[1]
    one_group = not groups.any()
    everywhere = groups.repeat_interleave(width)
    at_targets = groups[batch.positions.cpu() // width]  # all that the last block's MLP is run at

    def hook_for(update: LowRankUpdate) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            h = arguments[0].flatten(0, -2).to(update.right.dtype)
            if one_group and len(update.groups) > min(update.left.shape[1], update.right.shape[1]):
                return (output + (h @ update.delta().T).view(output.shape)).to(output.dtype)  # fewer flops
            own = everywhere if len(h) == len(everywhere) else at_targets
            scores = (h @ update.right.T) * (own.to(h.device)[:, None] == update.groups)
            return (output - (scores @ update.left).view(output.shape)).to(output.dtype)

        return hook

    handles = [m.module.register_forward_hook(hook_for(u)) for m, u in zip(matrices, updates, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
