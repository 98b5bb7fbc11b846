"""Adam, and what it has learnt in one run of the loop, for the next: one optimiser over many rounds.

Adam's moments are of the parameter's entries, and what the parameter is written in may change from round to round, when
the curvature has: the update rules know how their moments carry over (:meth:`crispedit.updates.UpdateRule.carried`).
"""

from collections.abc import Sequence
from typing import Any

import torch

from .updates import UpdateRule


def adam(parameters: Sequence[torch.Tensor], lr: float) -> torch.optim.Adam:
    """Adam, fused."""
    return torch.optim.Adam(parameters, lr=lr, fused=True)


class AdamMemory:
    """Adam's moments and step counts of the rules of one round; empty at first."""

    def __init__(self) -> None:
        self._states: list[dict[str, torch.Tensor]] = []
        self._rules: Sequence[UpdateRule] = ()

    def keep(self, optimizer: torch.optim.Optimizer, rules: Sequence[UpdateRule]) -> None:
        """Keeps what an optimizer knows of the parameters of rules, each of which has one."""
        # a rule whose batches were all learnt already has never been stepped: it has no state
        states = [optimizer.state[rule.parameter] for rule in rules]
        if all(states):
            self._states, self._rules = [dict(state) for state in states], rules

    def recall(self, optimizer: torch.optim.Optimizer, rules: Sequence[UpdateRule]) -> None:
        """Gives an optimizer of the parameters of other rules, of the same matrices, what is kept.

        Raises:
            ConfigError: Moments of such rules cannot be carried over.
        """
        for state, before, after in zip(self._states, self._rules, rules, strict=bool(self._states)):
            mean, square = after.carried(before, state["exp_avg"], state["exp_avg_sq"])
            known: dict[str, Any] = {"step": state["step"], "exp_avg": mean, "exp_avg_sq": square}
            # clones: several trials may set out from here
            optimizer.state[after.parameter] = {name: value.clone() for name, value in known.items()}
