"""The stages of one edit with given settings: bytes, flops and seconds of each.

The stages are those of :mod:`crispedit.editing`. Bytes are those of what is alive at once, by the same shapes that the
modules use: an upper estimate of each stage, beside which only small tensors stand. Counts of flops are those of
:mod:`crispedit.costs`, seconds are flops over what :mod:`crispedit.speed` measured: an estimate. A run that ends early,
because its loss is low, takes less; the search for a learning rate takes some epochs more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .assumed import Choice, choose, described_ranks
from .budget import LOOKED_AT
from .costs import (
    EIGH_BYTES,
    Shape,
    StepFlops,
    answer_flops,
    approximate_flops,
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
from .description import DESCRIBED_WHOLE
from .drift_meter import SAMPLE, WHOLE
from .editing import CHECKED
from .edits import spread
from .forward import BatchSize, batch_size, rounded_up
from .generation import DRAFT_TOKENS, MAX_NEW_TOKENS
from .models import EditMatrix, decoder_blocks, edit_matrices, text_config
from .moments import sketch_rank
from .moved import Moved
from .pace import Pace
from .pieces import tokens_at_once
from .recording import recorded_together
from .replay import checked_rows
from .room import MEMORY_SHARE
from .rows import EditRow
from .speed import Speed
from .texts import row_groups
from .training import rows_per_step
from .workload import Settings, Workload

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


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of an edit.

    Args:
        name: What it does.
        num_bytes: Of memory at its peak, all that earlier stages leave included; of the process that takes the most.
        flops: Matrix products of the process that has the most of them.
        flops_of_all: Those of all processes.
        moved: Bytes that move between this process and the others (:mod:`crispedit.moved`).
        seconds: An estimate, without what moves between processes; ``None`` where the machine was not measured.
    """

    name: str
    num_bytes: int
    flops: int
    flops_of_all: int
    moved: int
    seconds: float | None

    def record(self) -> dict[str, Any]:
        """The stage, JSON-ready."""
        return {
            "bytes": self.num_bytes,
            "flops": self.flops,
            "flops_of_all": self.flops_of_all,
            "moved_bytes": self.moved,
            "seconds": self.seconds,
        }


