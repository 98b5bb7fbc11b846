"""Replay: what lies below the first edited matrix is run once per edit row, and never again.

Nothing there changes while a model is edited, so its results are the same in every epoch. Recorded are, for every
real token, the input a of the first edited matrix W and the rest r of its block's output, h = r + n(W a), where n is
what follows the MLP (a norm in some families, nothing in most). A step computes h from the record, and goes on
through the model's own code: masks, rotary tables, attention of every kind, norms and scaled logits are the model's,
and only the blocks below are told to do nothing. (design: CrispEdit, arXiv 2602.15823, has frozen blocks recomputed.)

What is replayed is compared with the whole model on real rows, with weights that were moved; where they do not agree,
less is replayed: from the input of the first edited block (``block``), or nothing (``targets``, ``whole``).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from . import distributed, ranks
from .forward import (
    MULTIPLE,
    RowBatch,
    pair_cost,
    target_logits,
    target_states,
    whole_logits,
)
from .models import EditMatrix, decoder_blocks, text_config
from .pieces import HiddenStates
from .progress import Progress, log, no_progress
from .recording import Record, Unfit, collated
from .room import NoRoomError
from .rows import EditRow

Start = Literal["matrix", "block", "targets", "whole"]
"""Where a step sets out: at the input of the first edited matrix, of its block, or at the embedding, with logits at
target positions or everywhere."""
STARTS: tuple[Start, ...] = ("matrix", "block", "targets", "whole")
CHECK_ROWS, CHECK_TOKENS = 8, 1024
CHECK_MOVE = 0.05
"""Weights are moved by so much of their norm before a replay is compared with the whole model."""


def tolerance(dtype: torch.dtype, blocks: int) -> float:
    """How far logits may be off, relative in Frobenius norm, the mean over the vocabulary taken out.

    1e-5 in float32. In lower precision 2 ε √blocks: a block rounds what it adds to the residual stream about four
    times, each time by ε / √12 at root mean square; over n blocks that adds up like a random walk to 0.6 ε √n, and
    between two such computations to 0.8 ε √n. (Structural errors, a wrong mask say, are of the order of 1.)

    Args:
        dtype: That the model computes in, ε its machine epsilon.
        blocks: How many blocks may round otherwise.

    Returns:
        The bound.
    """
    return 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * blocks**0.5


@dataclass(kw_only=True)
class RowLogits:
    """Logits at the targets of edit rows, from as far up as the model allows.

    Args:
        model: The causal LM.
        rows: The rows.
        start: Where a step sets out.
        packed: Whether rows of a batch share the tokens that they have in common.
        error: How far the check found it off the whole model (:func:`tolerance`); ``None`` where it is the whole model.
        num_bytes: Of the record.
        kept: Where the record lies: ``memory``, ``cpu memory`` beside another device, ``file``, or ``""``.
    """

    model: Any
    rows: Sequence[EditRow]
    start: Start
    packed: bool = False
    error: float | None = None
    num_bytes: int = 0
    kept: str = ""
    _record: Record | None = field(default=None, repr=False)

    @cached_property
    def pair_cost(self) -> float | None:
        """What packing weighs (:func:`crispedit.forward.pair_cost`); ``None`` where rows are padded."""
        return pair_cost(self.model) if self.packed else None

    def record(self, first: EditMatrix, progress: Progress = no_progress) -> None:
        """Runs what lies below ``start`` over all rows and keeps it; ``first`` is the first edited matrix."""
        assert self.start in ("matrix", "block")
        self._record = Record(self.model, first, self.rows, self.start, self.pair_cost, progress)
        self.num_bytes, self.kept = self._record.num_bytes, self._record.kept

    def report(self) -> dict[str, Any]:
        """What a user may want to know of it, JSON-ready."""
        names = ("start", "packed", "error", "num_bytes", "kept")
        return {name: getattr(self, name) for name in names}

    def __call__(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits of some rows.

        Args:
            chosen: Their indices.

        Returns:
            Logits (targets, vocabulary) and labels (targets,), on one device.
        """
        batch = self.batch(chosen)
        with self._replayed(batch, chosen):
            logits = self.of_model(batch)
        return logits, batch.labels.to(logits.device)

    def states(self, chosen: Sequence[int]) -> tuple[HiddenStates, Tensor]:
        """What the same logits are made of, of which there may be many.

        Args:
            chosen: The rows' indices.

        Returns:
            (targets, width), and labels (targets,), on one device.
        """
        batch = self.batch(chosen)
        with self._replayed(batch, chosen):
            found = self.states_of_model(batch)
        return found, batch.labels.to(found.states.device)

    def _replayed(self, batch: RowBatch, chosen: Sequence[int]) -> AbstractContextManager[None]:
        """Within, the model sets out from the record, if there is one."""
        return nullcontext() if self._record is None else self._record.replayed(batch, chosen)

    def batch(self, chosen: Sequence[int]) -> RowBatch:
        """Some rows as they are run together, on the device of the model's embeddings."""
        return collated(self.model, [self.rows[index] for index in chosen], self.pair_cost)

    def of_model(self, batch: RowBatch) -> Tensor:
        """Logits (targets, vocabulary) of a batch, from the embedding on."""
        if self.start == "whole":
            return whole_logits(self.model, batch)
        return target_logits(self.model, batch, multiple=MULTIPLE)

    def states_of_model(self, batch: RowBatch) -> HiddenStates:
        """What these are made of, (targets, width)."""
        if self.start == "whole":
            return HiddenStates.of_logits(whole_logits(self.model, batch))
        return target_states(self.model, batch, multiple=MULTIPLE)

    def by_row(
        self, chosen: Sequence[int], batch_tokens: int, of: Callable[[Tensor, Tensor], Tensor]
    ) -> Iterator[tuple[EditRow, Tensor]]:
        """What a function makes of the logits of rows, which are run in batches of rows that share the most.

        Args:
            chosen: Indices of the rows.
            batch_tokens: Most tokens of a batch (one row longer than that stands alone).
            of: From logits (targets, vocabulary) and labels (targets,) to a value or several per target.

        Yields:
            Every row with the values of its targets, on the CPU.
        """
        batches: list[list[int]] = []
        order = sorted(chosen, key=lambda index: self.rows[index].ids)
        while order:
            ends = itertools.accumulate(len(self.rows[index].ids) for index in order)
            count = max(1, sum(end <= batch_tokens for end in ends))
            batches.append(order[:count])
            order = order[count:]
        # whole batches are shared among processes: what is computed does not depend on how many there are
        for batch, found in distributed.spread(batches, lambda batch: of(*self(batch))):
            rows = [self.rows[index] for index in batch]
            yield from zip(rows, torch.split(found.cpu(), [row.num_targets for row in rows]), strict=True)


