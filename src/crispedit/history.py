"""What earlier rounds weigh against the capabilities in the curvature that the next round keeps off.

CrispEdit's Algorithm 2 (arXiv 2602.15823) adds factors by token count. A corpus of a million tokens then drowns a
hundred edits of a thousand. Measured in docs/decisions.md.
"""

import math
from dataclasses import replace
from typing import Literal

from .curvature import Curvature
from .errors import ConfigError
from .merging import merge
from .moments import trace

HistoryWeight = float | Literal["equal-trace"]
"""What a token of an edit weighs, one of the capability texts being 1; or so much that all edits together have as much
curvature as the capabilities, however long the texts and however many the rounds."""
HISTORY_WEIGHT: HistoryWeight = "equal-trace"
"""The default."""


def parse_history_weight(text: str) -> HistoryWeight:
    """Reads a weight from the command line.

    Raises:
        ConfigError: It is neither ``equal-trace`` nor a number from 0 on.
    """
    if text == "equal-trace":
        return "equal-trace"
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < math.inf:
        raise ConfigError(f"--history-weight is '{text}'; it must be equal-trace or a number from 0 on")
    return weight


def with_history(
    capabilities: Curvature, edits: Curvature | None, weight: HistoryWeight, *, start: Curvature | None = None
) -> Curvature:
    """The curvature of the capabilities and of all earlier rounds.

    Args:
        capabilities: Of the capability texts.
        edits: Of the rows of all earlier rounds; ``None`` before the first.
        weight: See :data:`HistoryWeight`; 0 leaves the rounds out.
        start: See :func:`crispedit.merging.merge`.

    Returns:
        The sum, for the model that ``edits`` is for, with the held-out texts of ``capabilities``.

    Raises:
        ConfigError: The weight is negative, or the two do not go together.
    """
    if edits is None:
        return capabilities
    capabilities = replace(capabilities, model_fingerprint=edits.model_fingerprint)
    if weight == 0:
        return capabilities
    weights = [float(capabilities.num_tokens), 0.0]
    if weight == "equal-trace":  # tr A and tr G have the ratio's root once each
        weights[1] = weights[0] * math.sqrt(_total(capabilities) / _total(edits))
    else:
        weights[1] = weight * edits.num_tokens
    return merge([capabilities, edits], weights, start=start)


def _total(curvature: Curvature) -> float:
    """Σ tr(A) tr(G) over the matrices."""
    return sum(trace(factors.A) * trace(factors.G) for factors in curvature.factors.values())
