"""Steepest descent in a metric of one's own: natural gradient descent (Amari, 1998) with a diagonal metric."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ownership import sum_of_all

MOMENTUM, SCALE = 0.9, 0.95
"""Decay rates of the running means of the gradient and of its squared length."""


class NaturalDescent(torch.optim.Optimizer):
    """Steps in the direction in which a loss falls fastest for what the metric says that a step costs.

        m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) Σ g² / D   (over all parameters)
        p ← p − η m̂ / (D √v̂)

    m̂ and v̂ are without the bias towards zero of the first steps. The metric is that of damage, not of the loss: along
    a direction of cost D a step of length √(Σ D Δp²) = η lowers the loss the most if it is proportional to g / D. Adam
    takes steps of like size along all coordinates, those included along which the loss hardly falls.

    Args:
        parameters: What is trained.
        metrics: D of each, of its shape, positive.
        lr: η, in units of the metric.
        steps: Over so many steps η falls linearly to zero.
    """

    def __init__(self, parameters: Sequence[Tensor], metrics: Sequence[Tensor], lr: float, steps: int) -> None:
        super().__init__(parameters, {"lr": lr})
        self.metrics, self.steps, self.done = metrics, steps, 0
        self.means = [torch.zeros_like(parameter) for parameter in parameters]
        self.squared_length: Tensor | float = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step, from the gradients in ``grad``; nothing waits for the device."""
        self.done += 1
        group = self.param_groups[0]
        gradients = [parameter.grad for parameter in group["params"]]
        length = torch.zeros((), device=gradients[0].device)
        for gradient, metric, mean in zip(gradients, self.metrics, self.means, strict=True):
            mean.lerp_(gradient, 1 - MOMENTUM)
            length += (gradient.square() / metric).sum().to(length.device)
        sum_of_all(length)  # other processes have other matrices
        self.squared_length = SCALE * self.squared_length + (1 - SCALE) * length
        unbiased = torch.as_tensor(self.squared_length / (1 - SCALE**self.done)).sqrt().clamp(min=1e-30)
        rate = group["lr"] * max(0.0, 1 - (self.done - 1) / self.steps) / (1 - MOMENTUM**self.done)
        for parameter, metric, mean in zip(group["params"], self.metrics, self.means, strict=True):
            parameter.sub_(mean / metric * (rate / unbiased).to(mean.device))
