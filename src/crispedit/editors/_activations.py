"""What goes through a model up to a block: the block's output, and the inputs of matrices on the way."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models import EditMatrix, decoder_blocks
from ..texts import pad, token_groups

BATCH_TOKENS = 4096
"""Most tokens that are run at once."""


@dataclass
class Seen:
    """What one forward pass left behind.

    Args:
        hidden: The block's output, (rows, length, hidden width).
        others: What else the block gives, where it gives a tuple.
        inputs: Of every matrix, (rows, length, d_in), by name.
    """

    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    others: tuple[Any, ...] | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)


class _Seen(Exception):
    """Ends a forward pass whose rest is not needed."""


@torch.no_grad()
def run_to_block(model: Any, layer: int, given: dict[str, Any], matrices: Sequence[EditMatrix] = ()) -> Seen:
    """Runs a model until a block has given its output, and no further.

    Args:
        model: A causal LM.
        layer: The block.
        given: What the model is called with.
        matrices: Of blocks up to this one; their inputs are kept.

    Returns:
        What was seen.

    Raises:
        ModelError: The model does not run the block.
    """
    seen = Seen()

    def ended(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, tuple):
            output, seen.others = output[0], output[1:]
        seen.hidden = output
        raise _Seen

    def watch(name: str) -> Any:
        def given_to(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.inputs[name] = arguments[0]

        return given_to

    with ExitStack() as hooks:
        for matrix in matrices:
            hooks.callback(matrix.module.register_forward_pre_hook(watch(matrix.name)).remove)
        hooks.callback(decoder_blocks(model)[1][layer].register_forward_hook(ended).remove)
        try:
            model(**given)
        except _Seen:
            return seen
    raise ModelError(f"{type(model).__name__} does not run its block {layer}")


def at_last_tokens(model: Any, layer: int, rows: Sequence[Sequence[int]], matrix: EditMatrix | None = None) -> Tensor:
    """A block's output at the last token of every row, or a matrix's input there.

    Args:
        model: A causal LM.
        layer: The block.
        rows: Token ids.
        matrix: Of this block, where its input is wanted.

    Returns:
        (rows, width) float32.
    """
    device = model.get_input_embeddings().weight.device
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    found: list[Tensor] = []
    for group in token_groups([rows[index] for index in order], BATCH_TOKENS):
        batch = pad(group).to(device)
        given = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
        seen = run_to_block(model, layer, given, () if matrix is None else (matrix,))
        values = seen.hidden if matrix is None else seen.inputs[matrix.name]
        last = torch.tensor([len(row) - 1 for row in group], device=values.device)
        found.append(values[torch.arange(len(group), device=values.device), last].float())
    together = torch.cat(found)
    result = torch.empty_like(together)
    result[torch.tensor(order, device=together.device)] = together
    return result