def row_logits(
    model: Any,
    matrices: Sequence[EditMatrix],
    rows: Sequence[EditRow],
    *,
    start: Start = "matrix",
    pack: bool = True,
    together: bool = False,
    progress: Progress = no_progress,
) -> RowLogits:
    """Records what is below the first edited matrix for all rows, and checks the replay against the whole model.

    Args:
        model: A causal LM in evaluation mode.
        matrices: What will be edited, in ascending order of layers; nothing else may change while this is used.
        rows: The edits' rows.
        start: The most that is replayed.
        pack: Whether rows may share the tokens that they have in common.
        together: Whether all processes call this of the same rows, and are to decide alike: batches of some would
            differ from those of others, were each to decide by what it has seen itself.
        progress: Called after every batch that is recorded.

    Returns:
        The logits of rows, from the highest start that passes the check.
    """
    if start == "whole":
        return RowLogits(model=model, rows=rows, start=start)
    truth, bound = _truth(model, matrices, rows), tolerance(model.dtype, len(decoder_blocks(model)[1]))

    def fits(found: RowLogits, what: str) -> bool:
        error = _error(found, matrices, truth, what, progress)
        if together:
            with ranks.sharing():
                error = max(distributed.gather(error))
        found.error = error
        if bound < error < math.inf:
            log.info("%s is off by %.1e of the logits; it is not used", what, error)
        return error <= bound

    packed = (
        pack
        and within_windows(model, rows)
        and fits(RowLogits(model=model, rows=rows, start="targets", packed=True), "packing rows")
    )
    for attempt in STARTS[STARTS.index(start) : -1]:
        found = RowLogits(model=model, rows=rows, start=attempt, packed=packed)
        if fits(found, f"replay from the {attempt}"):
            return found
    return RowLogits(model=model, rows=rows, start="whole")


