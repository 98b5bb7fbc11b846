"""What the gradient of an edit loss in a matrix is made of: its input and its output gradient, token by token.

    y = W h,   g = ∂loss/∂y,   ∇W = Σ_t g_t h_tᵀ

UltraEdit and MEND make their update of the pairs (h_t, g_t), and never of ∇W. Both normalise them with the mean and the
standard deviation of every coordinate over all tokens seen (:class:`RunningMoments`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..fisher import recorded
from ..forward import RowBatch, collate, target_logits
from ..models import EditMatrix
from ..rows import EditRow

Tokens = Literal["answer", "all"]
"""Positions whose next token is a target token, or all of a row but its last."""


@dataclass(frozen=True, kw_only=True)
class TokenFactors:
    """Inputs and output gradients of one matrix at some tokens of edit rows.

    Args:
        inputs: h, (tokens, d_in) float32 (of a float64 model, float64).
        gradients: g, (tokens, d_out), likewise.
        rows: The row that a token is of, (tokens,) int64 on the CPU.
    """

    inputs: Tensor
    gradients: Tensor
    rows: Tensor

    @property
    def joined(self) -> Tensor:
        """[h; g], (tokens, d_in + d_out)."""
        return torch.cat([self.inputs, self.gradients], dim=-1)


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What one backward pass per batch gave.

    Args:
        factors: By matrix name.
        losses: The cross-entropy of every target token, row by row, (targets,) float32.
        total: The loss of which g is the gradient, summed over batches.
    """

    factors: dict[str, TokenFactors]
    losses: Tensor
    total: float


def capture(
    model: Any,
    matrices: Sequence[EditMatrix],
    rows: Sequence[EditRow],
    *,
    tokens: Tokens = "answer",
    reduction: Literal["sum", "mean"] = "sum",
    batch_size: int = 32,
    done: Callable[[int], None] = lambda rows: None,
) -> Captured:
    """Inputs and output gradients of matrices for rows, with the weights as they are.

    Args:
        model: A causal LM.
        matrices: Whose inputs and output gradients.
        rows: Edit rows, at least one.
        tokens: At which of their tokens.
        reduction: The loss of which g is the gradient: the sum over the target tokens of a row (then rows do not
            depend on what they are run with), or the mean over the target tokens of a batch.
        batch_size: Rows of a pass.
        done: Called after every pass with the rows behind it.

    Returns:
        Tokens in the order of ``rows``. At ``all`` tokens, those of the last block's MLP whose gradient must be zero,
        because nothing reads them, are left out.
    """
    parts: dict[str, list[TokenFactors]] = {matrix.name: [] for matrix in matrices}
    losses, total = [], 0.0
    device = model.get_input_embeddings().weight.device
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size]).to(device)
        with torch.enable_grad(), recorded(matrices) as records:
            logits = target_logits(model, batch)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = nn.functional.cross_entropy(logits, batch.labels.to(logits.device), reduction="none")
            reduced = loss.sum() if reduction == "sum" else loss.mean()
            gradients = torch.autograd.grad(reduced, [records[m.name][1] for m in matrices])
        losses.append(loss.detach())
        total += float(reduced.detach())
        for matrix, gradient in zip(matrices, gradients, strict=True):
            inputs = records[matrix.name][0]
            parts[matrix.name].append(_at(tokens, batch, inputs, gradient, start))
        done(min(start + batch_size, len(rows)))
    factors = {
        name: TokenFactors(
            inputs=torch.cat([part.inputs for part in of_matrix]),
            gradients=torch.cat([part.gradients for part in of_matrix]),
            rows=torch.cat([part.rows for part in of_matrix]),
        )
        for name, of_matrix in parts.items()
    }
    return Captured(factors=factors, losses=torch.cat(losses), total=total)


def _at(tokens: Tokens, batch: RowBatch, inputs: Tensor, gradients: Tensor, first_row: int) -> TokenFactors:
    """The chosen tokens of a batch, from what a module saw: all positions, or (the last MLP) target positions alone."""
    chosen = batch.positions if tokens == "answer" else batch.real
    inputs, gradients = (values.flatten(0, -2) for values in (inputs, gradients))
    if len(gradients) == batch.ids.numel():
        at = chosen.to(gradients.device)
        inputs, gradients = inputs.index_select(0, at), gradients.index_select(0, at)
    else:
        chosen = batch.positions
    rows = first_row + chosen.cpu() // batch.ids.shape[1]
    wide = torch.promote_types(gradients.dtype, torch.float32)
    return TokenFactors(inputs=inputs.to(wide), gradients=gradients.to(wide), rows=rows)


class RunningMoments:
    """Mean and variance of every coordinate over all rows ever given: Chan, Golub & LeVeque's update, in float64.

        n' = n + m,   d = x̄ − μ,   μ += m d / n',   M₂ += Σ (x − x̄)² + n m d² / n',   σ² = M₂ / (n' − 1)

    Args:
        width: Coordinates.
        device: Where it is kept.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self.mean, self.squares = (torch.zeros(width, dtype=torch.float64, device=device) for _ in range(2))

    def update(self, rows: Tensor) -> None:
        """Takes in more rows, (rows, width); any number of them, one at a time too."""
        rows = rows.to(self.mean)
        added, total = len(rows), self.count + len(rows)
        if added == 0:
            return
        mean = rows.mean(0)
        difference = mean - self.mean
        self.squares += (rows - mean).square().sum(0) + difference.square() * (self.count * added / total)
        self.mean += difference * (added / total)
        self.count = total

    @property
    def std(self) -> Tensor:
        """σ, (width,) float64; 0 where a coordinate does not vary by more than float32 rounds it."""
        std = (self.squares / max(self.count - 1, 1)).sqrt()
        smallest = torch.finfo(torch.float32).eps * (self.mean.square() + std.square()).sqrt()
        return torch.where(std > smallest, std, 0.0)

    def normalised(self, rows: Tensor) -> Tensor:
        """(x − μ) / σ in float32, 0 where σ is 0; as they are while there is but one row, which has no σ.

        Args:
            rows: (rows, width).

        Returns:
            The same shape.
        """
        if self.count < 2:
            return rows.float()
        std = self.std
        centred = rows.to(self.mean) - self.mean
        return torch.where(std > 0, centred / std.where(std > 0, 1.0), 0.0).float()
