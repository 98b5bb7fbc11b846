"""Logits where edit rows carry loss, and nowhere else.

Of a row only what leads to its loss is run: its last token predicts nothing, so it is not fed; tokens that rows of a
batch have in common from their beginning on are run once; the head is applied at the positions before target tokens;
and so is the MLP of the last block, which no other position reads any more. Nothing of this depends on how a model is
written: it is given position ids and a mask as it takes them anyway, its modules are found by structure, and hooks
hand them fewer positions. (CrispEdit, arXiv 2602.15823, appendix E: the loss of FT-M is that of target tokens alone.)
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError
from .models import decoder_blocks, mlp_of, text_config
from .pieces import HiddenStates, up_to_head
from .rows import EditRow
from .texts import PADDING, pad

MULTIPLE = 8
"""Of so many are the tokens of what is multiplied in a step: tiles of hardware are as wide; and on a CPU every shape of
a product takes a kernel of its own, which is made when it is first met and kept (docs/performance.md)."""


def rounded_up(count: int) -> int:
    """The next multiple of :data:`MULTIPLE`."""
    return -(-count // MULTIPLE) * MULTIPLE


@dataclass(frozen=True, kw_only=True)
class RowBatch:
    """Edit rows as a batch, each without its last token.

    Args:
        ids: Tokens, (sequences, length) int64.
        mask: (sequences, length), 1 for real tokens; or, of packed rows, (sequences, 1, length, length) bool, true
            where a token reads another.
        position_ids: (sequences, length), of packed rows.
        real: Where the real tokens are in the flattened batch, (tokens,) int64.
        sources: The row and the place in it that every real token comes from (one of them, if there are several).
        tokens_of: For every row the indices of its tokens in ``real``.
        positions: Where target tokens are predicted in the flattened batch, each position once, int64.
        labels: The target tokens of all rows, row by row, (targets,) int64.
        predicted_at: For every label its index in ``positions``, (targets,) int64.
    """

    ids: Tensor
    mask: Tensor
    position_ids: Tensor | None
    real: Tensor
    sources: list[tuple[int, int]]
    tokens_of: list[list[int]]
    positions: Tensor
    labels: Tensor
    predicted_at: Tensor

    def to(self, device: torch.device) -> "RowBatch":
        """The batch on another device."""
        tensors: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})

    def of(self, model: Any) -> dict[str, Any]:
        """What a model is called with."""
        given = {"input_ids": self.ids, "attention_mask": self.mask, "use_cache": False}
        if self.position_ids is not None:
            given["position_ids"] = self.position_ids
            if model.config._attn_implementation != "sdpa":  # others add the mask to scores
                lowest = torch.finfo(model.dtype).min
                given["attention_mask"] = torch.zeros_like(self.mask, dtype=model.dtype).masked_fill(~self.mask, lowest)
        return given


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """How much of edit rows a batch has.

    Args:
        tokens: Real ones, those that rows have in common once.
        sequences: Of the batch.
        length: Tokens of a sequence, with padding.
        positions: Where target tokens are predicted, each once.
        labels: The target tokens of all rows.
    """

    tokens: int
    sequences: int
    length: int
    positions: int
    labels: int

    @property
    def computed(self) -> int:
        """Tokens, padding included."""
        return self.sequences * self.length

    @property
    def pairs(self) -> int:
        """Pairs of tokens that a dense mask lets attention compute, those masked included."""
        return self.sequences * self.length**2


def collate(rows: Sequence[EditRow]) -> RowBatch:
    """Rows as a right-padded batch, one sequence each.

    Args:
        rows: At least one, each of two tokens or more.

    Returns:
        The batch, on the CPU.
    """
    tokens = pad([row.ids[:-1] for row in rows])
    width = tokens.ids.shape[1]
    slots = [list(range(index * width, index * width + len(row.ids) - 1)) for index, row in enumerate(rows)]
    return _batch(rows, slots, ids=tokens.ids, mask=tokens.mask, position_ids=None)


class _Pack:
    """Rows in one sequence: a tree of tokens, each of which reads those before it in its rows."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.depths: list[int] = []
        self.paths: list[list[int]] = []
        self._children: dict[tuple[int, int], int] = {}

    def add(self, ids: Sequence[int]) -> None:
        """Adds a row, sharing what it has in common with the others from the beginning on."""
        path, parent = [], -1
        for depth, token in enumerate(ids):
            slot = self._children.setdefault((parent, token), len(self.ids))
            if slot == len(self.ids):
                self.ids.append(token)
                self.depths.append(depth)
            path.append(slot)
            parent = slot
        self.paths.append(path)

    def reads(self, length: int) -> Tensor:
        """(length, length) bool: which token reads which; padding reads itself, for a softmax needs something."""
        reads = torch.eye(length, dtype=torch.bool)
        for path in self.paths:
            slots = torch.tensor(path)
            reads[slots[:, None], slots] |= torch.ones(len(path), len(path), dtype=torch.bool).tril()
        return reads


