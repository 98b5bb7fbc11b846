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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import distributed, ranks
from .errors import CrispEditError
from .forward import (
    MULTIPLE,
    RowBatch,
    batch_size,
    collate,
    collate_packed,
    pair_cost,
    repeated,
    scattered,
    target_logits,
    target_states,
    whole_logits,
)
from .models import EditMatrix, decoder_blocks, intermediate_width, text_config
from .pieces import HiddenStates
from .progress import Progress, log, no_progress
from .room import NoRoomError, room
from .rows import EditRow

Start = Literal["matrix", "block", "targets", "whole"]
"""Where a step sets out: at the input of the first edited matrix, of its block, or at the embedding, with logits at
target positions or everywhere."""
STARTS: tuple[Start, ...] = ("matrix", "block", "targets", "whole")
CHECK_ROWS, CHECK_TOKENS = 8, 1024
CHECK_MOVE = 0.05
"""Weights are moved by so much of their norm before a replay is compared with the whole model."""
RECORD_TOKENS = 4096


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
    _record: "_Record | None" = field(default=None, repr=False)

    @cached_property
    def pair_cost(self) -> float | None:
        """What packing weighs (:func:`crispedit.forward.pair_cost`); ``None`` where rows are padded."""
        return pair_cost(self.model) if self.packed else None

    def record(self, first: EditMatrix, progress: Progress = no_progress) -> None:
        """Runs what lies below ``start`` over all rows and keeps it; ``first`` is the first edited matrix."""
        self._record = _Record(self.model, first, self.rows, self.start, self.pair_cost, progress)
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
        return _collated(self.model, [self.rows[index] for index in chosen], self.pair_cost)

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


def _collated(model: Any, rows: Sequence[EditRow], pair_cost: float | None = None) -> RowBatch:
    """Rows on the device of a model's embeddings, packed where it is said what a pair of tokens costs."""
    batch = collate(rows) if pair_cost is None else collate_packed(rows, pair_cost)
    return batch.to(model.get_input_embeddings().weight.device)


def row_logits(
    model: Any,
    matrices: Sequence[EditMatrix],
    rows: Sequence[EditRow],
    *,
    start: Start = "matrix",
    pack: bool = True,
    progress: Progress = no_progress,
) -> RowLogits:
    """Records what is below the first edited matrix for all rows, and checks the replay against the whole model.

    Args:
        model: A causal LM in evaluation mode.
        matrices: What will be edited, in ascending order of layers; nothing else may change while this is used.
        rows: The edits' rows.
        start: The most that is replayed.
        pack: Whether rows may share the tokens that they have in common.
        progress: Called after every batch that is recorded.

    Returns:
        The logits of rows, from the highest start that passes the check.
    """
    if start == "whole":
        return RowLogits(model=model, rows=rows, start=start)
    truth = _truth(model, matrices, rows)
    packed = (
        pack
        and within_windows(model, rows)
        and _fits(RowLogits(model=model, rows=rows, start="targets", packed=True), matrices, truth, "packing rows")
    )
    for attempt in STARTS[STARTS.index(start) : -1]:
        found = RowLogits(model=model, rows=rows, start=attempt, packed=packed)
        if _fits(found, matrices, truth, f"replay from the {attempt}", progress):
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


