"""What an edit with a damage budget says of itself: budget, predicted and measured drift, on which texts."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .capability import TextSums
from .statistics import Measure, Stratum, percentile_interval, replicates


def texts_hash(texts: Sequence[str]) -> str:
    """A hash of texts in their order."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode(errors="surrogatepass")).hexdigest()


def certificate(spent: Mapping[str, Any], sums: TextSums, texts_sha256: str) -> dict[str, Any]:
    """Budget and drift, measured again of the model as it will be saved.

    Args:
        spent: What the editor says of it: ``said``, ``budget`` in nats per token, what the edits were estimated to
            have ``needed``, the share of ``unseen`` inputs, ``predicted`` drift and its ``ratio`` to the measured one,
            ``preference`` among edits, ``course``, ``taken_back``; see :mod:`crispedit.budget`.
        sums: Drift of the model text by text.
        texts_sha256: Of these texts.

    Returns:
        The same, with what :func:`measured` says.
    """
    return {**spent, **measured(spent["budget"], sums, texts_sha256)}


def measured(budget: float, sums: TextSums, texts_sha256: str) -> dict[str, Any]:
    """Drift against a budget.

    Args:
        budget: Nats per token.
        sums: Drift of the model text by text.
        texts_sha256: Of these texts.

    Returns:
        ``budget``; ``drift``; ``low`` and ``high``, the ends of its 95 % interval over the texts (percentile
        bootstrap); ``texts``, how many; ``texts_sha256``; and ``met``, whether the drift is at most the budget.
    """
    drift = sums.means().drift
    of_texts = Measure((Stratum.of(sums.drift.tolist(), sums.tokens.tolist()),))
    low, high = percentile_interval(replicates([of_texts])[:, 0])
    return {
        "budget": budget,
        "drift": drift,
        "low": max(0.0, low),
        "high": high,
        "texts": len(sums.tokens),
        "texts_sha256": texts_sha256,
        "met": drift <= budget,
    }
