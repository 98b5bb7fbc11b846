"""Ways to edit the same matrices, side by side: what each takes, and which devices it fits."""

from collections.abc import Mapping
from dataclasses import replace

from .assumed import Method
from .errors import ConfigError
from .moments import Kind
from .planning import Compared, parse_memory, plan_edit
from .workload import Settings, Workload

METHODS: Mapping[str, tuple[Kind, Method]] = {
    "dense": ("dense", Method(constraint="staircase", update="projected", form="equation6")),
    "pivot": ("dense", Method(constraint="staircase", update="projected", form="pivot")),
    "cross": ("dense", Method(constraint="cross")),
    "coordinates": ("dense", Method(constraint="staircase", update="coordinates")),
    "sketch": ("sketch", Method(constraint="cross")),
    "priced": ("dense", Method(update="priced")),
    "budget": ("dense", Method(budget=True)),
}
"""By name: the factors, and what is done with them. ``dense`` is eq. 6 of the paper as it stands, in both bases."""


def parse_devices(text: str) -> dict[str, int]:
    """``24GB,80GB`` as bytes by name.

    Args:
        text: Sizes, with commas between them.

    Returns:
        Bytes by what the user wrote, in ascending order.

    Raises:
        ConfigError: One of them is no size.
    """
    sizes = {part.strip(): parse_memory(part) for part in text.split(",") if part.strip()}
    if not sizes:
        raise ConfigError("--devices is empty; it must look like 24GB,80GB,141GB")
    return dict(sorted(sizes.items(), key=lambda item: item[1]))


def compare_methods(work: Workload, settings: Settings, devices: Mapping[str, int]) -> tuple[Compared, ...]:
    """What every method of :data:`METHODS` takes, and which devices it fits.

    Args:
        work: What is to be done; a curvature that is known already is of one kind, and the others are left out.
        settings: Whose factors and method are not looked at.
        devices: Bytes by name; where memory is short, recorded states go to a file.

    Returns:
        One for each method, with the stages as the largest device has them.
    """
    found = []
    for name, (kind, method) in METHODS.items():
        if work.known and kind != settings.kind:
            continue
        tried = replace(settings, kind=kind, method=method)
        plans = {device: plan_edit(work, tried, memory) for device, memory in devices.items()}
        fits = {device: plan.peak.num_bytes <= devices[device] for device, plan in plans.items()}
        largest = plans[max(devices, key=lambda device: devices[device])]
        found.append(Compared(name=name, stages=largest.stages, fits=fits, updates=largest.updates))
    return tuple(found)
