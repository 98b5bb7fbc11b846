"""The edit loop that every gradient editor shares: FT-M loss, skipping, early stop, the search for a rate.

What is trained, and how it is in the model, is the business of a trainee: matrices, each through its update rule
(:mod:`crispedit.updates`), or an adapter.

Several processes share the rows of every batch. Its loss, and the gradients of what is trained, are summed over them;
with the same sums each makes the same step, so that nothing else has to move, and what depends on a loss is decided
alike.
(CrispEdit, arXiv 2602.15823, Algorithm 1; FT-M: appendix E.)
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from . import distributed, ranks
from .adam import AdamMemory, adam
from .errors import NumericsError
from .forward import collate, target_logits
from .models import EditMatrix
from .ownership import owned, sum_at_owners, weights_of_owners
from .precision import Precision, mixed_precision
from .progress import Progress, no_progress
from .replay import RowLogits, Start, row_logits
from .rows import EditRow
from .updates import Elsewhere, UpdateRule

LOWEST, START, LIMIT = 0.25, 2.0, 16.0
"""The lowest learning rate that ``auto`` tries, the first and the highest, times d_in: a step of Adam moves an output
by about rate × d_in × mean |a|. The paper's 5e-4 at 8B is 7.2."""
TRIAL = 3
"""Epochs of a trial of a learning rate."""
ARRIVAL = 0.4
"""The share of the epochs in which the loss should fall to a tenth."""
WORTH = 1.3
"""Twice the learning rate must make the logarithm of the loss fall so many times as far, for the damage it does."""
STEPS_PER_EPOCH = 8
"""An epoch has at least so many steps where the rows suffice (:func:`rows_per_step`)."""
Reduction = Literal["token", "sample"]
"""What the loss is a mean over: all target tokens of a batch, or its rows, each the mean over its own."""
STOP_LOSS = 0.01
"""An epoch whose mean loss is below this is the last; a batch below it is skipped (paper, Table 2)."""


def edit_loss(model: Any, rows: Sequence[EditRow]) -> Tensor:
    """Mean cross-entropy over the target tokens of a batch of rows; prompt tokens carry none (FT-M).

    Args:
        model: A causal LM.
        rows: The batch.

    Returns:
        A scalar.
    """
    batch = collate(rows).to(model.get_input_embeddings().weight.device)
    logits = target_logits(model, batch)
    return nn.functional.cross_entropy(logits.float(), batch.labels.to(logits.device))


@torch.no_grad()
def mean_loss(model: Any, rows: Sequence[EditRow], batch_size: int = 8) -> float:
    """Mean cross-entropy over the target tokens of rows, nats per token: the edit loss, before or after."""
    total, tokens = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        count = sum(row.num_targets for row in batch)
        total += edit_loss(model, batch).item() * count
        tokens += count
    return total / tokens


