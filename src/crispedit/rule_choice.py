"""Which update rule a matrix gets: by name, or the best that it can pay for, by counting what a step of each costs."""

from collections.abc import Callable
from typing import Literal, get_args

from .models import EditMatrix
from .priced import PRICE, priced_rule
from .subspace import Subspace
from .updates import (
    ROTATION,
    Coordinates,
    Elsewhere,
    Filter,
    LeadingCoordinates,
    Projected,
    ProjectedGradient,
    Update,
    UpdateProjected,
    UpdateRule,
    check_update,
    leading_counts,
    leading_frame,
)

TOKENS = 512
"""Of a step, where rules are chosen by what they cost."""
AFFORDABLE = 1.25
"""A rule may cost so many times what its matrix costs in such a step, forward and back: 6 d_out d_in flops a token.
An edited matrix is at most a fifth of what a step runs through, so that this is a quarter of the step."""
PIVOT = 2.2
"""So many times as long as its flops at the speed of thick products does a projection by a pivot take: measured."""

_RULES: dict[str, Callable[[Subspace], UpdateRule]] = {
    "coordinates": Coordinates,
    "leading": LeadingCoordinates,
    "filter": Filter,
    "projected": Projected,
    "update-projected": UpdateProjected,
    "projected-gradient": ProjectedGradient,
}
assert {*_RULES, "priced"} == {*get_args(Update)}  # which has settings of its own: update_rule


def step_flops(update: Update, subspace: Subspace, tokens: int = TOKENS, rotation: float = ROTATION) -> int:
    """What a rule adds to a step of plain fine-tuning, Adam aside.

    Args:
        update: Its name.
        subspace: Of the matrix.
        tokens: Of the step.
        rotation: See :func:`leading_counts`.

    Returns:
        Flops, a multiplication and an addition counted apart.
    """
    d_out, d_in = subspace.shape
    if update == "priced":
        update = "leading" if subspace.threshold.cross is not None else "coordinates"
    if update == "leading":
        counts = zip(leading_counts(subspace, rotation), subspace.shape, strict=True)
        return tokens * sum(min(8 * n * k, 4 * n * n) for k, n in counts)
    if update in ("coordinates", "filter"):
        return 4 * d_out * d_in * (d_out + d_in)
    return subspace.flops * (2 if update == "projected" else 1)


def coordinates_cost_little(shape: tuple[int, int]) -> bool:
    """Whether a matrix (d_out, d_in) is so narrow that it may be turned whole, twice a step: see :data:`AFFORDABLE`."""
    return 4 * sum(shape) <= AFFORDABLE * 6 * TOKENS


def metric_form(shape: tuple[int, int]) -> Literal["auto", "cross"]:
    """The form of a subspace whose whole eigenbases a matrix (d_out, d_in) is trained in, by what a step costs less.

    ``auto``: its gradient goes there and the update back. ``cross``: tokens do, :data:`TOKENS` of them.
    """
    d_out, d_in = shape
    return "auto" if d_out * d_in * (d_out + d_in) <= TOKENS * (d_out**2 + d_in**2) else "cross"


def chosen_update(subspace: Subspace, rotation: float = ROTATION) -> Update:
    """The best rule that a matrix can pay for, by counting; of quality and price: docs/decisions.md.

    Args:
        subspace: Of the matrix.
        rotation: See :func:`leading_counts`.

    Returns:
        The first of ``coordinates``, ``leading``, ``projected`` and ``update-projected`` that the subspace allows and
        that costs no more than :data:`AFFORDABLE`; or the cheapest of them.
    """
    possible: list[Update] = ["projected", "update-projected"]
    if subspace.threshold.cross is not None:
        possible.insert(0, "leading")
    if subspace.spectrum.complete:
        possible.insert(0, "coordinates")

    def cost(update: Update) -> float:
        slow = PIVOT if subspace.form == "pivot" and "projected" in update else 1
        return slow * step_flops(update, subspace, rotation=rotation)

    most = AFFORDABLE * 6 * subspace.shape[0] * subspace.shape[1] * TOKENS
    return next((update for update in possible if cost(update) <= most), min(possible, key=cost))


def rule_elsewhere(
    matrix: EditMatrix, update: Update | Literal["auto"], subspace: Subspace, rotation: float = ROTATION
) -> Elsewhere:
    """What a process has in place of :func:`update_rule` of a matrix that another one trains.

    Args:
        matrix: It.
        update: The rule's name.
        subspace: Of the matrix, on any device.
        rotation: See :func:`leading_counts`.

    Returns:
        Its bases, where W itself is seen in other ones.
    """
    if update == "auto":
        update = chosen_update(subspace, rotation)
    check_update(update, subspace)
    turned = update == "leading" or (update == "priced" and subspace.threshold.cross is not None)
    return Elsewhere(matrix, leading_frame(subspace.to(matrix.parameter.device), rotation) if turned else None)


def update_rule(
    update: Update | Literal["auto"], subspace: Subspace, rotation: float = ROTATION, price: float = PRICE
) -> UpdateRule:
    """The rule of a name for one matrix.

    Args:
        update: Its name; ``auto`` is :func:`chosen_update`.
        subspace: Of the matrix, on the device of its weight.
        rotation: See :func:`leading_counts`.
        price: Of ``priced``.

    Returns:
        The rule, its parameter at zero.

    Raises:
        ConfigError: The rule needs all eigenvectors, and the spectrum has only leading ones; or it needs a cross.
    """
    if update == "auto":
        update = chosen_update(subspace, rotation)
    check_update(update, subspace)
    if update == "priced":
        return priced_rule(subspace, price, rotation)
    return LeadingCoordinates(subspace, rotation) if update == "leading" else _RULES[update](subspace)
