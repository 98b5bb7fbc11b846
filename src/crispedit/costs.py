"""What an edit costs, counted from the shapes of a model: floating-point operations and bytes, no tensor touched.

A multiplication and an addition are two flops. Counted are matrix products: the linear maps of the decoder blocks, read
off their modules, so that grouped queries, gated and plain MLPs need no case of their own; attention's scores and the
sums that they weigh, over whole rows, as kernels without a causal shortcut compute them; the head. Left out are norms,
activation functions and rotary embeddings, a few flops per number, and what a kernel recomputes in its backward pass.
(What is computed in a step, and why: CrispEdit, arXiv 2602.15823, Algorithm 1; section 6 of the
project's design counts 7.5 TFLOP for a forward pass of LLaMA-3-8B over 500 tokens, as these functions do.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .forward import BatchSize, rounded_up
from .models import EditMatrix, decoder_blocks, edit_matrices, text_config
from .moments import Kind, sketch_rank

Shape = tuple[int, int]
"""(d_out, d_in) of a matrix."""

EIGH = 9
"""Flops of a full diagonalisation of an n × n matrix, times n³: reduction to tridiagonal form 4/3, divide and conquer
4/3 to 4, the eigenvectors back again 2, in a mix of fast and slow products (Golub & Van Loan, section 8.3)."""

EIGH_BYTES = 32
"""Bytes per number of the widest factor while it is diagonalised: float64 matrix, eigenvectors, and LAPACK's workspace
of twice that size."""


@dataclass(frozen=True, kw_only=True)
class BlockCosts:
    """One decoder block.

    Args:
        linear: Flops per token of all its linear maps, forward.
        mlp: Of those, the MLP's.
        attention: Flops per token and key of its row: scores, and the weighted sum of the values.
        kept: Numbers per token that autograd keeps in the model's dtype: what maps give, and what attention and the
            MLP's activation make of it.
        kept_float32: Numbers per token that it keeps in float32: the norms' inputs.
    """

    linear: int
    mlp: int
    attention: int
    kept: int
    kept_float32: int

    def kept_bytes(self, dtype: torch.dtype) -> int:
        """Bytes per token that autograd keeps, roughly."""
        return self.kept * dtype.itemsize + 4 * self.kept_float32


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Flops of a pass over a batch and of what is done with its gradients.

    Args:
        forward: Of the forward pass.
        backward: Of the backward pass: gradients of activations, and of the edited matrices where they are asked for.
        update: Of the update rule; of a pass over texts, of the sums of both factors.
    """

    forward: int
    backward: int
    update: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.forward + self.backward + self.update


def _linear_maps(module: nn.Module) -> list[tuple[nn.Module, Shape]]:
    """The linear maps in a module, as (d_out, d_in)."""
    found: list[tuple[nn.Module, Shape]] = []
    for part in module.modules():
        if isinstance(part, nn.Linear):
            found.append((part, (part.out_features, part.in_features)))
        elif isinstance(part, Conv1D):
            rows, columns = part.weight.shape
            found.append((part, (columns, rows)))
    return found


def _flops(maps: Iterable[tuple[nn.Module, Shape]]) -> int:
    return sum(2 * d_out * d_in for _, (d_out, d_in) in maps)


def attention_width(model: Any) -> int:
    """Heads times the width of a head."""
    config = text_config(model)
    heads = int(config.num_attention_heads)
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def cached_bytes(model: Any, dtype: torch.dtype) -> int:
    """Bytes per token of the keys and values that are kept while an answer is generated."""
    config = text_config(model)
    heads = int(config.num_attention_heads)
    width = attention_width(model) * int(getattr(config, "num_key_value_heads", None) or heads) // heads
    return 2 * width * int(config.num_hidden_layers) * dtype.itemsize


def block_costs(model: Any) -> tuple[BlockCosts, ...]:
    """What every decoder block costs.

    Args:
        model: A dense causal LM, on any device; ``meta`` will do.

    Returns:
        One for each block, in order.
    """
    if model not in _known:
        _known[model] = _counted(model)
    return _known[model]


_known: WeakKeyDictionary[Any, tuple[BlockCosts, ...]] = WeakKeyDictionary()
"""What was counted before: a plan asks hundreds of times, and a large model has thousands of modules."""


