"""What an edit will take, by stage and in all, and the settings that fit a memory; no weight is loaded.

Where the numbers come from: :mod:`crispedit.stages`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from .costs import Shape, StepFlops
from .errors import ConfigError
from .factors import choose_kind
from .models import edit_matrices
from .moments import Kind
from .processes import Processes
from .speed import Speed
from .stages import Planner, Stage
from .workload import Settings, Workload, dtype_name

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_memory(text: str) -> int:
    """``24GB``, ``24 GiB``, ``800MB`` or ``1.5GB`` as bytes.

    Args:
        text: What the user wrote.

    Returns:
        Bytes, more than 0.

    Raises:
        ConfigError: It is not a number above 0 with a unit.
    """
    digits = text.strip().rstrip("BbIiKkMmGgTt ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        num_bytes = int(float(digits) * UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        num_bytes = 0
    if num_bytes <= 0:
        raise ConfigError(f"memory is '{text}'; it must look like 24GB, 24GiB or 800MB")
    return num_bytes


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether a memory is enough, and what would make it so.

    Args:
        memory: Bytes that there are.
        fits: Whether the settings as they are take no more.
        changes: The first settings in the order of what they cost in quality that take no more; if none does, those
            that take the least.
        num_bytes: What the changed settings take at the peak.
    """

    memory: int
    fits: bool
    changes: list[str]
    num_bytes: int

    @property
    def possible(self) -> bool:
        """Whether it fits as it is, or changed."""
        return self.num_bytes <= self.memory


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What one way to edit takes; see :mod:`crispedit.methods`.

    Args:
        name: Of the method.
        updates: The rules of its matrices, each once.
        stages: In order.
        fits: By device, whether it does.
    """

    name: str
    updates: tuple[str, ...]
    stages: tuple[Stage, ...]
    fits: dict[str, bool]

    @property
    def peak(self) -> Stage:
        """The stage that takes the most memory."""
        return max(self.stages, key=lambda stage: stage.num_bytes)

    def record(self) -> dict[str, Any]:
        """The method, JSON-ready."""
        return {
            "updates": self.updates,
            "stages": {stage.name: stage.record() for stage in self.stages},
            "peak_bytes": self.peak.num_bytes,
            "peak_stage": self.peak.name,
            "fits": self.fits,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an edit will take.

    Args:
        settings: It is planned with.
        processes: The processes of the run: numbers are those of one of them, unless they say otherwise.
        matrices: What is edited: names and (d_out, d_in).
        updates: The rules of these, each once.
        stages: In order.
        disk: Bytes by file, temporary ones included.
        step: Flops of one edit step of mean length.
        steps: How many there are at most.
        notes: What the numbers rest on.
        fit: Whether a memory is enough.
        compared: Other ways to edit, where devices are named.
    """

    settings: Settings
    processes: Processes
    matrices: tuple[tuple[str, Shape], ...]
    updates: tuple[str, ...]
    stages: tuple[Stage, ...]
    disk: dict[str, int]
    step: StepFlops
    steps: int
    notes: list[str] = field(default_factory=list)
    fit: Fit | None = None
    compared: tuple[Compared, ...] = ()

    @property
    def peak(self) -> Stage:
        """The stage that takes the most memory."""
        return max(self.stages, key=lambda stage: stage.num_bytes)

    @property
    def seconds(self) -> float | None:
        """Of all stages."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if len(known) == len(self.stages) else None

    def record(self) -> dict[str, Any]:
        """The plan, JSON-ready."""
        settings = {**asdict(self.settings), "dtype": dtype_name(self.settings.dtype), "factors": self.settings.kind}
        del settings["kind"], settings["method"]
        return {
            "settings": settings,
            "matrices": {name: {"d_out": d_out, "d_in": d_in} for name, (d_out, d_in) in self.matrices},
            "method": {**asdict(self.settings.method), "updates": self.updates},
            "processes": self.processes.size,
            "shard": self.processes.shard,
            "offload": self.processes.offload,
            "stages": {stage.name: stage.record() for stage in self.stages},
            "peak_bytes": self.peak.num_bytes,
            "seconds": self.seconds,
            "disk": self.disk,
            "step_flops": {**asdict(self.step), "total": self.step.total},
            "steps": self.steps,
            "notes": self.notes,
            "methods": {one.name: one.record() for one in self.compared} or None,
            "fit": None if self.fit is None else {**asdict(self.fit), "possible": self.fit.possible},
        }


def plan_edit(work: Workload, settings: Settings, memory: int, speed: Speed | None = None) -> Plan:
    """Plans an edit.

    Args:
        work: What is to be done.
        settings: With which.
        memory: Bytes that there are, what the process takes already included: beyond a share of what weights leave of
            them, recorded states go to a file.
        speed: Of the device; without it there are no seconds.

    Returns:
        The plan, without a fit.
    """
    planner = Planner(work, settings, memory, speed)
    return Plan(
        settings=replace(settings, mapped=planner.mapped),
        processes=work.processes,
        matrices=tuple((matrix.name, matrix.shape) for matrix in planner.matrices),
        updates=tuple(dict.fromkeys(choice.update for choice in planner.choices)),
        stages=planner.stages(),
        disk=planner.disk(),
        step=planner.step,
        steps=planner.steps,
    )


def kind_that_fits(work: Workload, layers: Sequence[int], dtype: torch.dtype, memory: int) -> Kind:
    """The kind of factors that ``crispedit edit`` would choose by itself in a memory."""
    matrices = edit_matrices(work.model, layers)
    shapes = [matrix.shape for matrix in matrices]
    held = work.processes.weight_bytes(work.model, matrices, dtype)
    return choose_kind(shapes, max(0, memory - work.base_bytes - held))


def fit_memory(work: Workload, settings: Settings, memory: int) -> Fit:
    """Looks for settings that take no more than a memory, those that cost the least in quality first.

    Args:
        work: What is to be done.
        settings: As they are.
        memory: Bytes, as in :func:`plan_edit`.

    Returns:
        What was found.
    """
    least: tuple[int, list[str]] | None = None
    for elsewhere, one, changed in _candidates(work, settings):
        taken = plan_edit(one, changed, memory).peak.num_bytes
        if least is None or taken < least[0]:
            least = taken, [*elsewhere, *changed.changes(settings)]
        if taken <= memory:
            break
    assert least is not None
    taken, changes = least
    return Fit(memory=memory, fits=not changes and taken <= memory, changes=changes, num_bytes=taken)


def _candidates(work: Workload, settings: Settings) -> Iterator[tuple[list[str], Workload, Settings]]:
    """What takes less, and what of it is no setting: blocks that wait in main memory cost time alone."""
    processes = work.processes
    if work.on_cpu or processes.offload or processes.size > 1:
        yield from (([], work, changed) for changed in _variations(work, settings))
        return
    yield from (([], work, changed) for changed in _smaller(settings))
    waiting = replace(work, processes=replace(processes, offload=True))
    yield from ((["--offload cpu"], waiting, changed) for changed in _variations(work, settings))


def _variations(work: Workload, settings: Settings) -> Iterator[Settings]:
    """Settings that take less, in the order of what they cost: time, a step at the end, rounding, directions, reach."""
    *batches, last = _smaller(settings)
    yield from (*batches, last)
    sizes = [settings, replace(settings, mapped=True), last]
    if settings.save == "model":
        reduced = [replace(one, save="delta") for one in sizes]
        yield from reduced
        sizes += reduced
    if settings.dtype == torch.float32:
        sizes = [replace(one, dtype=torch.bfloat16) for one in sizes]
        yield from sizes
    if settings.kind == "dense" and not work.known:  # a curvature that is there is what it is
        sizes = [replace(one, kind="sketch") for one in sizes]
        yield from sizes
    for dropped in range(1, len(settings.layers)):
        yield from (replace(one, layers=settings.layers[dropped:]) for one in sizes)


def _smaller(settings: Settings) -> Iterator[Settings]:
    """Settings with smaller batches, and then with records in a file."""
    small = settings
    yield small
    while small.batch_size > 1:
        small = replace(small, batch_size=small.batch_size // 2)
        yield small
    yield replace(settings, mapped=True)
    yield replace(small, mapped=True)