def within_windows(model: Any, rows: Sequence[EditRow]) -> bool:
    """Whether no row is longer than what a layer attends to: the mask of packed rows knows of no sliding windows.

    Args:
        model: The causal LM, on any device.
        rows: At least one.

    Returns:
        Whether rows may be packed, as far as that goes.
    """
    config = text_config(model)
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return max(len(row.ids) for row in rows) <= min((window for window in windows if window), default=2**31)


def _error(
    found: RowLogits,
    matrices: Sequence[EditMatrix],
    truth: dict[int, Tensor],
    what: str,
    progress: Progress,
) -> float:
    """Records what ``found`` takes, and says how far its logits are off the whole model's; infinite where it fails.

    Raises:
        OutOfMemoryError: Of the device.
    """
    try:
        if found.start in ("matrix", "block"):
            found.record(matrices[0], progress)
        return _check(found, matrices, truth)
    except torch.OutOfMemoryError:
        raise
    except (Unfit, NoRoomError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        log.info("%s does not fit this model: %s", what, " ".join(str(error).split())[:200])
        return math.inf


@contextmanager
def _moved(matrices: Sequence[EditMatrix]) -> Iterator[None]:
    """Within, weights are off by :data:`CHECK_MOVE`, always in the same direction."""
    originals = [matrix.weight.clone() for matrix in matrices]
    generator = torch.Generator().manual_seed(0)
    try:
        for matrix, original in zip(matrices, originals, strict=True):
            noise = torch.randn(matrix.shape, generator=generator).to(original)
            matrix.weight.add_(noise * (CHECK_MOVE * original.norm() / noise.norm()))
        yield
    finally:
        for matrix, original in zip(matrices, originals, strict=True):
            matrix.weight.copy_(original)


def checked_rows(lengths: Sequence[int]) -> int:
    """How many rows of such lengths a replay is held against the whole model on: of long ones fewer, two at least."""
    return min(len(lengths), CHECK_ROWS, max(2, CHECK_TOKENS // max(lengths)))


@torch.no_grad()
def _truth(model: Any, matrices: Sequence[EditMatrix], rows: Sequence[EditRow]) -> dict[int, Tensor]:
    """The whole model's logits of a few rows, from the shortest to the longest, with weights that were moved."""
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    count = checked_rows([len(row.ids) for row in rows])
    some = [by_length[number * (len(rows) - 1) // max(count - 1, 1)] for number in range(count)]
    with _moved(matrices):
        logits = whole_logits(model, collated(model, [rows[index] for index in some]))
    return dict(zip(some, torch.split(logits, [rows[index].num_targets for index in some]), strict=True))


@torch.no_grad()
def _check(found: RowLogits, matrices: Sequence[EditMatrix], truth: dict[int, Tensor]) -> float:
    """The largest relative error of the same rows' logits, the mean over the vocabulary taken out."""
    with _moved(matrices):
        logits, _ = found(list(truth))
    expected = sum(len(rows) for rows in truth.values())
    if len(logits) != expected:
        raise Unfit(f"it gives logits of {len(logits)} targets, not of {expected}")
    worst = 0.0
    of_rows = torch.split(logits, [len(row) for row in truth.values()])
    for replayed, whole in zip(of_rows, truth.values(), strict=True):
        off, size = (_centred(logits).norm() for logits in (replayed.float() - whole.float(), whole.float()))
        error = float(off / size.clamp_min(1e-30))
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _centred(logits: Tensor) -> Tensor:
    """Without what a softmax does not see."""
    return logits - logits.mean(-1, keepdim=True)
