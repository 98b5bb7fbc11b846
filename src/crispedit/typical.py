"""An edit of typical size, where none is at hand: so many rows and texts of the same lengths each.

Rows are questions with short answers (ZsRE has prompts of about a dozen words and answers of one to four), texts
are Wikipedia's cut at 512 tokens (CrispEdit, arXiv 2602.15823, section 5). No row has a token in common with another.
"""

from typing import Any

from .proof import PROOF_EDITS
from .rows import EditRow
from .texts import TokenBatch, row_batches

EDITS, ROW, TARGET = 1000, 24, 6
"""Edits, where no number is given; tokens of each, and how many of them are the target."""
TEXTS, TEXT, HELD_OUT = 1000, 512, 5
"""Texts, likewise; tokens of each; every so manieth is held out."""
ASKED = 3
"""Questions about an edit: its own, a rephrase of it, and one about something else."""


def typical_rows(count: int) -> list[EditRow]:
    """Rows of edits.

    Args:
        count: How many.

    Returns:
        The rows, whose token ids stand for nothing.
    """
    return [EditRow((number,) * ROW, ROW - TARGET) for number in range(count)]


def typical_prompts(count: int) -> list[list[int]]:
    """What a proof asks about so many edits.

    Args:
        count: How many edits there are.

    Returns:
        Token ids of every prompt.
    """
    return [[0] * (ROW - TARGET)] * (ASKED * min(count, PROOF_EDITS))


def typical_texts(model: Any, count: int) -> tuple[list[list[TokenBatch]], list[TokenBatch]]:
    """Batches of capability texts as a curvature passes over them.

    Args:
        model: A causal LM, on any device; ``meta`` will do.
        count: How many texts, those that are held out included.

    Returns:
        Those of either half, and those that are held out.
    """
    held_out = max(1, count // HELD_OUT)
    fit = max(1, count - held_out)
    halves = [half for half in (fit - fit // 2, fit // 2) if half]
    return [_batches(model, half) for half in halves], _batches(model, held_out)


def _batches(model: Any, count: int) -> list[TokenBatch]:
    return row_batches(model, [[0] * TEXT] * count)
