"""What an edit will take: memory, flops and time by stage, disk, and the settings that fit a memory; no weight loaded.

The stages are those of :mod:`crispedit.editing`. Bytes are those of what is alive at once, by the same shapes that the
modules use: an upper estimate of each stage, beside which only small tensors stand. Counts of flops are those of
:mod:`crispedit.costs`, seconds are flops over what :mod:`crispedit.speed` measured: an estimate. A run that ends early,
because its loss is low, takes less; the search for a learning rate takes some epochs more.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from .assumed import choose
from .checkpoint import Form
from .costs import (
    EIGH_BYTES,
    Shape,
    StepFlops,
    answer_flops,
    block_costs,
    cached_bytes,
    eigh_flops,
    factor_bytes,
    head_flops,
    nystrom_flops,
    recorded_bytes,
    recording_flops,
    step_flops,
    texts_flops,
    vocabulary,
    weight_bytes,
)
from .description import DESCRIBED_WHOLE, ENERGY
from .editing import CHECKED
from .errors import ConfigError
from .factors import choose_kind
from .forward import BatchSize, batch_size, pair_cost
from .generation import DRAFT_TOKENS, MAX_NEW_TOKENS
from .models import EditMatrix, decoder_blocks, edit_matrices
from .moments import Kind, sketch_rank
from .proof import spread
from .replay import CHECK_ROWS, MEMORY_SHARE, recorded_together, within_windows
from .rows import EditRow
from .speed import Speed
from .training import batches, rows_per_step

SAMPLED = 64
"""Of the batches of an epoch so many are put together as the edit will, to count their tokens."""
UNDECIDED = 0.25
"""The share of the answers that drafts do not decide when the edited model is first asked: of rephrases, mostly."""
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
        save: What is written at the end: a whole model is read back, to be compared and asked; in the CPU's memory.
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
        energy: γ of the edit.
        ranks: Effective ranks of A and G by matrix name, where a curvature that is known says them.
        on_cpu: Whether the model computes on the CPU: memory that is freed stays with the process, and the saved
            model is read back into the same memory.
        mixed: Whether steps compute in bfloat16 around float32 weights.
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
    energy: float = ENERGY
    ranks: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    on_cpu: bool = False
    mixed: bool = False
    base_bytes: int = 0
    base_seconds: float = 0.0
    _sizes: dict[int, list[BatchSize]] = field(default_factory=dict, init=False, repr=False)

    @property
    def packed(self) -> bool:
        """Whether rows of a batch share what they have in common, as far as the configuration says."""
        return within_windows(self.model, self.rows)

    def steps(self, rows: int) -> list[BatchSize]:
        """Sizes of batches of so many rows, put together as the first epoch's are; of some if there are many."""
        if rows not in self._sizes:
            lengths = [len(row.ids) for row in self.rows]
            every = batches(lengths, rows, random.Random(0), alike=not self.packed)
            self._sizes[rows] = self._sized(spread(every, SAMPLED))
        return self._sizes[rows]

    def recording(self) -> list[BatchSize]:
        """Sizes of the batches that are recorded."""
        if 0 not in self._sizes:  # no step has no rows
            self._sizes[0] = self._sized(recorded_together(self.model, self.rows, self.packed))
        return self._sizes[0]

    def _sized(self, groups: Sequence[Sequence[int]]) -> list[BatchSize]:
        cost = pair_cost(self.model) if self.packed else None
        return [batch_size([self.rows[index] for index in group], cost) for group in groups]


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
        self.choices = [
            choose(matrix.shape, settings.kind, work.energy, work.ranks.get(matrix.name)) for matrix in self.matrices
        ]
        self.factors = factor_bytes(self.shapes, settings.kind)
        self.spectra = sum(choice.spectrum_bytes for choice in self.choices)
        self.held = work.base_bytes + self.weights
        recorded = sum(size.tokens for size in work.recording())
        self.recorded = recorded_bytes(work.model, self.matrices, recorded, settings.dtype)
        # what stands when there is something to record: beside what is held, parameter and its start
        self.begun = self.held + self.factors + self.spectra + self._edited + self._rules + 4 * 2 * self.entries
        self.mapped = settings.mapped or self.recorded > MEMORY_SHARE * max(0, memory - self.begun)
        self.batch = rows_per_step(len(work.rows), settings.batch_size)
        self.sizes = work.steps(self.batch)

    def plan(self) -> Plan:
        """The plan."""
        steps = -(-len(self.work.rows) // self.batch) * self.work.epochs
        step = self._step()
        stages = [self._load()]
        if self.work.halves:
            stages.append(self._curvature())
        stages += [self._diagonalise(), self._edit(step, steps), self._proof(), self._save()]
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
        described = 3 * factor_bytes([widest], "sketch" if self._sketched(max(widest)) else "dense")
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
        return SLACK * (
            self._kept(tokens, self.above, self.settings.dtype)
            + tokens * 4 * LOGIT_COPIES * vocabulary(self.work.model)
        )

    def _after(self, transient: float) -> float:
        """What tensors that come and go take in a later stage: at least what the pass over the texts left."""
        return max(transient, RETAINED * self._passing() if self.work.on_cpu else 0)

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
        """The spectra that the subspaces take, matrix by matrix."""
        choices, dense = self.choices, self.settings.kind == "dense"
        working = max(choice.working_bytes for choice in choices)
        cubes, products = sum(choice.cubes for choice in choices), sum(choice.flops for choice in choices)
        seconds = None
        if self.speed is not None:
            seconds = cubes * self.speed.eigh + products / (self.speed.float64 if dense else self.speed.float32)
        num_bytes = self.held + self.factors + self.spectra + self._after(working)
        return self._stage("diagonalise", num_bytes, sum(choice.total_flops for choice in choices), seconds)

    def _step(self) -> StepFlops:
        """A step of mean size."""
        count, rules = len(self.sizes), sum(self._rule_flops(size.computed) for size in self.sizes)
        every = step_flops(self.work.model, self.matrices, self.sizes, replay=True, rule_flops=rules)
        return StepFlops(forward=every.forward // count, backward=every.backward // count, update=every.update // count)

    def _rule_flops(self, tokens: int) -> int:
        """Of the update rules of all matrices in one step."""
        return sum(choice.step_flops(tokens) for choice in self.choices)

    @property
    def _edited(self) -> int:
        """Bytes that the edited matrices take beside the model's: originals, and float32 in place of a lower dtype."""
        return 4 * self.entries

    @property
    def _rules(self) -> int:
        return sum(choice.rule_bytes for choice in self.choices)

    def _edit(self, step: StepFlops, steps: int) -> Stage:
        """The loop: what came before the first matrix, recorded; then steps."""
        work, logit = self.work, 4 * vocabulary(self.work.model)
        # originals of the loop, gradients of W and of the parameter, Adam's two moments
        looping = 4 * 5 * self.entries + 4 * 3 * max(d_out * d_in for d_out, d_in in self.shapes)
        dtype = torch.bfloat16 if work.mixed else self.settings.dtype
        activations = max(
            self._kept(s.computed, self.above, dtype) + s.labels * LOGIT_COPIES * logit for s in self.sizes
        )
        if work.mixed and self.settings.dtype == torch.float32:  # autograd keeps the weights as they were cast
            activations += self.above * 2 * sum(p.numel() for p in decoder_blocks(work.model)[1][-1].parameters())
        # of a recorded batch what goes through a block; of the rows that are checked all logits
        recording = max(s.computed for s in work.recording()) * self.blocks[0].kept_bytes(self.settings.dtype)
        checked = CHECK_ROWS * max(len(row.ids) for row in work.rows) * 2 * logit
        transient = max(activations, recording, checked)
        num_bytes = self.begun + looping + (0 if self.mapped else self.recorded)
        flops = recording_flops(work.model, self.matrices, work.recording()) + steps * step.total
        seconds = None
        if self.speed is not None:
            below = len(self.blocks) - self.above
            seconds = sum(below * self.speed.forward(self._alike(s.computed, s.pairs)) for s in work.recording())
            seconds += steps * sum(map(self._step_seconds, self.sizes)) / len(self.sizes)
        return self._stage("edit", num_bytes + self._after(SLACK * transient), flops, seconds)

    def _step_seconds(self, size: BatchSize) -> float:
        """Of one batch: blocks above, head, loss, what is done with tokens and gradients of the matrices, Adam."""
        assert self.speed is not None
        alike = self._alike(size.computed, size.pairs)
        blocks = self.above * (self.speed.forward(alike) + self.speed.backward(alike))
        heads = 2 * head_flops(self.work.model) * size.positions / self.speed.head
        logits = size.labels * vocabulary(self.work.model) * self.speed.logit
        d_out, d_in = self.shapes[0]
        # in float32: the first matrix times its recorded inputs, and the gradients of all
        products = self._rule_flops(size.computed) + 2 * d_out * d_in * size.tokens + 2 * self.entries * size.computed
        moved = 6 * 4 * self.entries / self.speed.copied  # mask, coordinates, sum and copy
        return blocks + heads + logits + products / self.speed.float32 + self.entries * self.speed.adam + moved

    def _proof(self) -> Stage:
        """Answers before, after, and after rounding if there was any; losses before and after; drift on held-out texts.

        The model is asked from nothing once; later its answers and the targets are drafts, and most are decided.
        """
        work = self.work
        same = work.stored_dtype == self.settings.dtype == torch.float32
        later = 1 if same else 2
        per_token = cached_bytes(work.model, self.settings.dtype)
        cached = max((len(group) * (max(group) + MAX_NEW_TOKENS) for group in work.prompts), default=0) * per_token
        logits = max((max(batch) * len(batch) for batch in work.held_out), default=0) * vocabulary(work.model) * 4
        drafted = DRAFT_TOKENS * vocabulary(work.model) * self.settings.dtype.itemsize
        d_out, d_in = max(self.shapes, key=lambda shape: shape[0] * shape[1])
        # a share outside a subspace, in float64: the change, what is outside, and both bases
        outside = 8 * 5 * d_out * d_in + 2 * max(choice.spectrum_bytes for choice in self.choices)
        held = self.held + self.factors + self.spectra + self._edited + 4 * self.entries * (3 + 1)
        transient = max(SLACK * cached, LOGIT_COPIES * logits, outside, 3 * drafted)
        answers = sum(answer_flops(work.model, group, MAX_NEW_TOKENS) for group in work.prompts)
        drafts = [length + MAX_NEW_TOKENS for group in work.prompts for length in group]
        lengths = [length for batch in work.held_out for length in batch]
        read = 2 * (lengths + [len(row.ids) for row in work.proof_rows]) + later * drafts
        reading = texts_flops(work.model, self.matrices, read)
        seconds = self._answer_seconds(work.prompts)
        if seconds is not None and self.speed is not None:
            shown = [len(row.ids) for row in work.proof_rows]
            held_out = [*work.held_out, *(shown[i : i + 8] for i in range(0, len(shown), 8))]
            others = 2 * sum(self._pass_seconds(batch) for batch in held_out)
            others += later * sum(map(self._pass_seconds, _in_batches(drafts)))
            outside_flops = sum(choice.subspace.flops for choice in self.choices)
            compared = sum(lengths) * vocabulary(work.model) * self.speed.logit  # two losses, a divergence
            seconds = (1 + UNDECIDED) * seconds + others + outside_flops / self.speed.float64 + compared
        flops = int((1 + UNDECIDED) * answers) + reading.total
        return self._stage("proof", held + self._after(transient), flops, seconds)

    def _answer_seconds(self, prompts: Sequence[Sequence[int]]) -> float | None:
        """Of prompts once: a pass over each group, and one more for every new token."""
        if self.speed is None:
            return None
        total = 0.0
        for group in prompts:
            total += self._pass_seconds(group, logits=len(group))
            total += MAX_NEW_TOKENS * len(self.blocks) * self.speed.forward(len(group))
            total += MAX_NEW_TOKENS * len(group) * head_flops(self.work.model) / self.speed.head
        return total

    def _save(self) -> Stage:
        """The model in its stored dtype, written; read back into the CPU's memory, and both asked a few questions."""
        work = self.work
        num_bytes = self.held + self.factors + self.spectra + 4 * self.entries * 2
        if self.settings.save == "delta":
            written = work.stored_dtype.itemsize * self.entries
            return self._stage("save", num_bytes + self._after(0), 0, written / WRITE_RATE)
        # rounded to another dtype the weights are copied once to be written, and again to be asked
        converted = max(self.stored, self.weights) if work.stored_dtype != self.settings.dtype else 0
        second = max(converted, self.weights) if work.on_cpu else converted
        asked = spread([length for group in work.prompts for length in group], CHECKED)
        seconds = self._answer_seconds([asked] if asked else [])
        if seconds is not None:
            seconds = 2 * seconds + self.stored / WRITE_RATE + self.stored / READ_RATE
        flops = 2 * answer_flops(work.model, asked, MAX_NEW_TOKENS)
        # what is read has pages of its own: it does not go where freed memory was
        return self._stage("save", num_bytes + self._after(0) + second, flops, seconds)

    def _alike(self, tokens: int, pairs: int) -> float:
        """How many tokens, in rows as they were measured, take as many flops of a block as a batch does."""
        assert self.speed is not None
        block = self.blocks[-1]
        return (block.linear * tokens + block.attention * pairs) / (block.linear + block.attention * self.speed.row)

    def _kept(self, tokens: int, blocks: int, dtype: torch.dtype) -> int:
        """Bytes that tokens take: what autograd keeps of the topmost blocks; what goes in and out of the matrices."""
        top = self.blocks[len(self.blocks) - blocks :] if blocks else ()
        width = sum(d_in + 2 * d_out for d_out, d_in in self.shapes)
        return tokens * (sum(block.kept_bytes(dtype) for block in top) + 4 * width)

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
        tokens = sum(lengths)
        alike = self._alike(tokens, sum(n * n for n in lengths))
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
        found = (
            {"edited model": self.stored}
            if self.settings.save == "model"
            else {"patch": self.work.stored_dtype.itemsize * self.entries}
        )
        if self.work.halves:
            found["curvature, in the cache"] = self.factors
            found["state of its passes, temporary"] = 2 * self.factors
        if self.mapped:
            found["recorded states, temporary"] = self.recorded
        return found


def _in_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Prompts with their drafts as they are run together."""
    found: list[list[int]] = []
    for length in lengths:
        if not found or sum(found[-1]) + length > DRAFT_TOKENS:
            found.append([])
        found[-1].append(length)
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
