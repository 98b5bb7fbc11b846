"""Models of which the blocks below the first edited one wait in main memory or on disk, and come when they are run.

An edit runs those blocks once per row (:mod:`crispedit.replay`), and what follows needs them no more. Accelerate brings
their weights to the device for the time of a forward pass; here is which of them wait, and how their tensors are read.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .errors import ConfigError, did_you_mean

Place = Literal["cpu", "disk"]


def check_place(place: str | None, device: torch.device | None = None) -> None:
    """Refuses a place that is none, or where the model is anyway.

    Args:
        place: ``cpu``, ``disk``, or ``None``.
        device: Of the model, where it is to be loaded.

    Raises:
        ConfigError: It cannot be used.
    """
    if place is None:
        return
    if place not in get_args(Place):
        raise ConfigError(f"offload is '{place}'; it must be cpu or disk{did_you_mean(place, get_args(Place))}")
    if device is None:
        return
    if place == device.type:
        raise ConfigError("offload is cpu, and the whole model is there: leave it out, or offload to disk")
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise ConfigError("--offload needs accelerate: pip install 'crispedit[device-map]'") from None


def waiting(model: Any, path: str, first: int, place: str, device: torch.device) -> dict[str, str]:
    """Where each part of a model goes, as transformers takes it.

    Args:
        model: On any device; ``meta`` will do.
        path: Of its list of decoder blocks.
        first: The first block that does not wait.
        place: Where those below wait.
        device: Where everything else goes.

    Returns:
        Places by path; each parameter and buffer is below exactly one of them.
    """
    places: dict[str, str] = {}
    parent, within, usual = model, "", str(device)
    for part in path.split("."):
        tensors = [*parent.named_parameters(recurse=False), *parent.named_buffers(recurse=False)]
        places |= {within + name: usual for name, _ in [*parent.named_children(), *tensors] if name != part}
        parent, within = getattr(parent, part), f"{within}{part}."
    return places | {f"{path}.{number}": place if number < first else usual for number in range(len(parent))}


class State(Mapping[str, Tensor]):
    """A model's tensors by name, as its ``state_dict`` has them; those that wait are read when they are asked for.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._tensors = model, model.state_dict()

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._tensors[name]
        return read(self._model, name) if tensor.is_meta else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def in_one_place(model: Any) -> bool:
    """Whether all of a model is on one device: nothing waits elsewhere, and it is not spread over several."""
    return len({tensor.device for tensor in model.state_dict().values()}) == 1


def _hooks(module: Any) -> Iterator[Any]:
    """What accelerate has hung on a module that brings weights from elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if getattr(one, "weights_map", None) is not None:
            yield one


def name_devices(model: Any) -> None:
    """Lets accelerate read what waits on disk: it asks for a ``torch.device``, and safetensors takes names alone."""
    for module in model.modules():
        for hook in _hooks(module):
            loader = getattr(hook.weights_map, "dataset", hook.weights_map)
            if isinstance(getattr(loader, "device", None), torch.device):
                loader.device = str(loader.device)


def read(model: Any, name: str) -> Tensor:
    """A tensor that waits, in main memory.

    Args:
        model: The model.
        name: Of a parameter or buffer that is on the ``meta`` device.

    Returns:
        The tensor; a model that was never loaded has none, and gets the one without numbers.
    """
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    for hook in _hooks(module):
        found: Tensor = hook.weights_map[own]
        return found.cpu()
    tensor: Tensor = getattr(module, own)
    return tensor