class _Reading:
    """A number on its way from the device: it is waited for only when it is asked for.

    On a GPU the copy is queued behind what computes the number, and not behind what is queued after it.
    """

    def __init__(self, value: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        self.value = value.detach()
        if value.device.type == "cuda":
            self.value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(self.value, non_blocking=True)
            self.event = torch.cuda.current_stream(value.device).record_event()

    def get(self) -> float:
        """The number."""
        if self.event is not None:
            self.event.synchronize()
        return float(self.value)


def batches(lengths: Sequence[int], batch_size: int, rng: random.Random, *, alike: bool) -> list[list[int]]:
    """All rows in batches, in random order.

    Args:
        lengths: Of the rows.
        batch_size: Rows per batch; one batch may have fewer.
        rng: Shuffles rows and batches.
        alike: Whether rows of like length go together, so that little is padding. Batches are less varied then, and
            an edit generalizes a little less (docs/decisions.md): packed rows have no use for it.

    Returns:
        Indices of rows, each once.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    if alike:
        order.sort(key=lengths.__getitem__)  # stable: rows of one length stay shuffled
    found = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if alike:
        rng.shuffle(found)
    return found


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried, and the mean losses of its first epochs."""

    learning_rate: float
    epoch_losses: list[float]


@dataclass
class Trace:
    """What happened in a run of the loop.

    Args:
        epoch_losses: Mean loss of every epoch, each batch measured before its own update.
        rates: Learning rate of every epoch.
        steps: Updates made.
        stopped_early: Whether the loss fell below the bound.
        trials: Of learning rates, where one was looked for; the last one taken is that of the run.
        forward: From where steps were computed: ``start``, ``packed``, ``error``, ``num_bytes``, ``kept`` of
            :class:`crispedit.replay.RowLogits`, and whether in mixed ``precision``.
    """

    epoch_losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    steps: int = 0
    stopped_early: bool = False
    trials: list[Trial] = field(default_factory=list)
    forward: dict[str, Any] = field(default_factory=dict)


def rows_per_step(num_rows: int, at_most: int) -> int:
    """The batch size for a number of edits: ten in one batch would get no more than 25 steps in 25 epochs.

    Args:
        num_rows: Edits in all.
        at_most: The batch size for many edits.

    Returns:
        At least 1.
    """
    return min(at_most, max(1, num_rows // STEPS_PER_EPOCH))


def too_slow(losses: Sequence[float], epochs: int) -> bool:
    """Whether a loss that goes on falling as it did will miss a tenth of the first epoch's at two fifths of the epochs.

    Args:
        losses: Mean losses of the epochs so far, at least two.
        epochs: Passes over the rows, at most; two fifths of them are not over yet.
    """
    first, now = (max(loss, 1e-9) for loss in (losses[0], losses[-1]))  # a loss may be exactly 0
    fell = math.log(first / now) / (len(losses) - 1)
    return fell < math.log(10 * now / first) / (ARRIVAL * epochs - len(losses))


def progress_ratio(losses: Sequence[float], others: Sequence[float]) -> float:
    """How many times as far another learning rate brought the logarithm of the loss down in a trial.

    Args:
        losses: Mean losses of the epochs at one rate.
        others: Those at the other, from the same start and over the same batches.

    Returns:
        The ratio, counted from the first epoch of ``losses``; where those did not fall, infinity or 0.
    """
    first, one, other = (max(loss, 1e-9) for loss in (losses[0], losses[-1], others[-1]))
    fell, other_fell = math.log(first / one), math.log(first / other)
    if fell <= 0:
        return math.inf if other < one else 0.0
    return other_fell / fell


class Trainee(Protocol):
    """What the loop trains, and how it is in the model."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """What Adam trains: float32."""

    @property
    def weigh(self) -> Callable[[Tensor], Tensor] | None:
        """Gives what rows weigh in what is minimised, from the losses of their whole targets.

        If rows count alike, None. The reported loss is the mean, whatever rows count.
        """

    def differentiated(self) -> Sequence[Tensor]:
        """In what the loss is differentiated: tensors of the model's graph."""

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        """What trains the parameters, from where they are."""

    def learn(self, gradients: Sequence[Tensor]) -> None:
        """Gives the parameters their ``grad``, from this process's gradients in :meth:`differentiated`.

        They are summed over all processes.
        """

    def apply(self) -> None:
        """Writes what the parameters stand for into the model; called after every step, and at the start."""

    def reset(self) -> None:
        """Goes back to where it was in the beginning, the model's weights aside."""

    def after_epoch(self, low: bool) -> bool:
        """Called after every epoch with whether its loss was low enough; whether the run is over."""

    def penalty(self) -> Tensor | float:
        """What is added to the edit loss; losses are reported without it."""


class RuledMatrices:
    """Matrices of the model, each through its update rule; of several processes each trains its own.

    Args:
        matrices: What is edited, inside :func:`crispedit.precision.float32_masters`.
        rules: One per matrix; their parameters start at zero or go on from where they are. Those of matrices that
            other processes own (:mod:`crispedit.ownership`) are not used.
    """

    def __init__(self, matrices: Sequence[EditMatrix], rules: Sequence[UpdateRule]) -> None:
        self.matrices = matrices
        self.rules: Sequence[UpdateRule] = [
            rule if own else Elsewhere(matrix, rule.frame)
            for matrix, rule, own in zip(matrices, rules, owned(matrices), strict=True)
        ]
        self.parameters: Sequence[Tensor] = [rule.parameter for rule in self.rules]
        self._starts = [parameter.clone() if parameter.any() else None for parameter in self.parameters]
        # the matrices that are trained here without what the rules stand for
        self._own = [(m, rule) for m, rule in zip(matrices, self.rules, strict=True) if not isinstance(rule, Elsewhere)]
        self._originals = [matrix.weight - rule.delta() for matrix, rule in self._own]

    @property
    def weigh(self) -> Callable[[Tensor], Tensor] | None:
        """All rows count alike."""
        return None

    def differentiated(self) -> Sequence[Tensor]:
        """The matrices, as their modules have them."""
        return [matrix.parameter for matrix in self.matrices]

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        """Adam."""
        return adam(self.parameters, lr)

    def learn(self, gradients: Sequence[Tensor]) -> None:
        """Summed where the matrices are trained, and there through the rules."""
        summed = sum_at_owners(self.matrices, gradients)
        for matrix, rule, gradient in zip(self.matrices, self.rules, summed, strict=True):
            # contiguous: the fused Adam reads memory as it lies, whatever the strides say (torch 2.13)
            rule.parameter.grad = rule.gradient(matrix.as_weight(gradient)).contiguous()

    def apply(self) -> None:
        """W₀ + ΔW; after a step, what the rules do between steps comes first."""
        for (matrix, rule), original in zip(self._own, self._originals, strict=True):
            rule.stepped()
            torch.add(original, rule.delta(), out=matrix.weight)
        weights_of_owners(self.matrices)

    def reset(self) -> None:
        """The rules' parameters as they were."""
        for parameter, start in zip(self.parameters, self._starts, strict=True):
            if start is None:
                parameter.zero_()
            else:
                parameter.copy_(start)

    def after_epoch(self, low: bool) -> bool:
        """Once the loss is low."""
        return low

    def penalty(self) -> float:
        """None."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """What all runs over the same rows share."""

    logits: RowLogits
    mixed: bool
    alike: bool
    trainee: Trainee
    width: int
    """By what learning rates that are looked for are divided."""
    first: float = START
    """The first of them, times the width."""
    batch_size: int
    seed: int
    stop_loss: float
    reduction: Reduction
    memory: AdamMemory | None = None
    progress: Progress

    @property
    def rules(self) -> Sequence[UpdateRule]:
        """Of the trainee, whose optimizer is to go on in the next round."""
        assert isinstance(self.trainee, RuledMatrices)
        return self.trainee.rules

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.logits.rows) // self.batch_size)

    def loss(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over the target tokens of some rows, or over rows; of several processes, this one's part.

        The parts add up to the mean over the whole batch, whatever tokens each has. A process whose part of a small
        batch would be no row has one that does not count: all take part in the sums.

        Returns:
            The loss; and what is to be minimised, the same unless the trainee weighs rows.
        """
        mine = distributed.share(chosen) or chosen[:1]
        counted = float(ranks.rank() < len(chosen))
        with torch.autocast(self.logits.model.device.type, torch.bfloat16, enabled=self.mixed):
            logits, labels = self.logits(mine)
        counts = [self.logits.rows[index].num_targets for index in mine]
        tokens = sum(self.logits.rows[index].num_targets for index in chosen)
        weigh = self.trainee.weigh
        if self.reduction == "token" and weigh is None:
            if ranks.size() == 1:
                loss = nn.functional.cross_entropy(logits.float(), labels)
            else:
                loss = counted * nn.functional.cross_entropy(logits.float(), labels, reduction="sum") / tokens
            return loss, loss
        whole = loss_by_row(logits, labels, counts)
        if self.reduction == "sample":
            parts = counted * whole / torch.tensor(counts).to(whole.device, non_blocking=True) / len(chosen)
        else:
            parts = counted * whole / tokens
        loss = parts.sum()
        return (loss, loss) if weigh is None else (loss.detach(), (parts * weigh(whole.detach())).sum())


def loss_by_row(logits: Tensor, labels: Tensor, counts: Sequence[int]) -> Tensor:
    """Cross-entropy of the whole target of every row, nats.

    Args:
        logits: Of target tokens, row after row, (tokens, vocabulary).
        labels: The tokens, (tokens,).
        counts: Target tokens of every row.

    Returns:
        A sum for each row, (rows,).
    """
    losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    # a few sums and no indices: nothing is waited for on a GPU, and sums there are the same every time
    return torch.stack([part.sum() for part in torch.split(losses, list(counts))])


class _Run:
    """Adam over the rows, epoch by epoch, at a rate and from where the trainee began."""

    def __init__(self, loop: _Loop, rate: float) -> None:
        self.loop, self.rate, self.trace = loop, rate, Trace()
        loop.trainee.reset()
        loop.trainee.apply()
        self.optimizer = loop.trainee.optimizer(rate)
        if loop.memory is not None:
            loop.memory.recall(self.optimizer, loop.rules)
        self.rng = random.Random(loop.seed)

    def until(self, epochs: int, label: str, of: int, *, halve: bool = False) -> Trace:
        """Goes on until so many epochs are done in all, or the loss is low enough.

        Args:
            epochs: Of this run, those behind it included.
            label: Of the progress.
            of: Epochs that the progress counts to.
            halve: Whether the rate is halved after an epoch whose loss rose by more than 5 %.
        """
        losses = self.trace.epoch_losses
        while len(losses) < epochs and not self.trace.stopped_early:
            if halve and len(losses) > 1 and losses[-1] > 1.05 * losses[-2]:
                self.rate /= 2
                self.optimizer.param_groups[0]["lr"] = self.rate
            self.trace.rates.append(self.rate)
            losses.append(self._epoch(label, of))
            self.trace.stopped_early = self.loop.trainee.after_epoch(losses[-1] < self.loop.stop_loss)
        return self.trace

    def _epoch(self, label: str, of: int) -> float:
        """One pass over the rows; the mean loss."""
        loop, epoch = self.loop, len(self.trace.epoch_losses)
        lengths = [len(row.ids) for row in loop.logits.rows]
        total = 0.0
        for step, chosen in enumerate(batches(lengths, loop.batch_size, self.rng, alike=loop.alike)):
            total += self._step(chosen, f"epoch {epoch + 1}, step {step + 1}") * len(chosen)
            loop.progress(label, epoch * loop.steps_per_epoch + step + 1, of * loop.steps_per_epoch)
        return total / len(lengths)

    def _step(self, chosen: Sequence[int], where: str) -> float:
        """One batch: its loss before the update, which is left out where the loss is low already."""
        with ranks.sharing():  # a forward and a backward pass for each process
            return self._shared_step(chosen, where)

    def _shared_step(self, chosen: Sequence[int], where: str) -> float:
        loop = self.loop
        loss, objective = loop.loss(chosen)
        whole = loss.detach().clone()
        distributed.sum_tensors([whole])
        reading = _Reading(whole)
        if loss.device.type == "cpu" and reading.get() < loop.stop_loss:
            return reading.get()
        # elsewhere the backward pass is queued before the loss is known: nothing waits for it
        penalty = loop.trainee.penalty() / ranks.size()  # every process adds its part
        if isinstance(penalty, Tensor):
            penalty = penalty.to(loss.device)
        gradients = torch.autograd.grad(objective + penalty, loop.trainee.differentiated())
        value = reading.get()
        if not math.isfinite(value):
            raise NumericsError(f"the edit loss is {value} in {where}; lower --lr ({self.rate:g})")
        if value >= loop.stop_loss:
            loop.trainee.learn(gradients)
            self.optimizer.step()
            loop.trainee.apply()
            self.trace.steps += 1
        return value


def _at_found_rate(loop: _Loop, epochs: int) -> _Run:
    """The run at the rate that a short search finds; see :func:`train`."""
    first = loop.first / loop.width
    run = _Run(loop, first)
    if ARRIVAL * epochs <= TRIAL:
        run.until(epochs, "edit", epochs, halve=True)
        return run
    best = run.until(TRIAL, "edit", epochs)
    trials = [Trial(run.rate, list(best.epoch_losses))]
    for factor, worth in ((2.0, WORTH), (0.5, 1.0)):
        if best.rates[0] > first:
            break  # a higher rate was taken
        while not best.stopped_early and too_slow(best.epoch_losses, epochs):
            rate = factor * best.rates[0]
            if not LOWEST <= rate * loop.width <= LIMIT:
                break
            run = _Run(loop, rate)
            try:
                other = run.until(TRIAL, f"trial at lr {rate:.1e}", TRIAL)
            except NumericsError:
                other = run.trace
            trials.append(Trial(rate, list(other.epoch_losses)))
            done = len(other.epoch_losses) == TRIAL or other.stopped_early
            if not done or progress_ratio(best.epoch_losses, other.epoch_losses) < worth:
                break
            best = other
    if run.trace is not best:
        run = _Run(loop, best.rates[0])
    run.until(epochs, "edit", epochs, halve=True).trials = trials
    return run


def train(
    model: Any,
    matrices: Sequence[EditMatrix],
    trainee: Trainee,
    rows: Sequence[EditRow],
    *,
    lr: float | Literal["auto"],
    first: float = START,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    stop_loss: float = STOP_LOSS,
    reduction: Reduction = "token",
    start: Start = "matrix",
    precision: Precision = "auto",
    alike: bool | None = None,
    memory: AdamMemory | None = None,
    progress: Progress = no_progress,
) -> Trace:
    """Trains with Adam what is a part of the model's matrices.

    With ``lr`` "auto" the rate is ``first`` / d_in. If trials of :data:`TRIAL` epochs say that the loss falls
    too slowly to arrive (:func:`too_slow`), the rate is doubled as long as that makes the loss fall faster by
    :data:`WORTH`; or else halved as long as the loss falls as far. Later it is halved whenever the loss rises by
    more than 5 %. A rate that suits one model wrecks another; of two rates that arrive, the lower one damages
    less; and a model that learns the edits badly at any rate is not to be pushed. Measured in docs/decisions.md.

    Args:
        model: A causal LM.
        matrices: Those that change, in the order in which the model uses them, inside
            :func:`crispedit.precision.float32_masters`.
        trainee: What is trained.
        rows: The edits' rows.
        lr: Adam's learning rate, or ``auto``.
        first: The first rate that ``auto`` tries, times d_in.
        epochs: Passes over the rows, at most; trials that are not taken come on top.
        batch_size: Rows per step, of all processes together.
        seed: Of the order of rows, reshuffled every epoch.
        stop_loss: See :data:`STOP_LOSS`.
        reduction: See :data:`Reduction`.
        start: The most that is replayed (:mod:`crispedit.replay`).
        precision: See :func:`crispedit.precision.mixed_precision`.
        alike: Whether batches are of like length (:func:`batches`); where rows cannot be packed, when omitted.
        memory: What Adam knows from the last run, if it is to go on from there; it then knows this run too. The
            trainee is a :class:`RuledMatrices`.
        progress: Called after every step with steps done and the steps of all epochs.

    Returns:
        What happened, epoch by epoch.

    Raises:
        ConfigError: There is no such ``precision``, or moments of these rules cannot be carried over.
        NumericsError: A loss is not finite.
    """
    mixed = mixed_precision(precision, model.dtype, model.device)
    logits = row_logits(model, matrices, rows, start=start, together=True, progress=progress)
    loop = _Loop(
        logits=logits,
        mixed=mixed,
        alike=not logits.packed if alike is None else alike,
        trainee=trainee,
        width=max(matrix.shape[1] for matrix in matrices),
        first=first,
        batch_size=batch_size,
        seed=seed,
        stop_loss=stop_loss,
        reduction=reduction,
        memory=memory,
        progress=progress,
    )
    if lr == "auto":
        run = _at_found_rate(loop, epochs)
    else:
        run = _Run(loop, lr)
        run.until(epochs, "edit", epochs)
    if memory is not None:
        memory.keep(run.optimizer, loop.rules)
    trace = run.trace
    trace.forward = {**logits.report(), "precision": "bfloat16" if mixed else str(model.dtype).removeprefix("torch.")}
    return trace


def fine_tune(
    model: Any, matrices: Sequence[EditMatrix], rules: Sequence[UpdateRule], rows: Sequence[EditRow], **options: Any
) -> Trace:
    """Fine-tunes the matrices in place, each through its update rule; ``options`` are those of :func:`train`."""
    return train(model, matrices, RuledMatrices(matrices, rules), rows, **options)
