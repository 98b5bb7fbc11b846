"""A model of which every process holds a part: PyTorch's FSDP2, for models that do not fit on one device.

Blocks are put together when they are run, and taken apart again: what a device holds is its part of the frozen
weights, one block, and the edited matrices, which are no part of this: every process has them whole, as float32
masters while they are edited. A forward pass takes all processes, so they run all of them in step: where each has as
many passes, on batches of its own (:func:`crispedit.ranks.sharing`), else on the same ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import distributed, ranks
from .errors import ConfigError
from .models import EditMatrix, decoder_blocks


def check_shard(shard: bool) -> None:
    """Refuses to shard a model over one process.

    Args:
        shard: Whether that is asked for.

    Raises:
        ConfigError: It is, and there is one process.
    """
    if shard and ranks.count() == 1:
        raise ConfigError("--shard divides a model among processes: start them with torchrun, or leave it out")


def shard_model(model: Any, matrices: Sequence[EditMatrix], device: torch.device) -> None:
    """Divides a model among all processes, in place; from now on they stay in step.

    Args:
        model: The causal LM, whole and in main memory, the same everywhere.
        matrices: Those that will be edited, which stay whole.
        device: Of this process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # half a second, which nobody else need wait for

    modules = [matrix.module for matrix in matrices]
    kept = {p for module in modules for p in module.parameters(recurse=False)}  # a bias is seen in other bases too
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (ranks.count(),))
    for block in decoder_blocks(model)[1]:
        fully_shard(block, mesh=mesh, ignored_params=kept)
    fully_shard(model, mesh=mesh, ignored_params=kept)
    ranks.stay_in_step()


def whole_state(model: Any) -> dict[str, Tensor]:
    """All tensors of a sharded model, put together one after the other.

    Args:
        model: After :func:`shard_model`.

    Returns:
        By name, in the main memory of the main process; empty elsewhere. Tied tensors stay tied.
    """
    known: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    names = list(model.state_dict())  # takes apart what the last forward pass has left together
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name in names:
        tensor = tensors[name]
        if id(tensor) not in known:
            known[id(tensor)] = distributed.whole(tensor.detach()).cpu()
            if not ranks.is_main():
                known[id(tensor)] = known[id(tensor)].new_empty(0)
        found[name] = known[id(tensor)]
    return found if ranks.is_main() else {}