def _counted(model: Any) -> tuple[BlockCosts, ...]:
    _, blocks = decoder_blocks(model)
    width = attention_width(model)
    found = []
    for matrix, block in zip(edit_matrices(model, range(len(blocks))), blocks, strict=True):
        maps = _linear_maps(block)
        # the MLP is the module that holds the down-projection; without one of its own, the maps from and to its width
        holder = next(m for m in block.modules() if any(child is matrix.module for child in m.children()))
        mlp = _linear_maps(holder) if holder is not block else maps[-2:]
        norms = sum(p.numel() for m in block.modules() if (p := getattr(m, "weight", None)) is not None and p.ndim == 1)
        found.append(
            BlockCosts(
                linear=_flops(maps),
                mlp=_flops(mlp),
                attention=4 * width,
                kept=sum(d_out for _, (d_out, _) in maps) + matrix.shape[1] + width,
                kept_float32=norms,
            )
        )
    return tuple(found)


def vocabulary(model: Any) -> int:
    """How many logits the head gives."""
    return int(model.get_output_embeddings().weight.shape[0])


def head_flops(model: Any) -> int:
    """Flops of the logits of one position."""
    return int(2 * model.get_output_embeddings().weight.numel())


def weight_bytes(model: Any, dtype: torch.dtype) -> int:
    """Bytes of the parameters in a dtype; what is tied counts once."""
    return int(sum(p.numel() for p in model.parameters()) * dtype.itemsize)


def step_flops(
    model: Any, matrices: Sequence[EditMatrix], batches: Sequence[BatchSize], *, replay: bool, rule_flops: int = 0
) -> StepFlops:
    """Flops of edit steps, one for each batch.

    In full, as published code does it, everything from the embedding on is computed at every position, logits too;
    gradients flow back to the first edited matrix. With replay, what lies before the first edited matrix has been
    recorded: computed are that matrix at the real tokens, the blocks above its own, and the MLP of the last block and
    the head where target tokens are predicted. Backward, a linear map costs what it costs forward for the gradient of
    its input, and as much again for that of an edited matrix; attention twice its forward pass.

    Args:
        model: A dense causal LM, on any device; ``meta`` will do.
        matrices: What is edited, in ascending order of layers.
        batches: Their sizes; in full, every position counts as one where something is predicted.
        replay: Whether what the edit cannot change is replayed.
        rule_flops: Of the update rules of all matrices and steps together (:func:`crispedit.rule_choice.step_flops`).

    Returns:
        The counts.
    """
    blocks, first = block_costs(model), matrices[0].layer
    computed, pairs = sum(batch.computed for batch in batches), sum(batch.pairs for batch in batches)
    run = rounded_up if replay else int
    wanted, real = sum(run(batch.positions) for batch in batches), sum(run(batch.tokens) for batch in batches)

    def weight_gradient(matrix: EditMatrix) -> int:
        d_out, d_in = matrix.shape
        if replay and matrix is matrices[0]:
            return 2 * d_out * d_in * real
        return 2 * d_out * d_in * (wanted if matrix.layer == len(blocks) - 1 else computed)

    above, attention = _above(blocks, first, computed, wanted, pairs)
    head = head_flops(model) * wanted
    backward = head + above + 2 * attention + sum(weight_gradient(matrix) for matrix in matrices)
    if replay:
        forward = weight_gradient(matrices[0]) + above + attention + head  # W a costs what its gradient costs
    else:
        forward = _forward(blocks, computed, pairs) + head
    return StepFlops(forward=forward, backward=backward, update=rule_flops)


def _forward(blocks: Sequence[BlockCosts], tokens: int, pairs: int) -> int:
    """Flops of blocks over rows."""
    return sum(block.linear * tokens + block.attention * pairs for block in blocks)


def _above(blocks: Sequence[BlockCosts], first: int, tokens: int, wanted: int, pairs: int) -> tuple[int, int]:
    """Flops of the linear maps and of the attention in the blocks above one; the last MLP at the wanted positions."""
    above = blocks[first + 1 :]
    linear = sum(block.linear * tokens for block in above)
    if above:
        linear -= above[-1].mlp * (tokens - wanted)
    return linear, sum(block.attention * pairs for block in above)


def recording_flops(model: Any, matrices: Sequence[EditMatrix], batches: Sequence[BatchSize]) -> int:
    """Flops of what is computed once for the replay: all blocks up to that of the first edited matrix.

    Args:
        model: A dense causal LM, on any device; ``meta`` will do.
        matrices: What is edited, in ascending order of layers.
        batches: Sizes of the batches that are recorded.

    Returns:
        The count.
    """
    blocks = block_costs(model)[: matrices[0].layer + 1]
    return sum(_forward(blocks, batch.computed, batch.pairs) for batch in batches)