def collate_packed(rows: Sequence[EditRow], pair_cost: float) -> RowBatch:
    """Rows in as few tokens as they have in common, in as many sequences as cost the least.

    Args:
        rows: At least one, each of two tokens or more.
        pair_cost: What it costs a token to have one more token in its sequence, in parts of what a token costs
            otherwise (:func:`pair_cost`).

    Returns:
        The batch, on the CPU.
    """
    order, best = _packed(rows, pair_cost)
    length = _length(best)
    slots: list[list[int]] = []
    for number, pack in enumerate(best):
        slots += [[number * length + slot for slot in path] for path in pack.paths]
    slots = [path for _, path in sorted(zip(order, slots, strict=True))]
    return _batch(
        rows,
        slots,
        ids=torch.tensor([pack.ids + [PADDING] * (length - len(pack.ids)) for pack in best]),
        mask=torch.stack([pack.reads(length) for pack in best])[:, None],
        position_ids=torch.tensor([pack.depths + [0] * (length - len(pack.ids)) for pack in best]),
    )


def batch_size(rows: Sequence[EditRow], pair_cost: float | None) -> BatchSize:
    """How large a batch rows make, found without making it.

    Args:
        rows: At least one, each of two tokens or more.
        pair_cost: As :func:`collate_packed` takes it; ``None`` for rows that are not packed (:func:`collate`).

    Returns:
        The size.
    """
    labels = sum(row.num_targets for row in rows)
    if pair_cost is None:
        lengths = [len(row.ids) - 1 for row in rows]
        return BatchSize(tokens=sum(lengths), sequences=len(rows), length=max(lengths), positions=labels, labels=labels)
    order, packs = _packed(rows, pair_cost)
    prompts = iter([rows[index].prompt_length for index in order])
    return BatchSize(
        tokens=sum(len(pack.ids) for pack in packs),
        sequences=len(packs),
        length=_length(packs),
        positions=sum(len({slot for path in pack.paths for slot in path[next(prompts) - 1 :]}) for pack in packs),
        labels=labels,
    )


