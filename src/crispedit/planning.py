"""What an edit will take: memory, flops and time by stage, disk, and the settings that fit a memory; no weight loaded.

The stages are those of :mod:`crispedit.editing`. Bytes are those of what is alive at once, by the same shapes that the
modules use: an upper estimate of each stage, beside which only small tensors stand. Counts of flops are those of
:mod:`crispedit.costs`, seconds are flops over what :mod:`crispedit.speed` measured: an estimate. A run that ends early,
because its loss is low, takes less; the search for a learning rate takes some epochs more.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from .checkpoint import Form
from .costs import (
    Shape,
    StepFlops,
    answer_flops,
    block_costs,
    cached_bytes,
    coordinate_flops,
    cross_flops,
    eigh_flops,
    factor_bytes,
    head_flops,
    nystrom_flops,
    recorded_bytes,
    recording_flops,
    spectrum_bytes,
    step_flops,
    texts_flops,
    vocabulary,
    weight_bytes,
)
from .description import DESCRIBED_WHOLE
from .errors import ConfigError
from .factors import choose_kind
from .generation import MAX_NEW_TOKENS
from .models import EditMatrix, edit_matrices
from .moments import Kind, sketch_rank
from .rows import EditRow
from .speed import Speed
from .training import rows_per_step

STATES_SHARE = 0.25
"""Recorded states stay in memory if they take no more than this share of what is free, else in a file."""
EIGH_BYTES = 32
"""Bytes per number of the widest factor while it is diagonalised: float64 matrix, eigenvectors, and LAPACK's workspace
of twice that size."""
SLACK = 1.4
"""Tensors that come and go in a pass take so many times what is alive: an allocator keeps what does not fit again."""
RETAINED = 0.65
"""Of that, malloc keeps so much afterwards; measured by benchmarks/plan.py."""
LOGIT_COPIES = 6
"""Float32 copies of a batch's logits that are alive at once: as they came, those that count, their logarithms, …"""
READ_RATE, WRITE_RATE = 1.5e9, 0.5e9
"""Bytes per second from and to a disk; not measured, so as to write nothing."""
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
class Settings:
    """What can be changed to fit a memory.

    Args:
        layers: Decoder blocks that are edited.
        dtype: In which the model computes.
        batch_size: Edits per step, at most.
        mapped: Whether recorded states go to a file whatever their size.
        kind: Of the factors.
        save: What is written at the end: a whole model is read again, to be asked, beside the one in memory.
    """

    layers: tuple[int, ...]
    dtype: torch.dtype
    batch_size: int
    mapped: bool
    kind: Kind
    save: Form = "model"

    def changes(self, before: "Settings") -> list[str]:
        """What is to be done to get from other settings to these."""
        said = []
        if self.batch_size != before.batch_size:
            said.append(f"--batch-size {self.batch_size}")
        if self.mapped and not before.mapped:
            said.append("recorded states in a file")
        if self.save != before.save:
            said.append(f"--save {self.save}")
        if self.dtype != before.dtype:
            said.append(f"--dtype {_name(self.dtype)}")
        if self.kind != before.kind:
            said.append("a curvature of --factors sketch")
        if self.layers != before.layers:
            said.append(f"--layers {','.join(map(str, self.layers))}")
        return said


