"""Passes over token batches, forward and backward: inputs of matrices, and gradients of the loss at their outputs.

For softmax cross-entropy the Gauss–Newton Hessian is the Fisher information: the expectation over
labels *sampled from the model* (``fisher="mc"``). With the texts' own next tokens it is the empirical
Fisher (``fisher="empirical"``), a different matrix, and the one that the published code computes.
(CrispEdit, arXiv 2602.15823, section 3.3; Martens & Grosse 2015.)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from . import distributed, ranks
from .errors import NumericsError, check_choice
from .models import EditMatrix, frozen
from .pieces import HiddenStates, hidden_states
from .texts import TokenBatch, next_tokens

Fisher = Literal["mc", "empirical"]


def check_fisher(fisher: str) -> None:
    """Raises :class:`ConfigError` unless ``fisher`` is ``mc`` or ``empirical``."""
    check_choice("fisher", fisher, get_args(Fisher))


@contextmanager
def recorded(matrices: Sequence[EditMatrix]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within, every forward pass leaves input and output of each matrix's module, by name."""
    records: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # below the first edited matrix nothing is differentiated
                output = output.detach().requires_grad_()
            records[name] = (arguments[0].detach(), output)
            return output.clone()  # a later in-place addition must not reach what was recorded

        return hook

    handles = [matrix.module.register_forward_hook(hook_for(matrix.name)) for matrix in matrices]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def passes(
    model: Any,
    matrices: Sequence[EditMatrix],
    batches: Sequence[TokenBatch],
    fisher: Fisher,
    seed: int,
    first: int = 0,
) -> Iterator[tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]:
    """A forward and a backward pass per batch, down to the matrices' outputs.

    Of several processes each passes over its share. Labels are the same whoever samples them, and wherever a pass
    begins: every token has a random number of its own, drawn before the first batch.

    Args:
        model: A causal LM.
        matrices: The matrices of interest.
        batches: All of them.
        fisher: How labels come about.
        seed: Of sampled labels.
        first: How many of this process's batches are behind it.

    Yields:
        Which positions predict a token, (rows, length) bool; and per matrix name the inputs (rows, length, d_in) and
        the gradients at the outputs (rows, length, d_out) of the loss, summed over a sequence's tokens.

    Raises:
        NumericsError: The loss is not finite.
    """
    device = model.get_input_embeddings().weight.device
    draws = _draws(batches, seed) if fisher == "mc" else ()
    with frozen(model), recorded(matrices) as records, torch.enable_grad():
        mine = distributed.share(range(len(batches)))
        to_do = [(number, True) for number in mine[first:]]
        if ranks.in_step():  # as many for every process: those of a sharded model run together
            to_do += [(0, False)] * (max(distributed.gather(len(to_do))) - len(to_do))
        for number, counted in to_do:
            batch = batches[number].to(device)
            labels = next_tokens(batch)
            predicted = labels != -100
            hidden = hidden_states(model, batch).at(predicted)
            uniform = draws[number] if fisher == "mc" else None
            loss, pulled = _pulled(hidden, labels[predicted].to(hidden.states.device), uniform)
            gradients = torch.autograd.grad(hidden.states, [records[m.name][1] for m in matrices], pulled)
            found = {m.name: (records[m.name][0], g) for m, g in zip(matrices, gradients, strict=True)}
            records.clear()
            if not torch.isfinite(loss):
                layers = ", ".join(str(m.layer) for m in matrices)
                raise NumericsError(f"the capability loss of batch {number + 1} is not finite (layers {layers})")
            if counted:
                yield predicted, found


def _pulled(hidden: HiddenStates, labels: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of tokens, summed, and its gradient in their hidden states; a few tokens at a time.

    Args:
        hidden: (tokens, width).
        labels: (tokens,).
        uniform: Numbers by which labels are sampled in place of these, if they are.
    """
    pulled = torch.empty_like(hidden.states)
    loss = torch.zeros((), device=labels.device)
    for piece in hidden.pieces():
        part = hidden.states[piece]
        logits = hidden.head(part).float()
        wanted = labels[piece].to(logits.device) if uniform is None else sampled(logits.detach(), uniform[piece])
        of_part = nn.functional.cross_entropy(logits, wanted, reduction="sum")
        (pulled[piece],) = torch.autograd.grad(of_part, part)
        loss += of_part.detach().to(loss.device)
    return loss, pulled


def _draws(batches: Sequence[TokenBatch], seed: int) -> tuple[Tensor, ...]:
    """A uniform number for every token of every batch that is a label (:func:`crispedit.texts.next_tokens`)."""
    counts = [int(batch.mask[:, 1:].sum()) for batch in batches]
    return torch.split(torch.rand(sum(counts), generator=torch.Generator().manual_seed(seed)), counts)


def sampled(logits: Tensor, uniform: Tensor) -> Tensor:
    """One label per position from softmax(logits), by the inverse of its distribution function.

    A random number per position is enough for that, whatever the vocabulary: the CPU draws those of all texts, the same
    for every device and every process, in no time. Gumbel's trick takes one per logit.

    Args:
        logits: (positions, vocabulary) float32.
        uniform: (positions,) float32 in [0, 1), on any device.

    Returns:
        (positions,) int64: the first label whose probability and that of all before it exceed ``uniform``.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]  # 1 but for rounding
    sought = uniform.to(logits.device)[:, None] * total
    below = total.nextafter(torch.zeros_like(total))  # at the total itself there may be labels without a share
    found = torch.searchsorted(cumulative, torch.minimum(sought, below), right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)  # of logits that are not numbers too: the loss will say so
