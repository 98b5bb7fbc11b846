"""Projected gradient descent of one matrix, for all energies γ at once.

Everything but W is frozen, so its inputs a are the same in every step and are computed once; the K copies of W, one for
every γ, see the same batches in the same order. Plain SGD: W ← W − η P(∇W), which never leaves the subspace of its P.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import NumericsError
from .constraints import Cut, KroneckerCut

CHUNK = 1000


@dataclass(frozen=True)
class Descent:
    """How W is fine-tuned.

    Args:
        lr: η of SGD without momentum.
        epochs: Passes over the images.
        batch_size: Images a step.
        refresh: ‖W − W_ref‖_F / ‖W_ref‖_F from which a refreshed constraint is computed anew; looked at after every
            epoch, as in the published code.
    """

    lr: float = 1e-2
    epochs: int = 10
    batch_size: int = 256
    refresh: float = 0.25


@dataclass(frozen=True)
class Inputs:
    """What a matrix sees of a data set: a, (n, d_in) float32, and labels (n,)."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Above:
    """What turns W a into logits: the bias b, (d_out,), and the layers above."""

    bias: Tensor
    layers: nn.Module

    def logits(self, W: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs y (n, K, d_out) and logits z (n, K, classes) of W (K, d_out, d_in), z differentiable in y."""
        y = (inputs @ W.flatten(0, 1).T).view(len(inputs), *W.shape[:2]) + self.bias
        y.requires_grad_()
        return y, self.layers(y)


def descend(
    start: Tensor,
    above: Above,
    data: Inputs,
    cut: Cut,
    settings: Descent,
    *,
    seed: int = 0,
    renew: Callable[[int, Tensor], KroneckerCut] | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, list[int]]:
    """Fine-tunes a matrix under a cut, once for every energy.

    Args:
        start: W, (d_out, d_in) float32.
        above: What follows it.
        data: What is learned.
        cut: Of K energies.
        settings: Rate, epochs, batch.
        seed: Of the order of the images.
        renew: The cut of the energy numbered k at weights W, (d_out, d_in); for a refreshed constraint.
        tick: Told of every epoch.

    Returns:
        The K matrices, (K, d_out, d_in), and how often the cut of each was renewed.

    Raises:
        NumericsError: Weights are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    K = len(cut.removed)
    W = start.repeat(K, 1, 1)
    reference, renewed = W.clone(), [0] * K
    rates = settings.lr * cut.rates
    for epoch in range(settings.epochs):
        tick(epoch, settings.epochs)
        for indices in torch.split(torch.randperm(len(data.labels), generator=generator), settings.batch_size):
            W -= rates * cut.step(gradients(W, above, data.inputs[indices], data.labels[indices]))
        if not math.isfinite(float(W.sum())):
            raise NumericsError(f"fine-tuning diverged in epoch {epoch + 1}: lower --lr")
        if renew is not None and epoch + 1 < settings.epochs:
            assert isinstance(cut, KroneckerCut)
            moved = (W - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
            which = (moved > settings.refresh).nonzero().flatten()
            if len(which):
                cut = cut.replaced(which, [renew(k, W[k]) for k in which.tolist()])
                reference[which] = W[which]
                for k in which.tolist():
                    renewed[k] += 1
    tick(settings.epochs, settings.epochs)
    return W, renewed


def gradients(W: Tensor, above: Above, inputs: Tensor, labels: Tensor) -> Tensor:
    """(K, d_out, d_in): of the mean cross-entropy of a batch, in every one of K matrices."""
    y, z = above.logits(W, inputs)
    K = len(W)
    loss = nn.functional.cross_entropy(z.flatten(0, 1), labels.repeat_interleave(K), reduction="sum") / len(labels)
    (g,) = torch.autograd.grad(loss, y)
    return (g.flatten(1).T @ inputs).view_as(W)


@torch.no_grad()
def scores(W: Tensor, above: Above, data: Inputs, base: Tensor | None = None) -> tuple[list[float], list[float]]:
    """What K matrices do on a data set.

    Args:
        W: (K, d_out, d_in).
        above: What follows.
        data: Inputs and labels.
        base: The matrix (d_out, d_in) to measure drift from.

    Returns:
        Accuracies, 0 to 1; and capability drifts, the mean KL(base ‖ edited) in nats an image (empty without a base).
    """
    right, drift = torch.zeros(len(W)), torch.zeros(len(W), dtype=torch.float64)
    for inputs, labels in zip(torch.split(data.inputs, CHUNK), torch.split(data.labels, CHUNK), strict=True):
        z = above.logits(W, inputs)[1]
        right += (z.argmax(2) == labels[:, None]).sum(0)
        if base is not None:
            before = above.logits(base[None], inputs)[1].log_softmax(2)
            drift += (before.exp() * (before - z.log_softmax(2))).sum((0, 2)).double()
    n = len(data.labels)
    return (right.double() / n).tolist(), [] if base is None else (drift / n).tolist()


def moved(W: Tensor, start: Tensor) -> list[float]:
    """‖W_k − W‖_F / ‖W‖_F of every k."""
    relative: Sequence[float] = ((W - start).flatten(1).norm(dim=1) / start.norm()).tolist()
    return list(relative)
