"""The curvature of several corpora together: their factors added, and what they came from."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .curvature import Curvature
from .errors import ConfigError
from .factors import merge_factors


def merge(
    curvatures: Sequence[Curvature], weights: Sequence[float] | None = None, *, start: Curvature | None = None
) -> Curvature:
    """One curvature over several corpora: capabilities and earlier edits, English and code and Chinese.

    Factors add by token count (CrispEdit, Algorithm 2).

    Args:
        curvatures: At least one, of the same model, tokenizer and matrices.
        weights: In place of the token counts, not negative: 1 and 1 give two corpora the same say, however long.
        start: Where its leading spectra are known, the search for those of the sum sets out from them; the one with
            most weight when omitted.

    Returns:
        The sum. Its held-out texts are those of all: of texts that were in several corpora, divided otherwise, some
        are among those that another was fitted on. It has no overlap of halves.

    Raises:
        ConfigError: There is none, there are other numbers of weights, or two do not go together.
    """
    if not curvatures:
        raise ConfigError("there is no curvature to merge; give at least one")
    if weights is not None and (len(weights) != len(curvatures) or min(weights) < 0 or not 0 < sum(weights) < math.inf):
        raise ConfigError(
            f"weights is {list(weights)}; it must be {len(curvatures)} numbers, not negative and not all zero"
        )
    first = curvatures[0]
    for name in ("model_fingerprint", "tokenizer", "dtype", "layers", "fisher"):
        if wrong := [c for c in curvatures if getattr(c, name) != getattr(first, name)]:
            ours, theirs = getattr(first, name), getattr(wrong[0], name)
            raise ConfigError(f"curvatures of different {name} do not add: {_short(ours)} and {_short(theirs)}")
    factors = {n: merge_factors([c.factors[n] for c in curvatures], weights) for n in first.factors}
    raw = [c.num_tokens for c in curvatures] if weights is None else weights
    known = start or curvatures[max(zip(raw, range(len(raw)), strict=True))[1]]
    parts = _parts(curvatures, raw)
    return first.with_factors(
        factors,
        {"source": "merged", "sha256": _digest(parts), "seed": None, "samples": None, "parts": parts},
        held_out=tuple(dict.fromkeys(text for c in curvatures for text in c.held_out)),
        starts={**known.spectra.starts, **known.spectra.known()},
    )


def _parts(curvatures: Sequence[Curvature], weights: Sequence[float]) -> list[dict[str, Any]]:
    """The corpora of a sum with their weights: those of sums among its terms, and all rounds of edits as one.

    A session adds to its curvature with every round: a list of lists, or of rounds, would grow with it.
    """
    flat: list[dict[str, Any]] = []
    for weight, curvature in zip(weights, curvatures, strict=True):
        own = curvature.texts.get("parts", [{"weight": weight, **curvature.texts}])
        total = sum(part["weight"] for part in own)
        flat += own if total == weight else [{**part, "weight": weight * part["weight"] / total} for part in own]
    parts: list[dict[str, Any]] = []
    for part in flat:
        before = next((n for n, one in enumerate(parts) if one["source"] == part["source"] == "edits"), None)
        if before is None:
            parts.append(part)
        else:
            parts[before] = _rounds_as_one(parts[before], part)
    return parts


def _rounds_as_one(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Two rounds of edits, or what was made of several, as one entry with a hash over their hashes."""
    both = earlier, later
    return {
        "weight": earlier["weight"] + later["weight"],
        "source": "edits",
        "sha256": _digest(both),
        "seed": None,
        "samples": earlier["samples"] + later["samples"],
        "rounds": sum(part.get("rounds", 1) for part in both),
    }


def _digest(parts: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([[part["weight"], part["sha256"]] for part in parts]).encode()).hexdigest()


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