def _fits(
    found: RowLogits,
    matrices: Sequence[EditMatrix],
    truth: dict[int, Tensor],
    what: str,
    progress: Progress = no_progress,
) -> bool:
    """Records what ``found`` takes, and says whether its logits are those of the whole model; to all processes alike.

    Batches of some would differ from those of others, were each to decide by what it has seen itself.

    Raises:
        OutOfMemoryError: Of the device.
    """
    error = math.inf
    try:
        if found.start in ("matrix", "block"):
            found.record(matrices[0], progress)
        error = _check(found, matrices, truth)
    except torch.OutOfMemoryError:
        raise
    except (_Unfit, NoRoomError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as refused:
        log.info("%s does not fit this model: %s", what, " ".join(str(refused).split())[:200])
    with ranks.sharing():
        found.error = max(distributed.gather(error))
    fits = found.error <= tolerance(found.model.dtype, len(decoder_blocks(found.model)[1]))
    if not fits and math.isfinite(found.error):
        log.info("%s is off by %.1e of the logits; it is not used", what, found.error)
    return fits


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
        logits = whole_logits(model, _collated(model, [rows[index] for index in some]))
    return dict(zip(some, torch.split(logits, [rows[index].num_targets for index in some]), strict=True))


@torch.no_grad()
def _check(found: RowLogits, matrices: Sequence[EditMatrix], truth: dict[int, Tensor]) -> float:
    """The largest relative error of the same rows' logits, the mean over the vocabulary taken out."""
    with _moved(matrices):
        logits, _ = found(list(truth))
    expected = sum(len(rows) for rows in truth.values())
    if len(logits) != expected:
        raise _Unfit(f"it gives logits of {len(logits)} targets, not of {expected}")
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


def recorded_together(model: Any, rows: Sequence[EditRow], packed: bool) -> list[list[int]]:
    """The batches in which rows are recorded: neighbours share the most, or pad the least.

    Args:
        model: The causal LM, on any device.
        rows: The rows.
        packed: Whether rows of a batch share the tokens that they have in common.

    Returns:
        Indices of rows, each once.
    """
    at_most = min(RECORD_TOKENS, 2**23 // intermediate_width(model))
    order = sorted(range(len(rows)), key=lambda index: (0 if packed else len(rows[index].ids), rows[index].ids))
    groups: list[list[int]] = []
    tokens = 0
    for index in order:
        if not groups or tokens > at_most:
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += len(rows[index].ids)
    return groups


class _Unfit(CrispEditError):
    """A model is not made as a kind of replay supposes."""


class _Recorded(Exception):
    """Ends a forward pass whose rest is not needed."""


class _Record:
    """What is kept per real token, and how a step sets out from it."""

    def __init__(
        self,
        model: Any,
        matrix: EditMatrix,
        rows: Sequence[EditRow],
        start: Start,
        pair_cost: float | None,
        progress: Progress,
    ) -> None:
        blocks = list(decoder_blocks(model)[1])
        self.block, self.below = blocks[matrix.layer], blocks[: matrix.layer]
        self.matrix, self.start = matrix, start
        if start == "block" and not self.below:
            raise _Unfit("no block lies below the first edited one")
        self.after: list[nn.Module] = []
        self.others: tuple[Any, ...] | None = None  # what a block gives beside its hidden states, if it gives a tuple
        self.inputs = self.rests = torch.empty(0)
        self.tokens: dict[int, list[int]] = {}  # of every row the records of its tokens
        self.num_tokens, self.num_bytes, self.kept = 0, 0, ""
        self._fill(model, rows, pair_cost, progress)

    @torch.no_grad()
    def _fill(self, model: Any, rows: Sequence[EditRow], pair_cost: float | None, progress: Progress) -> None:
        """Runs the model up to the first edited block over all rows."""
        groups = recorded_together(model, rows, pair_cost is not None)
        self.num_tokens = sum(batch_size([rows[index] for index in group], pair_cost).tokens for group in groups)
        first = done = 0
        for group in groups:
            batch = _collated(model, [rows[index] for index in group], pair_cost)
            inputs, rests = (self._watch_matrix if self.start == "matrix" else self._watch_block)(model, batch)
            if first == 0:
                self._allocate(inputs, rests)
            self.inputs[first : first + len(inputs)] = inputs
            if rests is not None:
                self.rests[first : first + len(rests)] = rests
            for number, index in enumerate(group):
                self.tokens[index] = [first + token for token in batch.tokens_of[number]]
            first += len(inputs)
            done += len(group)
            progress("recording", done, len(rows))

    def _watch_block(self, model: Any, batch: RowBatch) -> tuple[Tensor, None]:
        """The block's input at the real tokens of a batch."""
        seen: list[Tensor] = []

        def stop(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            seen.append(arguments[0] if arguments else keywords["hidden_states"])
            raise _Recorded

        handle = self.block.register_forward_pre_hook(stop, with_kwargs=True)
        _run_until_recorded(model, batch, [handle])
        return _at_real(seen[0], batch), None

    def _watch_matrix(self, model: Any, batch: RowBatch) -> tuple[Tensor, Tensor]:
        """The matrix's input, and the rest of its block's output, at the real tokens of a batch."""
        inputs: list[Tensor] = []
        found: list[Tensor] = []
        last: list[Tensor] = []
        after: list[nn.Module] = []

        def given(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if inputs:
                raise _Unfit("the matrix is used more than once")
            inputs.append(arguments[0])

        def multiplied(_: nn.Module, __: Any, output: Tensor) -> None:
            last.append(output)

        def followed(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if last and arguments and arguments[0] is last[0] and isinstance(output, Tensor):
                after.append(module)
                last[0] = output

        def ended(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, tuple):
                if any(isinstance(other, Tensor) for other in output[1:]):
                    raise _Unfit("a block gives more than hidden states")
                self.others = output[1:]
                output = output[0]
            found.append(output)
            raise _Recorded

        module = self.matrix.module
        leaves = [m for m in self.block.modules() if m is not module and not any(m.children())]
        # before and after all that others have hung on the module: it is called through them again
        handles = [module.register_forward_pre_hook(given, prepend=True), module.register_forward_hook(multiplied)]
        handles += [leaf.register_forward_hook(followed) for leaf in leaves]
        handles.append(self.block.register_forward_hook(ended))
        _run_until_recorded(model, batch, handles)
        if not inputs or found[0].shape != last[0].shape:
            raise _Unfit("the block's output is not that of its MLP and something more")
        self.after = after
        rest = found[0].float() - last[0].float()
        return _at_real(inputs[0], batch), _at_real(rest, batch).to(found[0].dtype)

    def _allocate(self, inputs: Tensor, rests: Tensor | None) -> None:
        """Room for all tokens: in the device's memory, the CPU's, or a file mapped into it."""
        kinds = [(t.shape[-1], t.dtype) for t in (inputs, rests) if t is not None]
        self.num_bytes = self.num_tokens * sum(width * dtype.itemsize for width, dtype in kinds)
        found, self.kept = room(self.num_tokens, kinds, inputs.device)
        self.inputs, self.rests = found[0], found[-1]

    @contextmanager
    def replayed(self, batch: RowBatch, chosen: Sequence[int]) -> Iterator[None]:
        """Within, the model sets out from what is recorded of some rows, whatever it is called with."""
        tokens = torch.tensor([self.tokens[chosen[row]][place] for row, place in batch.sources])
        tokens = tokens.to(self.inputs.device)
        sequences, length = batch.ids.shape

        def padded(values: Tensor) -> Tensor:
            return scattered(values, batch.real, sequences, length)

        device = self.matrix.parameter.device
        with ExitStack() as patches:
            for block in self.below:
                patches.enter_context(passed_by(block, self._nothing))
            if self.start == "matrix":

                def from_matrix(*_: Any, **__: Any) -> Any:
                    hidden = self.matrix.module(self.inputs[repeated(tokens)].to(device))
                    for module in self.after:
                        hidden = module(hidden)
                    return self._as_output(padded(self.rests[tokens].to(device) + hidden[: len(tokens)]))

                patches.enter_context(calling(self.block, from_matrix))
            else:
                patches.enter_context(_input(self.block, lambda: padded(self.inputs[tokens].to(device))))
            yield

    def _nothing(self, *arguments: Any, **keywords: Any) -> Any:
        """What a block below does: it hands on what it was given."""
        return self._as_output(arguments[0] if arguments else keywords["hidden_states"])

    def _as_output(self, hidden: Tensor) -> Any:
        if ranks.in_step():  # FSDP hangs a hook on what a block gives; an in-place operation on a view would lose it
            hidden = hidden.clone()
        return hidden if self.others is None else (hidden, *self.others)


def _at_real(hidden: Tensor, batch: RowBatch) -> Tensor:
    return hidden.flatten(0, 1).index_select(0, batch.real.to(hidden.device))


def _run_until_recorded(model: Any, batch: RowBatch, handles: list[Any]) -> None:
    try:
        model(**batch.of(model))
    except _Recorded:
        return
    finally:
        for handle in handles:
            handle.remove()
    raise _Unfit("its first edited block was never run")


@contextmanager
def calling(module: nn.Module, function: Any) -> Iterator[None]:
    """Within, a module's forward is another function (accelerate may have put one of its own there)."""
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def passed_by(block: nn.Module, function: Any) -> Iterator[None]:
    """Within, a block's forward is a function that needs none of its weights.

    Of a model that is divided among processes no hook of the block is called either: FSDP's would put it together
    first, which moves all of it to every process.
    """
    kept = block._forward_pre_hooks, block._forward_hooks
    if ranks.in_step():
        block._forward_pre_hooks, block._forward_hooks = OrderedDict(), OrderedDict()
    try:
        with calling(block, function):
            yield
    finally:
        block._forward_pre_hooks, block._forward_hooks = kept


@contextmanager
def _input(module: nn.Module, hidden: Any) -> Iterator[None]:
    """Within, a module is given other hidden states."""

    def replace(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if arguments:
            return (hidden(), *arguments[1:]), keywords
        return (), {**keywords, "hidden_states": hidden()}

    handle = module.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
