"""The proof of an edit: what it did to the answers, to the weights, and to everything else.

An edit that did nothing, or went wrong, is an error with a diagnosis, and not a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capability import TextSums, drift_of_texts, logits_of, logits_with
from .errors import EditFailed, NumericsError
from .models import EditMatrix
from .progress import Progress
from .subspace import Subspace
from .texts import TokenBatch
from .training import STOP_LOSS
from .wild import Question

PROOF_EDITS = 64
"""Before and after are shown on at most so many edits, evenly spread over the edit set."""


@dataclass(frozen=True, kw_only=True)
class MatrixChange:
    """What happened to one matrix.

    Args:
        name: Parameter name.
        norm: ‖ΔW‖ in Frobenius norm.
        relative: ‖ΔW‖ / ‖W₀‖.
        outside: ‖P(ΔW) − ΔW‖ / ‖ΔW‖, the share outside the low-curvature subspace; ``None`` without one.
    """

    name: str
    norm: float
    relative: float
    outside: float | None


@dataclass(frozen=True, kw_only=True)
class Example:
    """One edit, and the model's whole answer before and after."""

    prompt: str
    target: str
    before: str
    after: str


def check_edited(delta: dict[str, Tensor], before: float, after: float, *, must_fall: bool = True) -> list[str]:
    """Refuses an edit that did nothing or went wrong, with a diagnosis.

    Args:
        delta: ΔW by parameter name.
        before: Mean edit loss (:func:`crispedit.training.mean_loss`) of the proof's edits with the original weights.
        after: The same with the edited weights.
        must_fall: Whether the loss is what the editor lowers.

    Returns:
        What a user should know.

    Raises:
        NumericsError: A number is not finite.
        EditFailed: Nothing changed, or the loss did not fall and must.
    """
    for name, change in delta.items():
        if not torch.isfinite(change).all():
            raise NumericsError(f"the edited {name} has numbers that are not finite; lower --lr")
    if all(float(change.norm()) == 0 for change in delta.values()):
        if before < STOP_LOSS:
            raise EditFailed(f"nothing changed: the model already says all of this (loss {before:.4f} before any step)")
        raise EditFailed("nothing changed: no direction is left to edit in; lower --energy or name more --layers")
    if after < before:
        return []
    found = f"the edit loss did not fall ({before:.3f} before, {after:.3f} after)"
    if must_fall:
        raise EditFailed(
            f"{found}; lower --lr if the edit wrecked the model, raise --lr or --epochs if it hardly moved"
        )
    return [found]


def drift_from(
    originals: Mapping[str, Tensor],
    model: Any,
    matrices: Sequence[EditMatrix],
    batches: Sequence[TokenBatch],
    progress: Progress,
) -> TextSums:
    """Drift of the model from itself with its original matrices, swapped in and out batch by batch."""
    base = logits_with(model, matrices, originals)
    return drift_of_texts(base, logits_of(model), batches, progress=progress)


def matrix_changes(
    delta: dict[str, Tensor], originals: dict[str, Tensor], subspaces: Mapping[str, Subspace]
) -> list[MatrixChange]:
    """Size of every matrix's change, and its share outside the subspace where there is one."""
    changes = []
    for name, waiting in delta.items():
        change = waiting.to(originals[name].device)
        outside = subspaces[name].to(change.device).share_outside(change) if name in subspaces else None
        norm = float(change.norm())
        changes.append(
            MatrixChange(name=name, norm=norm, relative=norm / float(originals[name].float().norm()), outside=outside)
        )
    return changes


def examples(asked: Sequence[Question], before: Sequence[str], after: Sequence[str], count: int = 4) -> list[Example]:
    """A few edits with their answers, those whose answer changed first."""
    rows = [
        Example(
            prompt=q.prompt if isinstance(q.prompt, str) else q.prompt[-1][1],
            target=q.expected or "",
            before=b,
            after=a,
        )
        for q, b, a in zip(asked, before, after, strict=True)
        if q.kind == "reliability"
    ]
    return sorted(rows, key=lambda row: row.before == row.after)[:count]