def recorded_bytes(model: Any, matrices: Sequence[EditMatrix], tokens: int, dtype: torch.dtype) -> int:
    """Bytes of what is kept for the replay: per token the first matrix's input, and the rest of its block's output.

    Args:
        model: A dense causal LM, on any device; ``meta`` will do.
        matrices: What is edited, in ascending order of layers.
        tokens: How many are recorded.
        dtype: The model's.

    Returns:
        The count.
    """
    return tokens * (matrices[0].shape[1] + int(text_config(model).hidden_size)) * dtype.itemsize


def texts_flops(
    model: Any, matrices: Sequence[EditMatrix], lengths: Sequence[int], *, kind: Kind | None = None
) -> StepFlops:
    """Flops of passes over texts: forward only, or with the backward pass and the sums of a curvature.

    Args:
        model: A dense causal LM, on any device; ``meta`` will do.
        matrices: Whose factors are summed.
        lengths: Tokens of every text.
        kind: Of the factors; ``None`` for the forward pass alone.

    Returns:
        The counts; no gradient of a parameter is taken. The head, at two positions more in every batch
        (:mod:`crispedit.pieces`), is counted where something is predicted.
    """
    blocks, tokens, squares = block_costs(model), sum(lengths), sum(n * n for n in lengths)
    predicting = tokens - len(lengths)  # a text's last token predicts nothing
    head = head_flops(model) * predicting
    forward = _forward(blocks, tokens, squares) + head
    if kind is None:
        return StepFlops(forward=forward, backward=0)
    above, attention = _above(blocks, matrices[0].layer, tokens, tokens, squares)
    sums = sum(_sum_flops(size, kind) for matrix in matrices for size in matrix.shape)
    return StepFlops(forward=forward, backward=head + above + 2 * attention, update=predicting * sums)


def _sum_flops(size: int, kind: Kind) -> int:
    """Flops of adding one vector to a second moment."""
    return 2 * size**2 if kind == "dense" else 4 * size * _columns(size, kind)


def answer_flops(model: Any, prompts: Sequence[int], new_tokens: int) -> int:
    """Flops of greedy answers with a cache of keys and values.

    Args:
        model: A dense causal LM, on any device; ``meta`` will do.
        prompts: Tokens of every prompt.
        new_tokens: Of every answer, at most.

    Returns:
        The count.
    """
    blocks = block_costs(model)
    linear, attention = sum(block.linear for block in blocks), sum(block.attention for block in blocks)
    total = 0
    for length in prompts:
        later = new_tokens - 1  # the prompt itself gives the first one
        keys = length**2 + later * length + later * (later + 1) // 2
        total += linear * (length + later) + attention * keys + head_flops(model) * new_tokens
    return total


def eigh_flops(size: int) -> int:
    """Flops of the full diagonalisation of a factor."""
    return EIGH * size**3


def nystrom_flops(size: int) -> int:
    """Flops of the leading eigenpairs of a factor by its sketch (:attr:`crispedit.moments.Sketch.eigenpairs`).

    Args:
        size: n.

    Returns:
        The count: five products of n × ℓ with ℓ × ℓ matrices, some of ℓ × ℓ, two diagonalisations.
    """
    rank = sketch_rank(size)
    return 10 * size * rank**2 + 7 * rank**3 + 2 * eigh_flops(rank)


def approximate_flops(size: int, rank: int) -> int:
    """Flops of about so many leading pairs of a dense factor (:func:`crispedit.eigen.approximate_pairs`).

    Args:
        size: n.
        rank: k ≤ n.

    Returns:
        Three products with the matrix, two QR decompositions (4 n k²), three products of n × k and k × k matrices; the
        small diagonalisation aside.
    """
    return 6 * size**2 * rank + 14 * size * rank**2


def _columns(size: int, kind: Kind) -> int:
    return size if kind == "dense" else min(size, sketch_rank(size))


def factor_bytes(shapes: Sequence[Shape], kind: Kind) -> int:
    """Bytes of the float32 factors A and G of matrices: n² numbers of a dense one, n ℓ of a sketch."""
    return sum(4 * size * _columns(size, kind) for shape in shapes for size in shape)
