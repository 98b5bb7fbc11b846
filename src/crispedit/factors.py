"""K-FAC factors: two second moments per matrix, as sums that tokens are added to, and as means.

Conventions, fixed here for the whole package. A linear map is y = W a. W is (d_out, d_in), a the
input of a token, g = ∂(loss of the sequence, summed over its tokens)/∂y at that token, and

    A = E[a aᵀ]  (d_in, d_in)        G = E[g gᵀ]  (d_out, d_out)

with both expectations over the tokens that have a next token to predict. Row-major curvature is
G ⊗ A; applied to a matrix X of W's shape it is X ↦ G X A. A mask has W's shape. ``Conv1D`` is
transposed in :mod:`crispedit.models` only. (CrispEdit, arXiv 2602.15823, section 3.3 and appendix A;
Martens & Grosse 2015.)

Of several processes each has sums over its share of the tokens, which are added up once, when they are complete.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from . import distributed
from .errors import NumericsError, check_choice
from .moments import Kind, Moment, MomentSum, weighted_sum


def check_kind(kind: str) -> None:
    """Raises :class:`ConfigError` unless ``kind`` is ``auto``, ``dense`` or ``sketch``."""
    check_choice("factors", kind, ("auto", *get_args(Kind)))


def dense_bytes(shapes: Sequence[tuple[int, int]]) -> int:
    """What dense factors of matrices of these shapes (d_out, d_in) take at the most.

    Float32 sums of all, and beside them the float64 diagonalisation of the widest: matrix, eigenvectors, workspace.
    """
    return sum(4 * (d_out**2 + d_in**2) for d_out, d_in in shapes) + 24 * max(max(shape) for shape in shapes) ** 2


def choose_kind(shapes: Sequence[tuple[int, int]], free_bytes: int) -> Kind:
    """The memory rule: dense factors if they take no more than half of the free memory, else sketches."""
    return "dense" if dense_bytes(shapes) <= free_bytes / 2 else "sketch"


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Both Kronecker factors of one matrix, as means over ``num_tokens`` tokens.

    Args:
        A: Input second moment, (d_in, d_in) float32, or a sketch of it.
        G: Output-gradient second moment, (d_out, d_out) float32, or a sketch of it.
        num_tokens: How many tokens were averaged.
    """

    A: Moment
    G: Moment
    num_tokens: int

    @property
    def dense(self) -> tuple[Tensor, Tensor] | None:
        """A and G where both are dense."""
        return (self.A, self.G) if isinstance(self.A, Tensor) and isinstance(self.G, Tensor) else None

    def to(self, device: torch.device) -> "Factors":
        """The factors on another device."""
        return replace(self, A=self.A.to(device), G=self.G.to(device))


class FactorSums:
    """Sums of a aᵀ and g gᵀ over tokens, streamed; divided only at the end. Pure tensors.

    Args:
        shape: (d_out, d_in) of the matrix.
        device: Where the float32 sums live.
        kind: ``dense`` or ``sketch``.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device, kind: Kind = "dense") -> None:
        d_out, d_in = shape
        self.A, self.G = MomentSum(d_in, kind, device), MomentSum(d_out, kind, device)
        self.num_tokens = 0

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds tokens: ``inputs`` (tokens, d_in) and ``gradients`` (tokens, d_out)."""
        self.A.add(inputs)
        self.G.add(gradients)
        self.num_tokens += len(inputs)

    def state(self) -> dict[str, Tensor]:
        """The tensors from which the sums go on, the count of tokens aside."""
        sides = {"A": self.A, "G": self.G}
        return {f"{side}/{part}": tensor for side, moment in sides.items() for part, tensor in moment.state().items()}

    def add_up(self) -> None:
        """Adds the sums of all processes, in place; each of them calls it once, when its own are complete."""
        tokens = torch.tensor(self.num_tokens)
        distributed.sum_tensors([*self.state().values(), tokens])
        self.num_tokens = int(tokens)

    def mean(self) -> Factors:
        """The factors."""
        return Factors(A=self.A.mean(self.num_tokens), G=self.G.mean(self.num_tokens), num_tokens=self.num_tokens)


def factors_of(name: str, sums: FactorSums) -> Factors:
    """The factors of complete sums, added up over all processes.

    Args:
        name: Of the matrix.
        sums: Of this process.

    Returns:
        The factors, the same everywhere.

    Raises:
        NumericsError: A number is not finite.
    """
    sums.add_up()
    factors = sums.mean()
    for moment in (factors.A, factors.G):
        # |A_ij| is at most the larger of A_ii and A_jj: the diagonal of a dense factor tells
        if not torch.isfinite(moment.diagonal() if isinstance(moment, Tensor) else moment.product).all():
            raise NumericsError(f"the curvature factors of {name} are not finite; load the model with --dtype float32")
    return factors


def merge_factors(factors: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """Factors over several corpora, weighted by their token counts (CrispEdit, Algorithm 2).

    Args:
        factors: At least one, of equal shapes.
        weights: In place of the token counts.

    Returns:
        A = Σ w_k A_k / Σ w_k, and G likewise; sketched where one of them is.
    """
    tokens = [f.num_tokens for f in factors]
    raw = tokens if weights is None else weights
    shares = [weight / sum(raw) for weight in raw]
    return Factors(
        A=weighted_sum([f.A for f in factors], shares),
        G=weighted_sum([f.G for f in factors], shares),
        num_tokens=sum(tokens),
    )