class Planner:
    """The stages of one edit with given settings, as the process that has the most to do goes through them.

    Args:
        work: What is to be done, and by how many processes.
        settings: With which.
        memory: Bytes that each has, what it takes already included.
        speed: Of its device; without it there are no seconds.
    """

    def __init__(self, work: Workload, settings: Settings, memory: int, speed: Speed | None) -> None:
        self.work, self.settings, self.memory = work, settings, memory
        self.matrices: Sequence[EditMatrix] = edit_matrices(work.model, settings.layers)
        self.shapes = [matrix.shape for matrix in self.matrices]
        self.entries = sum(d_out * d_in for d_out, d_in in self.shapes)
        self.blocks = block_costs(work.model)
        self.above = len(self.blocks) - 1 - self.matrices[0].layer
        self.pace = None
        if speed is not None:
            first, shape = self.matrices[0].layer, self.shapes[0]
            self.pace = Pace(speed, work.model, first=first, shape=shape, at_once=self._at_once)
        self.weights = weight_bytes(work.model, settings.dtype)
        self.stored = weight_bytes(work.model, work.stored_dtype)
        self.choices = [
            choose(matrix.shape, settings.kind, work.energy, work.ranks.get(matrix.name), settings.method)
            for matrix in self.matrices
        ]
        self.factors = factor_bytes(self.shapes, settings.kind)
        # those of a divided model, and those that were read from a file, wait in main memory
        self.resident = self.factors if work.on_cpu or not (work.processes.shard or work.known) else 0
        self.spectra = sum(choice.spectrum_bytes for choice in self.choices)
        self.processes = work.processes
        self.moved = Moved(work.processes, work.model, self.matrices, settings.dtype)
        by_size = self.processes.owned(self.choices, [d_out * d_in for d_out, d_in in self.shapes])
        self.own: Sequence[Choice] = max(by_size, key=_entries)
        self.own_entries = _entries(self.own)
        self.held = work.base_bytes + self.processes.weight_bytes(work.model, self.matrices, settings.dtype)
        self.held += self.processes.gathered_bytes(work.model, self.matrices, settings.dtype)
        recorded = sum(size.tokens for size in work.recording())
        self.recorded = recorded_bytes(work.model, self.matrices, recorded, settings.dtype)
        # what stands when there is something to record: beside what is held, the parameters of the rules
        self.begun = self.held + self.resident + self.spectra + self._edited + self._rules + 4 * self.own_entries
        self.mapped = settings.mapped or self.recorded > MEMORY_SHARE * max(0, memory - self.begun)
        self.batch = rows_per_step(len(work.rows), settings.batch_size)
        self.sizes = work.steps(self.processes.part(self.batch))
        self.steps = -(-len(work.rows) // self.batch) * work.epochs
        self.step = self._step()

    def stages(self) -> tuple[Stage, ...]:
        """All stages, in order."""
        curvature = [self._curvature()] if self.work.halves else []
        return (self._load(), *curvature, self._diagonalise(), self._edit(), self._proof(), self._save())

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
        described, found = self._described_bytes(widest)
        merging = 3 * one + 3 * described + found
        mine = [batch for half in work.halves for batch in self.processes.busiest(half)]
        described_by = self.processes.owned(self.shapes, [sum(size**3 for size in shape) for shape in self.shapes])
        if self.processes.size > 1:  # both halves of all that a process describes wait until the others have theirs
            merging += 2 * max(factor_bytes(shapes, kind) for shapes in described_by)
        flops = texts_flops(work.model, self.matrices, [n for batch in mine for n in batch], kind=kind)
        eigh, products = max((self._describing(shapes) for shapes in described_by), key=_described_flops)
        seconds = None
        if self.pace is not None:
            seconds = sum(self.pace.texts(batch, backward=True) for batch in mine)
            seconds += (flops.update + products) / self.pace.speed.float32 + eigh * self.pace.speed.eigh
            # labels are drawn, and losses taken, over all logits
            seconds += self.pace.losses(sum(map(sum, mine)))
        lengths = [length for half in work.halves for batch in half for length in batch]
        of_all = texts_flops(work.model, self.matrices, lengths, kind=kind).total
        of_all += _described_flops(self._describing(self.shapes))
        total = flops.total + _described_flops((eigh, products))
        passes = sum(self.processes.part(len(half)) for half in work.halves)
        moved = self.moved.exchanged(len(work.halves) * self.factors) + self.moved.texts(passes)
        num_bytes = self.held + self.factors + max(passing, merging)
        return self._stage("curvature", num_bytes, total, seconds, of_all, moved)

    def _passing(self) -> float:
        """Bytes of the largest batch of texts in the pass; 0 without one."""
        tokens = max((max(lengths) * len(lengths) for half in self.work.halves for lengths in half), default=0)
        return SLACK * (self._kept(tokens, self.above, self.settings.dtype) + LOGIT_COPIES * self._logit_bytes(tokens))

    @property
    def _at_once(self) -> int:
        """Positions of texts that have their logits at a time (:mod:`crispedit.pieces`)."""
        return tokens_at_once(vocabulary(self.work.model), "cpu" if self.work.on_cpu else "")

    def _logit_bytes(self, tokens: int) -> int:
        """Float32 logits of a batch of texts, as many as there are at a time."""
        vocabulary_size = vocabulary(self.work.model)
        if not self.processes.shard:
            tokens = min(tokens, self._at_once)
        return 4 * vocabulary_size * tokens

    def _after(self, transient: float) -> float:
        """What tensors that come and go take in a later stage: at least what the pass over the texts left."""
        return max(transient, RETAINED * self._passing() if self.work.on_cpu else 0)

    def _sketched(self, size: int) -> bool:
        """Whether a factor of a size is described, or diagonalised, by a sketch."""
        return self.settings.kind == "sketch" or size > DESCRIBED_WHOLE

    def _describing(self, shapes: Sequence[Shape]) -> tuple[int, int]:
        """Of the description of both halves and their sum: n³ summed over diagonalisations, flops of products."""
        cubes, products = 0, 0
        for shape in shapes:
            if not self._sketched(max(shape)):
                cubes += 3 * sum(size**3 for size in shape)
                continue
            for size in shape:
                if self.settings.kind == "sketch":
                    cubes += 3 * 2 * sketch_rank(size) ** 3
                    products += 3 * (nystrom_flops(size) - 2 * eigh_flops(sketch_rank(size)))
                else:
                    ranks = [min(rank, size) for rank in described_ranks(shape)]
                    cubes += 3 * sum(rank**3 for rank in ranks)
                    products += 3 * sum(approximate_flops(size, rank) for rank in ranks)
        return cubes, products

    def _described_bytes(self, shape: Shape) -> tuple[int, int]:
        """The pairs that a matrix is described by, and what finding those of its widest factor takes beside them."""
        widest = max(shape)
        if self.settings.kind == "sketch":
            return factor_bytes([shape], "sketch"), EIGH_BYTES * sketch_rank(widest) ** 2
        if not self._sketched(widest):
            return factor_bytes([shape], "dense"), EIGH_BYTES * widest**2
        rank = described_ranks(shape)[-1]
        # beside the vectors: a basis, its images, what these are turned into, what is left over
        return sum(4 * n * min(rank, n) for n in shape), 4 * 4 * widest * rank + EIGH_BYTES * rank**2

    def _diagonalise(self) -> Stage:
        """The spectra that the subspaces take, matrix by matrix."""
        choices, dense = self.choices, self.settings.kind == "dense"
        working = max(choice.working_bytes for choice in choices)
        parts = self.processes.owned(choices, [sum(size**3 for size in shape) for shape in self.shapes])
        mine = max(parts, key=lambda part: sum(choice.total_flops for choice in part))
        cubes, products = sum(choice.cubes for choice in mine), sum(choice.flops for choice in mine)
        seconds = None
        if self.pace is not None:
            speed = self.pace.speed
            seconds = cubes * speed.eigh + products / (speed.float64 if dense else speed.float32)
        brought = 0 if self.resident else max(factor_bytes([shape], self.settings.kind) for shape in self.shapes)
        num_bytes = self.held + self.resident + self.spectra + self._after(working + brought)
        flops, of_all = (sum(choice.total_flops for choice in some) for some in (mine, choices))
        return self._stage("diagonalise", num_bytes, flops, seconds, of_all, self.moved.exchanged(self.spectra))

    def _step(self) -> StepFlops:
        """A step of mean size, of one process."""
        count, rules = len(self.sizes), sum(self._rule_flops(size.computed) for size in self.sizes)
        every = step_flops(self.work.model, self.matrices, self.sizes, replay=True, rule_flops=rules)
        return StepFlops(forward=every.forward // count, backward=every.backward // count, update=every.update // count)

    def _rule_flops(self, tokens: int) -> int:
        """Of the update rules in one step: every process turns its tokens, and the owner of a matrix its gradient."""
        turning = sum(choice.step_flops(tokens) for choice in self.choices if choice.turned)
        return turning + sum(choice.step_flops(tokens) for choice in self.own if not choice.turned)

    def _rule_flops_of_all(self) -> int:
        """Of the update rules in one step of mean size, of all processes."""
        tokens = sum(size.computed for size in self.sizes) // len(self.sizes)
        once = sum(choice.step_flops(tokens) for choice in self.choices if not choice.turned)
        return once + self.processes.size * sum(c.step_flops(tokens) for c in self.choices if c.turned)

    @property
    def _edited(self) -> int:
        """Bytes that the edited matrices take beside the model's: originals, and float32 in place of a lower dtype."""
        return 4 * self.entries

    @property
    def _rules(self) -> int:
        """Bytes of the bases in which all matrices are seen, and of the rules that a process trains by."""
        frames = sum(choice.frame_bytes for choice in self.choices)
        return frames + sum(choice.rule_bytes for choice in self.own)

    def _edit(self) -> Stage:
        """The loop: what came before the first matrix, recorded by every process; steps; within a budget, drift."""
        work, logit = self.work, 4 * vocabulary(self.work.model)
        # gradients of W; and of what this process trains the parameter's gradient, W without what the parameter stands
        # for, Adam's two moments, or, within a budget, a momentum and what is divided by the metric
        looping = 4 * (self.entries + 4 * self.own_entries + 3 * max(d_out * d_in for d_out, d_in in self.shapes))
        dtype = torch.bfloat16 if work.mixed else self.settings.dtype
        activations = max(
            self._kept(s.computed, self.above, dtype) + s.labels * LOGIT_COPIES * logit for s in self.sizes
        )
        if work.mixed and self.settings.dtype == torch.float32:  # autograd keeps the weights as they were cast
            activations += self.above * 2 * sum(p.numel() for p in decoder_blocks(work.model)[1][-1].parameters())
        # of a recorded batch what goes through a block; of the rows that are checked all logits
        recording = max(s.computed for s in work.recording()) * self.blocks[0].kept_bytes(self.settings.dtype)
        checked = self._checked_bytes([len(row.ids) for row in work.rows])
        metering = self._metering() if self.settings.method.budget else None
        transient = max(activations, recording, checked, metering.working_bytes if metering else 0)
        num_bytes = self.begun + looping + (0 if self.mapped else self.recorded)
        num_bytes += metering.kept_bytes if metering else 0
        alike_everywhere = recording_flops(work.model, self.matrices, work.recording())
        if self.settings.method.budget:
            alike_everywhere += self._needed_flops()
        passes = self.steps * (self.step.forward + self.step.backward)
        flops = alike_everywhere + passes + self.steps * self.step.update + (metering.flops if metering else 0)
        of_all = self.processes.size * alike_everywhere + passes * self.batch // self.processes.part(self.batch)
        of_all += self.steps * self._rule_flops_of_all()
        of_all += self.processes.size * metering.flops if metering else 0
        seconds = None
        if self.pace is not None:
            seconds = self.pace.recording(work.recording())
            # a few rows by the whole model, and again packed: what a replay is held against
            shown = spread(work.rows, checked_rows([len(row.ids) for row in work.rows]))
            targets = sum(row.num_targets for row in shown)
            seconds += 2 * self.pace.texts([len(row.ids) for row in shown], logits=targets)
            seconds += self.steps * sum(self._step_seconds(self.pace, size) for size in self.sizes) / len(self.sizes)
            seconds += metering.seconds if metering else 0.0
        # float32 gradients to the owners of matrices, which come from there, once more as the steps begin; what a
        # replay is held against
        moved = self.moved.exchanged(4 * (2 * self.steps + 1) * self.entries) + self.moved.steps(self.steps)
        moved += self.moved.recording(len(work.recording())) + self.moved.forward(1) + self.moved.replayed(1)
        if metering:
            moved += metering.moved + self.moved.texts(len(self._looked_at()))
        return self._stage("edit", num_bytes + self._after(SLACK * transient), flops, seconds, of_all, moved)

    def _metering(self) -> "_Metering":
        """What measuring drift takes while an edit keeps within a budget (:mod:`crispedit.drift_meter`).

        All texts are measured first, every so many epochs, and at the end; a sample of them after every epoch. Before,
        what lies below the first matrix is recorded, and what the base model says is remembered, and compared.
        """
        work, epochs = self.work, self.work.epochs
        every = [length for batch in work.held_out for length in batch]
        some = row_groups(work.model, [range(length) for length in every[:: max(1, len(every) // SAMPLE)]])
        sampled = [[len(row) for row in group] for group in some]
        parts = [self.processes.busiest(groups, self.processes.asking) for groups in (work.held_out, sampled)]
        whole, sample = ([_texts(lengths) for lengths in part] for part in parts)
        # a process that has all texts has those of the sample among them
        rows = [row for group in (whole if self.processes.asking == 1 else [*whole, *sample]) for row in group]
        recorded = [
            batch_size([rows[index] for index in group], None)
            for group in (recorded_together(work.model, rows, packed=False) if rows else [])
        ]
        flops, seconds = recording_flops(work.model, self.matrices, recorded), 0.0
        if self.pace is not None:
            seconds += self.pace.recording(recorded)
        remembered, moved = 0, self.moved.recording(len(recorded))
        for groups, times in ((whole, 2 + -(-epochs // WHOLE)), (sample, epochs)):
            sizes = [batch_size(group, None) for group in groups]
            remembered += sum(size.labels for size in sizes)
            head, given = head_flops(work.model), sum(rounded_up(size.positions) for size in sizes)
            blocks = step_flops(work.model, self.matrices, sizes, replay=True).forward - head * given
            # the head by pieces, at two positions more of each (pieces.py); when they are remembered three times
            logits = head * sum(size.labels for size in sizes)
            flops += (1 + times) * (blocks + 2 * (logits + 2 * head * len(sizes))) + logits
            if self.pace is not None:
                seconds += (1 + times) * sum(map(self.pace.metered, sizes))
            moved += self.moved.replayed((1 + times) * len(sizes))
        width = int(text_config(work.model).hidden_size)
        kept = recorded_bytes(work.model, self.matrices, sum(s.tokens for s in recorded), self.settings.dtype)
        kept += remembered * width * self.settings.dtype.itemsize
        largest = max((batch_size(group, None).computed for group in [*whole, *sample]), default=0)
        return _Metering(
            kept_bytes=0 if kept > MEMORY_SHARE * max(0, self.memory - self.begun) else kept,
            working_bytes=max(LOGIT_COPIES * self._logit_bytes(largest), self._checked_bytes(every) if every else 0),
            flops=flops,
            seconds=seconds,
            moved=moved,
        )

    def _checked_bytes(self, lengths: Sequence[int]) -> int:
        """Of the logits of rows that a replay is held against, all of them, and those at their targets."""
        return checked_rows(lengths) * max(lengths) * 2 * 4 * vocabulary(self.work.model)

    def _looked_at(self) -> list[BatchSize]:
        """The batches whose gradient says what the edits need (:func:`crispedit.budget.estimate_need`)."""
        rows = spread(self.work.rows, LOOKED_AT)
        return [batch_size(rows[first : first + 8], None) for first in range(0, len(rows), 8)]

    def _needed_flops(self) -> int:
        """Of that gradient."""
        found = step_flops(self.work.model, self.matrices, self._looked_at(), replay=False)
        return found.forward + found.backward

    def _step_seconds(self, pace: Pace, size: BatchSize) -> float:
        """Of one batch: what is done with tokens and gradients of the matrices is in float32."""
        return pace.step(size, self._rule_flops(size.computed) + 2 * self.entries * size.computed, self.own_entries)

    def _proof(self) -> Stage:
        """Answers before, after, and after rounding if there was any; losses before and after; drift on held-out texts.

        The model is asked from nothing once; later its answers and the targets are drafts, and most are decided.
        """
        work = self.work
        same = work.stored_dtype == self.settings.dtype == torch.float32
        later = 1 if same else 2
        per_token = cached_bytes(work.model, self.settings.dtype)
        cached = max((len(group) * (max(group) + MAX_NEW_TOKENS) for group in work.prompts), default=0) * per_token
        logits = self._logit_bytes(max((max(batch) * len(batch) for batch in work.held_out), default=0))
        drafted = DRAFT_TOKENS * vocabulary(work.model) * self.settings.dtype.itemsize
        d_out, d_in = max(self.shapes, key=lambda shape: shape[0] * shape[1])
        # a share outside a subspace, in float64: the change, what is outside, and both bases
        outside = 8 * 5 * d_out * d_in + 2 * max(choice.spectrum_bytes for choice in self.choices)
        held = self.held + self.resident + self.spectra + self._edited + self._changes(4)
        transient = max(SLACK * cached, LOGIT_COPIES * logits, outside, 3 * drafted)
        shown = [len(row.ids) for row in work.proof_rows]
        reading = [shown[i : i + 8] for i in range(0, len(shown), 8)]
        drafts = _in_batches([length + MAX_NEW_TOKENS for group in work.prompts for length in group])
        shared = (work.prompts, reading, drafts, work.held_out)
        asked, read, later_drafts, texts = (self.processes.busiest(some, self.processes.asking) for some in shared)
        seconds = None
        if self.pace is not None:
            others = 2 * sum(self.pace.texts(batch) for batch in (*texts, *read))
            others += later * sum(map(self.pace.texts, later_drafts))
            outside_flops = sum(choice.subspace.flops for choice in self.choices)
            compared = self.pace.losses(sum(map(sum, texts)))  # two losses, a divergence
            seconds = (1 + UNDECIDED) * self.pace.answers(asked) + others + compared
            seconds += outside_flops / self.pace.speed.float64
        flops = self._proof_flops(asked, [*texts, *read], later, later_drafts)
        of_all = self._proof_flops(work.prompts, [*work.held_out, *reading], later, drafts)
        of_all *= self.processes.size // self.processes.asking
        passes = int((1 + UNDECIDED) * len(asked) * MAX_NEW_TOKENS) + later * len(later_drafts)
        moved = self.moved.forward(passes + 2 * (len(texts) + len(read)))
        moved += self.moved.exchanged(4 * self.entries)  # all take the matrices of the first, before they are rounded
        return self._stage("proof", held + self._after(transient), flops, seconds, of_all, moved)

    def _proof_flops(
        self,
        asked: Sequence[Sequence[int]],
        read: Sequence[Sequence[int]],
        later: int,
        drafts: Sequence[Sequence[int]],
    ) -> int:
        """Of prompts that are answered, of texts that are read before and after, of drafts that are read later."""
        answers = sum(answer_flops(self.work.model, group, MAX_NEW_TOKENS) for group in asked)
        lengths = 2 * [n for batch in read for n in batch] + later * [n for batch in drafts for n in batch]
        return int((1 + UNDECIDED) * answers) + texts_flops(self.work.model, self.matrices, lengths).total

    def _changes(self, copies: int) -> int:
        """Bytes of changes and of the patch, which wait in main memory; float32 numbers for every entry."""
        return 4 * copies * self.entries if self.work.on_cpu else 0

    def _save(self) -> Stage:
        """The model in its stored dtype, written; read back into the CPU's memory, and both asked a few questions.

        One process does. A sharded model is put together in its main memory; of it, and of one whose blocks wait
        elsewhere, files are compared with the weights tensor by tensor, and no second model is asked.
        """
        work = self.work
        num_bytes = self.held + self.resident + self.spectra + self._changes(2)
        if self.settings.save == "delta":
            written = work.stored_dtype.itemsize * self.entries
            return self._stage("save", num_bytes + self._after(0), 0, written / WRITE_RATE)
        both_ways = self.stored / WRITE_RATE + self.stored / READ_RATE
        if self.processes.shard or self.processes.offload:
            read, moved = self.weights, self.moved.forward(1)
            if self.processes.offload:  # what waits on disk is read to be written
                read -= self.processes.weight_bytes(work.model, self.matrices, self.settings.dtype)
                moved = 0
            num_bytes += read if work.on_cpu else 0
            return self._stage("save", num_bytes + self._after(0), 0, both_ways, moved=moved)
        # rounded to another dtype the weights are copied once to be written, and again to be asked
        converted = max(self.stored, self.weights) if work.stored_dtype != self.settings.dtype else 0
        second = max(converted, self.weights) if work.on_cpu else converted
        asked = spread([length for group in work.prompts for length in group], CHECKED)
        seconds = both_ways
        if self.pace is not None:
            seconds += 2 * self.pace.answers([asked] if asked else [])
        flops = 2 * answer_flops(work.model, asked, MAX_NEW_TOKENS)
        # what is read has pages of its own: it does not go where freed memory was
        return self._stage("save", num_bytes + self._after(0) + second, flops, seconds)

    def _kept(self, tokens: int, blocks: int, dtype: torch.dtype) -> int:
        """Bytes that tokens take: what autograd keeps of the topmost blocks; what goes in and out of the matrices."""
        top = self.blocks[len(self.blocks) - blocks :] if blocks else ()
        width = sum(d_in + 2 * d_out for d_out, d_in in self.shapes)
        return tokens * (sum(block.kept_bytes(dtype) for block in top) + 4 * width)

    def _stage(
        self, name: str, num_bytes: float, flops: int, seconds: float | None, of_all: int | None = None, moved: int = 0
    ) -> Stage:
        """A stage; of work that one process does, those are the flops of all."""
        return Stage(
            name=name,
            num_bytes=int(num_bytes),
            flops=int(flops),
            flops_of_all=int(flops if of_all is None else of_all),
            moved=moved,
            seconds=seconds if self.pace else None,
        )

    def disk(self) -> dict[str, int]:
        """Bytes by file, temporary ones included."""
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


@dataclass(frozen=True, kw_only=True)
class _Metering:
    """What measuring drift takes during an edit: bytes that are kept, while it is measured, and that move; the rest."""

    kept_bytes: int
    working_bytes: int
    flops: int
    seconds: float
    moved: int


def _entries(choices: Sequence[Choice]) -> int:
    """Of matrices together."""
    return sum(choice.entries for choice in choices)


def _described_flops(cubes_and_products: tuple[int, int]) -> int:
    """Flops of diagonalisations, n³ summed, and of products."""
    cubes, products = cubes_and_products
    return products + eigh_flops(1) * cubes


def _in_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Prompts with their drafts as they are run together."""
    found: list[list[int]] = []
    for length in lengths:
        if not found or sum(found[-1]) + length > DRAFT_TOKENS:
            found.append([])
        found[-1].append(length)
    return found


def _texts(lengths: Sequence[int]) -> list[EditRow]:
    """Texts of such lengths as rows, of which every token but the first is a target."""
    return [EditRow((0,) * length, 1) for length in lengths]
