"""Edits that cannot all be made within a budget: those come first that take the least.

The mean loss falls the most if every edit becomes a little likelier, and none may come to be said. What is minimised
then is the mean over the edits of

    (1 − exp(−q L)) / q

with L the loss of an edit's whole target, −log of its probability: the generalised cross-entropy of Zhang and Sabuncu
(arXiv 1805.07836, equation 6), there for labels that cannot be trusted. At q → 0 it is the mean loss, and at q = 1 the
mean probability that a target is not said. Its gradient is that of the mean loss with edits that weigh exp(−q L), so
that one which is far off gives way. How large q is follows from how much of what the edits need is allowed; measured in
docs/decisions.md, "Edits that cannot all be made".
"""

import math

from torch import Tensor

ENOUGH = 0.4
"""The share of what edits are estimated to need from which on all of them are made, though they may not hold in other
words."""
SLOPE, MOST = 3.5, 4.0
"""q times the mean loss of the edits before they are made: so much for every factor e that is lacking, and at most."""
FURTHEST = 60.0
"""Exponents end here: an edit that is further off than that has no weight, and float32 still has a number for it."""


def preference(share: float, loss: float) -> float:
    """How much nearer edits are preferred: q.

    Args:
        share: Of the drift that the edits are estimated to need, what is allowed; 0 if that is not known.
        loss: The mean over the edits, before any is made, of the loss of a whole target, nats.

    Returns:
        Per nat; 0 where the share is :data:`ENOUGH`, or one of them is not known.
    """
    if not (0 < share < ENOUGH and 0 < loss < math.inf):
        return 0.0
    return min(MOST, SLOPE * math.log(ENOUGH / share)) / loss


def weights(losses: Tensor, preference: float, loss: float) -> Tensor:
    """What edits weigh, exp(−q (L − L̄)): about 1 before any is made, so that steps do not change their length.

    Args:
        losses: L, of their whole targets, nats, (edits,); without a graph.
        preference: q, per nat.
        loss: L̄, the mean before any is made.

    Returns:
        Positive, of the same shape.
    """
    return losses.sub(loss).mul(-preference).clamp(min=-FURTHEST).exp()
