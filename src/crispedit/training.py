"""The edit loop that every gradient editor shares: FT-M loss, skipping, early stop, and update rules.

An update rule says how a gradient of the loss in W becomes a change of W. The *applied* change must lie
in the low-curvature subspace, not only the gradient: Adam rescales element by element, and a projected
gradient it has rescaled is no longer in the subspace. Training coordinates (:class:`Coordinates`) keeps
every change inside by construction. (CrispEdit, arXiv 2602.15823, Algorithm 1; FT-M: appendix E.)
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .curvature import Progress, no_progress
from .errors import NumericsError
from .models import EditMatrix
from .rows import EditRow, collate
from .subspace import Subspace

START, LIMIT = 2.0, 16.0
"""The first learning rate of :class:`Pace` and the highest, both times d_in (the paper's 5e-4 at 8B is 7.2)."""
STEPS_PER_EPOCH = 8
"""An epoch has at least so many steps where the rows suffice (:func:`rows_per_step`)."""
STOP_LOSS = 0.01
"""An epoch whose mean loss is below this is the last; a batch below it is skipped (paper, Table 2)."""


class UpdateRule(Protocol):
    """How gradients become updates of one matrix."""

    parameter: Tensor
    """What Adam trains, float32."""

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """The gradient in :attr:`parameter` of a loss with gradient ``weight_gradient`` (d_out, d_in) in W."""

    def delta(self) -> Tensor:
        """The change of W that the parameter stands for, (d_out, d_in) float32."""


class Unconstrained:
    """Adam on W itself: plain fine-tuning. The parameter is ΔW."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.parameter = torch.zeros(shape, device=device)

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """The gradient as it is."""
        return weight_gradient

    def delta(self) -> Tensor:
        """The parameter as it is."""
        return self.parameter


class Coordinates:
    """W = W₀ + U_G (M ⊙ Z) U_Aᵀ, Adam on Z: inside the subspace by construction.

    Adam's moments live in the Kronecker eigenbasis.
    """

    def __init__(self, subspace: Subspace) -> None:
        self.subspace = subspace
        self.parameter = torch.zeros_like(subspace.mask)

    def gradient(self, weight_gradient: Tensor) -> Tensor:
        """M ⊙ (U_Gᵀ ∇W U_A): Adam leaves coordinates whose gradient is always zero at zero."""
        return self.subspace.mask * self.subspace.to_coordinates(weight_gradient)

    def delta(self) -> Tensor:
        """U_G (M ⊙ Z) U_Aᵀ."""
        return self.subspace.from_coordinates(self.parameter)


@contextmanager
def float32_masters(matrices: Sequence[EditMatrix]) -> Iterator[None]:
    """Within, the matrices are float32 parameters that require a gradient; the model around them keeps its dtype.

    Afterwards they are rounded to the dtype they had, and nothing requires a gradient that did not.
    """
    before = [(m, m.parameter.dtype, m.parameter.requires_grad) for m in matrices]
    handles = []
    for matrix, dtype, _ in before:
        matrix.module.weight = nn.Parameter(matrix.parameter.data.float())
        if dtype != torch.float32:
            handles += _casting(matrix.module, dtype)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for matrix, dtype, needed in before:
            matrix.module.weight = nn.Parameter(matrix.parameter.data.to(dtype), requires_grad=needed)


def _casting(module: nn.Module, dtype: torch.dtype) -> list[Any]:
    """Hooks that hand a module float32 inputs and give its outputs back in ``dtype``."""
    bias = module.bias
    if bias is not None:
        bias.data = bias.data.float()

    class _RestoreBias:
        def remove(self) -> None:
            if bias is not None:
                bias.data = bias.data.to(dtype)

    return [
        module.register_forward_pre_hook(lambda _, arguments: (arguments[0].float(), *arguments[1:])),
        module.register_forward_hook(lambda _, __, output: output.to(dtype)),
        _RestoreBias(),
    ]


def edit_loss(model: Any, rows: Sequence[EditRow], tokenizer: Any) -> Tensor:
    """Mean cross-entropy over the target tokens of a batch of rows; prompt tokens carry none (FT-M).

    Args:
        model: A causal LM.
        rows: The batch.
        tokenizer: For the padding token.

    Returns:
        A scalar.
    """
    batch, labels = collate(rows, tokenizer)
    batch = batch.to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    labels = labels.to(logits.device)
    counted = labels != -100
    return nn.functional.cross_entropy(logits[counted].float(), labels[counted])


@dataclass
class Trace:
    """What happened in a run of the loop: per epoch the mean loss and the learning rate, and the steps in all."""

    epoch_losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    steps: int = 0
    stopped_early: bool = False


class Pace:
    """Raises the learning rate, from a low start, only as far as the first part of an edit needs.

    A rate that suits one model wrecks another and leaves a third untouched; and of two rates that both
    arrive, the lower one damages less. So the rate starts low, by the width of the matrices (a step of
    Adam moves an output by about rate × d_in × mean |a|), and is raised after an epoch whose loss fell
    too slowly to reach a tenth of the first epoch's at two fifths of the epochs, by half at most and never
    beyond a limit that goes by the width too. Later it is not raised: a loss that levels off is no sign
    of slowness. It is halved whenever the loss rises by more than 5 %. Measured in docs/decisions.md.

    Args:
        d_in: Input width of the edited matrices.
        epochs: Passes over the rows, at most.
    """

    def __init__(self, d_in: int, epochs: int) -> None:
        self.current, self.limit = START / d_in, LIMIT / d_in
        self.goal_epoch = 0.4 * epochs

    def rate(self, losses: Sequence[float]) -> float:
        """The learning rate of the next epoch, from the mean losses of those before."""
        if len(losses) < 2:
            return self.current
        first, before, now = (max(loss, 1e-9) for loss in (losses[0], *losses[-2:]))  # a loss may be exactly 0
        if now > 1.05 * before:
            self.current /= 2
        elif len(losses) < self.goal_epoch:
            fell = max(math.log(before / now), 1e-3)
            needed = math.log(max(10 * now / first, 1.0)) / max(self.goal_epoch - len(losses), 1.0)
            self.current = min(self.limit, self.current * min(1.5, max(1.0, needed / fell)))
        return self.current


def rows_per_step(num_rows: int, at_most: int) -> int:
    """The batch size for a number of edits: ten in one batch would get no more than 25 steps in 25 epochs.

    Args:
        num_rows: Edits in all.
        at_most: The batch size for many edits.

    Returns:
        At least 1.
    """
    return min(at_most, max(1, num_rows // STEPS_PER_EPOCH))


def fine_tune(
    model: Any,
    tokenizer: Any,
    matrices: Sequence[EditMatrix],
    rules: Sequence[UpdateRule],
    rows: Sequence[EditRow],
    *,
    lr: float | Pace,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    stop_loss: float = STOP_LOSS,
    progress: Progress = no_progress,
) -> Trace:
    """Fine-tunes the matrices in place with Adam, each through its update rule.

    Args:
        model: A causal LM, its matrices inside :func:`float32_masters`.
        tokenizer: Its tokenizer.
        matrices: What is edited.
        rules: One per matrix; their parameters start at zero or go on from where they are.
        rows: The edits' rows.
        lr: Adam's learning rate, or the rule that finds it.
        epochs: Passes over the rows, at most.
        batch_size: Rows per step.
        seed: Of the order of rows, reshuffled every epoch.
        stop_loss: See :data:`STOP_LOSS`.
        progress: Called after every step with steps done and the steps of all epochs.

    Returns:
        Mean loss of every epoch, each batch measured before its own update.

    Raises:
        NumericsError: A loss is not finite.
    """
    originals = [matrix.weight.clone() for matrix in matrices]
    for original, rule in zip(originals, rules, strict=True):
        original -= rule.delta()
    optimizer = torch.optim.Adam([rule.parameter for rule in rules], lr=0.0)
    rng = random.Random(seed)
    trace = Trace()
    steps_per_epoch = -(-len(rows) // batch_size)
    for epoch in range(epochs):
        rate = lr.rate(trace.epoch_losses) if isinstance(lr, Pace) else lr
        optimizer.param_groups[0]["lr"] = rate
        trace.rates.append(rate)
        order = list(rows)
        rng.shuffle(order)
        total = 0.0
        for step in range(steps_per_epoch):
            batch = order[step * batch_size : (step + 1) * batch_size]
            loss = edit_loss(model, batch, tokenizer)
            value = loss.item()
            if value != value or value in (float("inf"), float("-inf")):
                where = f"epoch {epoch + 1}, step {step + 1}"
                raise NumericsError(f"the edit loss is {value} in {where}; lower --lr ({rate:g})")
            total += value * len(batch)
            if value >= stop_loss:
                gradients = torch.autograd.grad(loss, [matrix.parameter for matrix in matrices])
                for matrix, rule, gradient in zip(matrices, rules, gradients, strict=True):
                    rule.parameter.grad = rule.gradient(matrix.as_weight(gradient))
                optimizer.step()
                for matrix, rule, original in zip(matrices, rules, originals, strict=True):
                    matrix.weight.copy_(original + rule.delta())
                trace.steps += 1
            progress("edit", epoch * steps_per_epoch + step + 1, epochs * steps_per_epoch)
        trace.epoch_losses.append(total / len(rows))
        if trace.epoch_losses[-1] < stop_loss:
            trace.stopped_early = True
            break
    return trace