@dataclass(frozen=True, kw_only=True)
class Workload:
    """An edit before it has begun: what the numbers of a plan depend on, beside the settings.

    Args:
        model: The model on the ``meta`` device.
        rows: One per edit.
        prompts: Lengths in tokens of the prompts that the proof asks, in groups that are answered together.
        proof_rows: The rows that the proof takes the loss of.
        halves: Lengths of the texts of the curvature: per half, per batch, per text. Empty if it is there already.
        held_out: The same of the texts for drift, per batch.
        known: Whether the edit takes a curvature that is there already.
        stored_dtype: The checkpoint's.
        epochs: Passes over the rows, at most.
        retains: Whether memory that is freed stays with the process, as on a CPU.
        base_bytes: What the process takes before it loads a weight; 0 where that is not the device's memory.
        base_seconds: What it takes to start it.
    """

    model: Any
    rows: Sequence[EditRow]
    prompts: Sequence[Sequence[int]]
    proof_rows: Sequence[EditRow]
    halves: Sequence[Sequence[Sequence[int]]]
    held_out: Sequence[Sequence[int]]
    known: bool
    stored_dtype: torch.dtype
    epochs: int
    retains: bool = False
    base_bytes: int = 0
    base_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of an edit.

    Args:
        name: What it does.
        num_bytes: Of memory at its peak, all that earlier stages leave included.
        flops: Matrix products.
        seconds: An estimate; ``None`` where the machine was not measured.
    """

    name: str
    num_bytes: int
    flops: int
    seconds: float | None


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
class Plan:
    """What an edit will take.

    Args:
        settings: It is planned with.
        matrices: What is edited: names and (d_out, d_in).
        stages: In order.
        disk: Bytes by file, temporary ones included.
        step: Flops of one edit step of mean length.
        steps: How many there are at most.
        notes: What the numbers rest on.
        fit: Whether a memory is enough.
    """

    settings: Settings
    matrices: tuple[tuple[str, Shape], ...]
    stages: tuple[Stage, ...]
    disk: dict[str, int]
    step: StepFlops
    steps: int
    notes: list[str] = field(default_factory=list)
    fit: Fit | None = None

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
        settings = {**asdict(self.settings), "dtype": _name(self.settings.dtype), "factors": self.settings.kind}
        del settings["kind"]
        return {
            "settings": settings,
            "matrices": {name: {"d_out": d_out, "d_in": d_in} for name, (d_out, d_in) in self.matrices},
            "stages": {s.name: {"bytes": s.num_bytes, "flops": s.flops, "seconds": s.seconds} for s in self.stages},
            "peak_bytes": self.peak.num_bytes,
            "seconds": self.seconds,
            "disk": self.disk,
            "step_flops": {**asdict(self.step), "total": self.step.total},
            "steps": self.steps,
            "notes": self.notes,
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
    return _Planner(work, settings, memory, speed).plan()


def kind_that_fits(work: Workload, layers: Sequence[int], dtype: torch.dtype, memory: int) -> Kind:
    """The kind of factors that ``crispedit edit`` would choose by itself in a memory."""
    shapes = [matrix.shape for matrix in edit_matrices(work.model, layers)]
    return choose_kind(shapes, max(0, memory - work.base_bytes - weight_bytes(work.model, dtype)))


def fit_memory(work: Workload, settings: Settings, memory: int) -> Fit:
    """Looks for settings that take no more than a memory, those that cost the least in quality first.

    Args:
        work: What is to be done.
        settings: As they are.
        memory: Bytes, as in :func:`plan_edit`.

    Returns:
        What was found.
    """
    least: tuple[int, Settings] | None = None
    for changed in _variations(work, settings):
        taken = plan_edit(work, changed, memory).peak.num_bytes
        if least is None or taken < least[0]:
            least = taken, changed
        if taken <= memory:
            break
    assert least is not None
    taken, changed = least
    as_it_is = changed == settings and taken <= memory
    return Fit(memory=memory, fits=as_it_is, changes=changed.changes(settings), num_bytes=taken)


def _variations(work: Workload, settings: Settings) -> Iterator[Settings]:
    """Settings that take less, in the order of what they cost: time, a step at the end, rounding, directions, reach."""
    small = settings
    yield small
    while small.batch_size > 1:
        small = replace(small, batch_size=small.batch_size // 2)
        yield small
    sizes = [settings, replace(settings, mapped=True), replace(small, mapped=True)]
    yield from sizes[1:]
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


class _Planner:
    """The stages of one edit with given settings."""

    def __init__(self, work: Workload, settings: Settings, memory: int, speed: Speed | None) -> None:
        self.work, self.settings, self.speed = work, settings, speed
        self.matrices: Sequence[EditMatrix] = edit_matrices(work.model, settings.layers)
        self.shapes = [matrix.shape for matrix in self.matrices]
        self.entries = sum(d_out * d_in for d_out, d_in in self.shapes)
        self.blocks = block_costs(work.model)
        self.above = len(self.blocks) - 1 - self.matrices[0].layer
        self.weights = weight_bytes(work.model, settings.dtype)
        self.stored = weight_bytes(work.model, work.stored_dtype)
        self.factors = factor_bytes(self.shapes, settings.kind)
        self.spectra = spectrum_bytes(self.shapes, settings.kind)
        self.held = work.base_bytes + self.weights
        self.recorded = recorded_bytes(work.model, self.matrices, work.rows, settings.dtype)
        free = max(0, memory - self.held - self.factors - self.spectra)
        self.mapped = settings.mapped or self.recorded > STATES_SHARE * free
        self.batch = rows_per_step(len(work.rows), settings.batch_size)

    def plan(self) -> Plan:
        """The plan."""
        steps = -(-len(self.work.rows) // self.batch) * self.work.epochs
        every = self._epoch_flops()
        per_epoch = max(1, steps // self.work.epochs)
        step = StepFlops(
            forward=every.forward // per_epoch, backward=every.backward // per_epoch, update=every.update // per_epoch
        )
        stages = [self._load()]
        if self.work.halves:
            stages.append(self._curvature())
        stages += [self._diagonalise(), self._edit(every, steps), self._proof(), self._save()]
        return Plan(
            settings=replace(self.settings, mapped=self.mapped),
            matrices=tuple((matrix.name, matrix.shape) for matrix in self.matrices),
            stages=tuple(stages),
            disk=self._disk(),
            step=step,
            steps=steps,
        )

    def _load(self) -> Stage:
        """Weights; while they are read and converted, a stored tensor stands beside its copy."""
        largest = max(p.numel() for p in self.work.model.parameters()) * self.work.stored_dtype.itemsize
        converted = largest if self.work.stored_dtype != self.settings.dtype else 0
        return self._stage("load", self.held + converted, 0, self.work.base_seconds + self.stored / READ_RATE)

    def _curvature(self) -> Stage:
        """Two passes over the texts; then, matrix by matrix, both halves side by side, merged and described."""
        work, kind = self.work, self.settings.kind
        widest = max(self.shapes, key=lambda shape: factor_bytes([shape], kind))
        one = factor_bytes([widest], kind)
        passing = self._passing()
        described = 3 * spectrum_bytes([widest], "sketch" if self._sketched(max(widest)) else "dense")
        merging = 3 * one + described + self._eigh_bytes()
        lengths = [length for half in work.halves for batch in half for length in batch]
        flops = texts_flops(work.model, self.matrices, lengths, kind=kind)
        eigh, products = self._describing()
        seconds = None
        if self.speed is not None:
            seconds = sum(self._pass_seconds(batch, self.above) for half in work.halves for batch in half)
            seconds += (flops.update + products) / self.speed.float32 + eigh * self.speed.eigh
            # labels are drawn, and losses taken, over all logits
            seconds += sum(lengths) * vocabulary(work.model) * self.speed.logit
        total = flops.total + products + eigh * eigh_flops(1)
        return self._stage("curvature", self.held + self.factors + max(passing, merging), total, seconds)

    def _passing(self) -> float:
        """Bytes of the largest batch of texts in the pass; 0 without one."""
        tokens = max((max(lengths) * len(lengths) for half in self.work.halves for lengths in half), default=0)
        return SLACK * (self._kept(tokens, self.above) + tokens * 4 * LOGIT_COPIES * vocabulary(self.work.model))

    def _after(self, transient: float) -> float:
        """What tensors that come and go take in a later stage: at least what the pass over the texts left."""
        return max(transient, RETAINED * self._passing() if self.work.retains else 0)

    def _sketched(self, size: int) -> bool:
        """Whether a factor of a size is described, or diagonalised, by a sketch."""
        return self.settings.kind == "sketch" or size > DESCRIBED_WHOLE

    def _describing(self) -> tuple[int, int]:
        """Of the description of both halves and their sum: n³ summed over diagonalisations, flops of products."""
        cubes, products = 0, 0
        for shape in self.shapes:
            for size in shape:
                if self._sketched(max(shape)):
                    rank = sketch_rank(size)
                    cubes += 3 * 2 * rank**3
                    whole = nystrom_flops(size, dense=self.settings.kind == "dense")
                    products += 3 * (whole - 2 * eigh_flops(rank))
                else:
                    cubes += 3 * size**3
        return cubes, products

    def _eigh_bytes(self) -> int:
        """What the diagonalisation of the widest factor takes beside the factor and its spectrum."""
        size = max(max(shape) for shape in self.shapes)
        if self.settings.kind == "sketch" or self._sketched(size):
            return EIGH_BYTES * sketch_rank(size) ** 2
        return EIGH_BYTES * size**2

    def _diagonalise(self) -> Stage:
        """All eigenvectors of dense factors; of sketches, which the description has taken apart, the leading ones."""
        size = max(max(shape) for shape in self.shapes)
        dense = self.settings.kind == "dense"
        working = EIGH_BYTES * (size if dense else sketch_rank(size)) ** 2
        sizes = [size for shape in self.shapes for size in shape]
        if dense:
            flops, cubes = sum(map(eigh_flops, sizes)), sum(size**3 for size in sizes)
        else:
            flops, cubes = (
                sum(nystrom_flops(n, dense=False) for n in sizes),
                sum(2 * sketch_rank(n) ** 3 for n in sizes),
            )
        seconds = None
        if self.speed is not None:
            seconds = cubes * self.speed.eigh + (0 if dense else (flops - cubes * eigh_flops(1)) / self.speed.float32)
        num_bytes = self.held + self.factors + self.spectra + self._after(working)
        return self._stage("diagonalise", num_bytes, flops, seconds)

    def _epoch_flops(self) -> StepFlops:
        """All steps of an epoch."""
        flops = step_flops(self.work.model, self.matrices, self.work.rows, replay=True)
        return replace(flops, update=-(-len(self.work.rows) // self.batch) * self._rule_flops())

    def _rule_flops(self) -> int:
        """Of the update rules of all matrices in one step: coordinates, or a cross no wider than a sketch knows."""
        if self.settings.kind == "dense":
            return sum(map(coordinate_flops, self.shapes))
        return sum(cross_flops(shape, *(sketch_rank(size) for size in shape)) for shape in self.shapes)

    @property
    def _edited(self) -> int:
        """Bytes that the edited matrices take beside the model's: originals, and float32 for a lower dtype."""
        return 4 * self.entries

    def _edit(self, every: StepFlops, steps: int) -> Stage:
        """The loop: what came before the first matrix, recorded; then steps."""
        work, dense = self.work, self.settings.kind == "dense"
        # originals of the loop, parameter, its start, gradients of W and of the parameter, Adam's two moments; the mask
        numbers = 7 + dense
        largest = max(d_out * d_in for d_out, d_in in self.shapes)
        rows = sorted(work.rows, key=lambda row: len(row.ids))[-self.batch :]
        tokens = sum(len(row.ids) for row in rows)
        targets = sum(len(row.ids) - row.prompt_length for row in rows)
        activations = self._kept(tokens, self.above) + targets * 4 * LOGIT_COPIES * vocabulary(work.model)
        num_bytes = self.held + self.factors + self.spectra + self._edited + 4 * (numbers * self.entries + 3 * largest)
        num_bytes += 0 if self.mapped else self.recorded
        recording = recording_flops(work.model, self.matrices, work.rows)
        flops = recording + work.epochs * every.total
        seconds = None
        if self.speed is not None:
            moved = 6 * 4 * self.entries / self.speed.copied  # mask, coordinates, sum and copy
            update = self._rule_flops() / self.speed.float32 + self.entries * self.speed.adam + moved
            lengths = [len(row.ids) for row in work.rows]
            learned = sum(len(row.ids) - row.prompt_length for row in work.rows)
            each = sum(lengths) * self.batch / len(lengths)  # tokens of a batch
            weights = sum(2 * d_out * d_in for d_out, d_in in self.shapes) * sum(lengths) / self.speed.float32
            heads = 2 * head_flops(work.model) * learned / self.speed.head
            stepping = self.above * (self.speed.forward(each) + self.speed.backward(each))
            below = (len(self.blocks) - self.above) * self.speed.forward(each)
            per_epoch = steps // work.epochs
            seconds = per_epoch * below + work.epochs * (per_epoch * (stepping + update) + weights + heads)
        return self._stage("edit", num_bytes + self._after(SLACK * activations), flops, seconds)

    def _proof(self) -> Stage:
        """Answers before, after, and after rounding; losses before and after; drift on held-out texts."""
        work = self.work
        per_token = cached_bytes(work.model, self.settings.dtype)
        cached = max((len(group) * (max(group) + MAX_NEW_TOKENS) for group in work.prompts), default=0) * per_token
        logits = max((max(batch) * len(batch) for batch in work.held_out), default=0) * vocabulary(work.model) * 4
        widest = max(self.shapes, key=lambda shape: shape[0] * shape[1])
        d_out, d_in = widest
        outside = 8 * (5 * d_out * d_in + d_out**2 + d_in**2)  # a share outside a subspace, in float64
        held = self.held + self.factors + self.spectra + self._edited + 4 * self.entries * (3 + 1)
        num_bytes = held + self._after(max(SLACK * cached, LOGIT_COPIES * logits, outside))
        answers = sum(answer_flops(work.model, group, MAX_NEW_TOKENS) for group in work.prompts)
        lengths = [length for batch in work.held_out for length in batch]
        lengths_twice = 2 * (lengths + [len(row.ids) for row in work.proof_rows])
        reading = texts_flops(work.model, self.matrices, lengths_twice)
        seconds = self._answer_seconds()
        if seconds is not None and self.speed is not None:
            shown = [len(row.ids) for row in work.proof_rows]
            batches = [*work.held_out, *(shown[i : i + 8] for i in range(0, len(shown), 8))]
            others = 2 * sum(self._pass_seconds(batch) for batch in batches)
            outside_flops = 2 * sum(map(coordinate_flops, self.shapes))  # in float64, half as fast
            compared = sum(lengths) * vocabulary(work.model) * self.speed.logit  # two losses, a divergence
            seconds = 3 * seconds + others + outside_flops / self.speed.float32 + compared
        return self._stage("proof", num_bytes, 3 * answers + reading.total, seconds)

    def _answer_seconds(self) -> float | None:
        """Of all prompts once: a pass over each group, and one more for every new token."""
        if self.speed is None:
            return None
        total = 0.0
        for group in self.work.prompts:
            total += self._pass_seconds(group, logits=len(group))
            total += MAX_NEW_TOKENS * len(self.blocks) * self.speed.forward(len(group))
            total += MAX_NEW_TOKENS * len(group) * head_flops(self.work.model) / self.speed.head
        return total

    def _save(self) -> Stage:
        """The model in its stored dtype, written; then read again beside the one in memory, and asked."""
        work = self.work
        num_bytes = self.held + self.factors + self.spectra + 4 * self.entries * 2
        if self.settings.save == "delta":
            written = 4 * self.entries
            return self._stage("save", num_bytes + self._after(0), 0, written / WRITE_RATE)
        converted = self.stored if work.stored_dtype != self.settings.dtype else 0
        answers = sum(answer_flops(work.model, group, MAX_NEW_TOKENS) for group in work.prompts)
        seconds = self._answer_seconds()
        if seconds is not None:
            seconds += self.stored / WRITE_RATE + self.stored / READ_RATE
        return self._stage("save", num_bytes + self._after(max(converted, self.weights)), answers, seconds)

    def _kept(self, tokens: int, blocks: int) -> int:
        """Bytes that tokens take: what autograd keeps of the topmost blocks; what goes in and out of the matrices."""
        top = self.blocks[len(self.blocks) - blocks :] if blocks else ()
        width = sum(d_in + 2 * d_out for d_out, d_in in self.shapes)
        return tokens * (sum(block.kept_bytes(self.settings.dtype) for block in top) + 4 * width)

    def _pass_seconds(
        self, lengths: Sequence[int], differentiated: int | None = None, logits: int | None = None
    ) -> float:
        """Seconds of a pass over one batch.

        Args:
            lengths: Of its rows.
            differentiated: How many of the topmost blocks are run backward; none when omitted, nor the head.
            logits: Positions whose logits are computed; all when omitted.
        """
        assert self.speed is not None
        block, tokens = self.blocks[-1], sum(lengths)
        measured = block.linear + block.attention * self.speed.row
        flops = block.linear * tokens + block.attention * sum(n * n for n in lengths)
        alike = flops / measured  # tokens in rows as they were measured that take as many flops
        seconds = len(self.blocks) * self.speed.forward(alike)
        heads = 1
        if differentiated is not None:
            seconds += differentiated * self.speed.backward(alike)
            heads = 2
        positions = tokens if logits is None else logits
        return seconds + heads * positions * head_flops(self.work.model) / self.speed.head

    def _stage(self, name: str, num_bytes: float, flops: int, seconds: float | None) -> Stage:
        return Stage(name=name, num_bytes=int(num_bytes), flops=int(flops), seconds=seconds if self.speed else None)

    def _disk(self) -> dict[str, int]:
        found = {"edited model": self.stored} if self.settings.save == "model" else {"change": 4 * self.entries}
        if self.work.halves:
            found["curvature, in the cache"] = self.factors
            found["state of its passes, temporary"] = 2 * self.factors
        if self.mapped:
            found["recorded states, temporary"] = self.recorded
        return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