def _packed(rows: Sequence[EditRow], pair_cost: float) -> tuple[list[int], list[_Pack]]:
    """Rows in the order in which neighbours share the most, and in the packs that cost the least."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].ids)
    every = (_packs(rows, order, count) for count in (1, 2, 4, 8) if count <= len(rows))
    return order, min(every, key=lambda packs: _cost(packs, pair_cost))


def _packs(rows: Sequence[EditRow], order: Sequence[int], count: int) -> list[_Pack]:
    """Rows in so many packs of about as many tokens."""
    total, done = sum(len(row.ids) - 1 for row in rows), 0
    packs = [_Pack()]
    for index in order:
        if done * count >= total * len(packs):
            packs.append(_Pack())
        packs[-1].add(rows[index].ids[:-1])
        done += len(rows[index].ids) - 1
    return packs


def _length(packs: Sequence[_Pack]) -> int:
    """Tokens of every sequence, padding included."""
    return rounded_up(max(len(pack.ids) for pack in packs))


def _cost(packs: Sequence[_Pack], pair_cost: float) -> float:
    length = _length(packs)
    return len(packs) * length * (1 + pair_cost * length)


def _batch(rows: Sequence[EditRow], slots: Sequence[Sequence[int]], **fields: Any) -> RowBatch:
    """A batch of rows whose tokens lie in these places."""
    sources: dict[int, tuple[int, int]] = {}
    targets: list[int] = []
    labels: list[int] = []
    for index, (row, path) in enumerate(zip(rows, slots, strict=True)):
        for place, slot in enumerate(path):
            sources.setdefault(slot, (index, place))
        targets += path[row.prompt_length - 1 :]
        labels += row.ids[row.prompt_length :]
    positions = {slot: number for number, slot in enumerate(sorted(set(targets)))}
    numbers = {slot: number for number, slot in enumerate(sources)}
    return RowBatch(
        real=torch.tensor(list(sources)),
        sources=list(sources.values()),
        tokens_of=[[numbers[slot] for slot in path] for path in slots],
        positions=torch.tensor(list(positions)),
        labels=torch.tensor(labels),
        predicted_at=torch.tensor([positions[slot] for slot in targets]),
        **fields,
    )


def pair_cost(model: Any) -> float:
    """What a pair of tokens costs in a decoder block, in parts of what a token costs: the flops of attention scores.

    A block's linear maps take 2 flops per parameter and token, scores and their use 4 × width per pair.
    """
    block = decoder_blocks(model)[1][0]
    width = int(text_config(model).hidden_size)
    return 4 * width / (2 * sum(p.numel() for p in block.parameters() if p.ndim == 2))


def whole_logits(model: Any, batch: RowBatch) -> Tensor:
    """The same logits by the plain way: the whole model at every position, and then a choice of positions.

    Args:
        model: A causal LM.
        batch: Rows, on the device of the model's embeddings.

    Returns:
        (targets, vocabulary), in the model's dtype.
    """
    return _at_targets(model(**batch.of(model)).logits, batch)


def _at_targets(logits: Tensor, batch: RowBatch) -> Tensor:
    return logits.flatten(0, 1)[batch.positions.to(logits.device)][batch.predicted_at.to(logits.device)]


def target_logits(model: Any, batch: RowBatch, given: dict[str, Any] | None = None, *, multiple: int = 1) -> Tensor:
    """Logits at the positions of a batch that carry loss.

    Args:
        model: A causal LM.
        batch: Rows, on the device of the model's embeddings.
        given: What the model is called with; :meth:`RowBatch.of` when omitted.
        multiple: Of so many is the number of positions that the head and the MLP of the last block see: the last one
            again and again, which nothing reads.

    Returns:
        (targets, vocabulary), in the model's dtype.
    """
    given = batch.of(model) if given is None else given
    if model.get_output_embeddings() is None:
        return _at_targets(model(**given).logits, batch)
    with _at_positions(model, batch, multiple):
        logits: Tensor = model(**given).logits
    return logits[0].index_select(0, batch.predicted_at.to(logits.device))


def target_states(model: Any, batch: RowBatch, *, multiple: int = 1) -> HiddenStates:
    """What these logits are made of.

    Args:
        model: A causal LM.
        batch: Rows, on the device of the model's embeddings.
        multiple: As in :func:`target_logits`.

    Returns:
        (targets, width), on the device of the head.
    """
    given = batch.of(model)
    if model.get_output_embeddings() is None:
        return HiddenStates.of_logits(_at_targets(model(**given).logits, batch))

    def run() -> Tensor:
        with _at_positions(model, batch, multiple):
            return model(**given).logits  # type: ignore[no-any-return]

    found = up_to_head(model, run)
    states = found.states[0]
    return replace(found, states=states.index_select(0, batch.predicted_at.to(states.device)))


@contextmanager
def _at_positions(model: Any, batch: RowBatch, multiple: int) -> Iterator[None]:
    """Within, the head and the MLP of the last block see the positions where targets are predicted."""
    with ExitStack() as hooks:
        hooks.enter_context(_only_at(model.get_output_embeddings(), batch.positions, multiple, scatter=False))
        if (mlp := _last_mlp(model)) is not None:
            hooks.enter_context(_only_at(mlp, batch.positions, multiple, scatter=True))
        yield


@contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """Within, a model's head is given contiguous hidden states.

    Of the last positions of a batch, a slice, torch makes a product per row, each with a copy of the head: on a CPU
    that is ten times as slow in float32 and seven hundred times in bfloat16 (64 rows, 30,000 words; torch 2.13).
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def given(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden: Tensor = arguments[0]  # of one position contiguous() would leave the strides of the slice
        return (hidden.flatten().view(hidden.shape), *arguments[1:])

    handle = head.register_forward_pre_hook(given)
    try:
        yield
    finally:
        handle.remove()


def _last_mlp(model: Any) -> nn.Module | None:
    """The MLP of the last block, if it can be told."""
    try:
        return mlp_of(model, decoder_blocks(model)[1][-1])
    except ModelError:
        return None


@contextmanager
def _only_at(module: nn.Module, positions: Tensor, multiple: int, *, scatter: bool) -> Iterator[None]:
    """Within, a module that works position by position sees only some positions of (rows, length, width).

    Its output is (1, positions, width'), with up to ``multiple`` - 1 more at the end; or, scattered, as wide as its
    input was, and zero elsewhere.
    """
    shape: list[int] = []
    seen = repeated(positions, multiple)

    def gather(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden: Tensor = arguments[0]
        shape[:] = hidden.shape[:2]
        return (hidden.flatten(0, 1).index_select(0, seen.to(hidden.device))[None], *arguments[1:])

    def put_back(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return scattered(output[0, : len(positions)], positions, shape[0], shape[1])

    # before the hooks that others have hung there: they see what the module is given
    handles = [module.register_forward_pre_hook(gather, prepend=True)]
    if scatter:
        handles.append(module.register_forward_hook(put_back))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def repeated(indices: Tensor, multiple: int = MULTIPLE) -> Tensor:
    """Indices, (count,), and the last one again until there are a multiple of so many."""
    return torch.cat([indices, indices[-1:].expand(-len(indices) % multiple)])


def scattered(values: Tensor, positions: Tensor, rows: int, length: int) -> Tensor:
    """Values at flattened positions as (rows, length, width), zero elsewhere.

    Args:
        values: (positions, width).
        positions: (positions,), indices into rows × length.
        rows: Rows of the result.
        length: Its positions per row.

    Returns:
        The result, through which gradients flow.
    """
    empty = values.new_zeros(rows * length, values.shape[-1])
    return empty.index_copy(0, positions.to(values.device), values).view(rows, length, -1)
