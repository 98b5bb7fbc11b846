"""Matrices seen in other bases while they are trained: y = Q_G W' (Q_Aᵀ a) with W' = Q_Gᵀ W Q_A in place of W.

Adam's moments are then those of coordinates in these bases, and a mask is all that a projection takes. It is the
tokens of a batch that are turned, not the matrix: n² flops and a pass back for each, where turning a gradient there and
an update back takes d_out d_in (d_out + d_in) twice a step, however few tokens it has.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .completion import Completion
from .models import EditMatrix
from .ownership import owned, weights_of_owners


@dataclass(frozen=True)
class Dense:
    """An orthogonal matrix Q as it stands, (n, n)."""

    Q: Tensor

    @property
    def flops(self) -> int:
        """Of one vector."""
        return 2 * len(self.Q) ** 2

    def times(self, X: Tensor, *, transposed: bool = False) -> Tensor:
        """X Q, or X Qᵀ, for X (m, n)."""
        return X @ (self.Q.T if transposed else self.Q)


Basis = Dense | Completion


@dataclass(frozen=True)
class Frame:
    """The bases of one matrix: Q_G of its outputs, Q_A of its inputs."""

    outputs: Basis
    inputs: Basis

    @property
    def flops(self) -> int:
        """Of a token in one step, there and back."""
        return 2 * (self.outputs.flops + self.inputs.flops)

    def coordinates(self, W: Tensor) -> Tensor:
        """Q_Gᵀ W Q_A of W (d_out, d_in)."""
        return self.outputs.times(self.inputs.times(W).T).T

    def matrix(self, Z: Tensor) -> Tensor:
        """Q_G Z Q_Aᵀ of Z (d_out, d_in)."""
        return self.outputs.times(self.inputs.times(Z, transposed=True).T, transposed=True).T


def leading_basis(vectors: Tensor) -> Basis:
    """The cheapest orthogonal basis that begins with orthonormal vectors, up to sign.

    Args:
        vectors: (n, k), k ≤ n.

    Returns:
        The vectors themselves if they are n, else their completion.
    """
    return Dense(vectors) if vectors.shape[1] == len(vectors) else Completion.of(vectors)


@contextmanager
def rotated(matrices: Sequence[EditMatrix], frames: Sequence[Frame | None]) -> Iterator[None]:
    """Within, the weight of every matrix that has a frame is W' = Q_Gᵀ W Q_A; its module computes what it did.

    Afterwards W has changed by Q_G ΔW' Q_Aᵀ: where W' has not changed, nothing is added, whatever was rounded.

    What W was, its owner keeps (:mod:`crispedit.ownership`), and gives the others what has become of it.

    Args:
        matrices: Inside :func:`crispedit.precision.float32_masters`.
        frames: One per matrix, or ``None`` for those that stay as they are; on the devices of their matrices.
    """
    turned = [(matrix, frame) for matrix, frame in zip(matrices, frames, strict=True) if frame is not None]
    own = [mine for mine, frame in zip(owned(matrices), frames, strict=True) if frame is not None]
    originals = [matrix.weight.clone() if mine else None for (matrix, _), mine in zip(turned, own, strict=True)]
    biases = [getattr(matrix.module, "bias", None) for matrix, _ in turned]
    kept = [None if bias is None else bias.data for bias in biases]
    handles: list[Any] = []
    try:
        for (matrix, frame), bias in zip(turned, biases, strict=True):
            matrix.weight.copy_(frame.coordinates(matrix.weight))
            if bias is not None:  # it is added before the outputs are turned back
                bias.data = frame.outputs.times(bias.data[None])[0]
            handles += _turning(matrix, frame)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for (matrix, frame), bias, data, original in zip(turned, biases, kept, originals, strict=True):
            if bias is not None and data is not None:
                bias.data = data
            if original is not None:
                change = matrix.weight - frame.coordinates(original)
                matrix.weight.copy_(original + frame.matrix(change))
    if turned:  # not where something has failed: nobody may be left to give them, and the driver has the originals
        weights_of_owners(matrices)


def _turning(matrix: EditMatrix, frame: Frame) -> list[Any]:
    """Hooks that turn a module's inputs and turn its outputs back; inside those that change dtypes."""

    def applied(basis: Basis, x: Tensor, transposed: bool) -> Tensor:
        return basis.times(x.reshape(-1, x.shape[-1]), transposed=transposed).view_as(x)

    return [
        matrix.module.register_forward_pre_hook(
            lambda _, arguments: (applied(frame.inputs, arguments[0], False), *arguments[1:])
        ),
        matrix.module.register_forward_hook(lambda _, __, output: applied(frame.outputs, output, True), prepend=True),
    ]
