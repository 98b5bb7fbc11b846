"""What lies below the first edited matrix, run once and kept: a record of every real token, from which steps set out.

See :mod:`crispedit.replay`, which decides how far up a model allows it.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import ranks
from .errors import CrispEditError
from .forward import RowBatch, batch_size, collate, collate_packed, repeated, scattered
from .models import EditMatrix, decoder_blocks, intermediate_width
from .progress import Progress
from .room import room
from .rows import EditRow

RECORD_TOKENS = 4096
"""Run together while a record is made, at most."""


def collated(model: Any, rows: Sequence[EditRow], pair_cost: float | None = None) -> RowBatch:
    """Rows on the device of a model's embeddings, packed where it is said what a pair of tokens costs."""
    batch = collate(rows) if pair_cost is None else collate_packed(rows, pair_cost)
    return batch.to(model.get_input_embeddings().weight.device)


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


class Unfit(CrispEditError):
    """A model is not made as a kind of replay supposes."""


class _Recorded(Exception):
    """Ends a forward pass whose rest is not needed."""


class Record:
    """What is kept per real token, and how a step sets out from it.

    Args:
        model: The causal LM.
        matrix: The first one that is edited.
        rows: All rows.
        start: Whether its input is kept, with the rest of its block's output, or the input of its block.
        pair_cost: What packing weighs (:func:`crispedit.forward.pair_cost`); ``None`` where rows are padded.
        progress: Called after every batch.

    Raises:
        Unfit: The model is not made so that this can be kept.
        NoRoomError: There is no room for it.
    """

    def __init__(
        self,
        model: Any,
        matrix: EditMatrix,
        rows: Sequence[EditRow],
        start: Literal["matrix", "block"],
        pair_cost: float | None,
        progress: Progress,
    ) -> None:
        blocks = list(decoder_blocks(model)[1])
        self.block, self.below = blocks[matrix.layer], blocks[: matrix.layer]
        self.matrix, self.start = matrix, start
        if start == "block" and not self.below:
            raise Unfit("no block lies below the first edited one")
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
            batch = collated(model, [rows[index] for index in group], pair_cost)
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
                raise Unfit("the matrix is used more than once")
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
                    raise Unfit("a block gives more than hidden states")
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
            raise Unfit("the block's output is not that of its MLP and something more")
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
    raise Unfit("its first edited block was never run")


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
