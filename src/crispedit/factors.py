"""K-FAC factors: a forward and a backward pass over token batches, two second moments per matrix.

Conventions, fixed here for the whole package. A linear map is y = W a. W is (d_out, d_in), a the
input of a token, g = ∂(loss of the sequence, summed over its tokens)/∂y at that token, and

    A = E[a aᵀ]  (d_in, d_in)        G = E[g gᵀ]  (d_out, d_out)

with both expectations over the tokens that have a next token to predict. Row-major curvature is
G ⊗ A; applied to a matrix X of W's shape it is X ↦ G X A. A mask has W's shape. ``Conv1D`` is
transposed in :mod:`crispedit.models` only. (CrispEdit, arXiv 2602.15823, section 3.3 and appendix A;
Martens & Grosse 2015.)

For softmax cross-entropy the Gauss–Newton Hessian is the Fisher information: the expectation over
labels *sampled from the model* (``fisher="mc"``). With the texts' own next tokens it is the empirical
Fisher (``fisher="empirical"``), a different matrix, and the one that the published code computes.

A pass over many texts takes long: it can leave its state in a file as it goes, and go on from there,
with the same result bit for bit. Several processes share the batches; each has sums and a state of its own, and the
sums are added up once, at the end.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import distributed, ranks
from .artifacts import write_tensors
from .errors import ArtifactError, NumericsError, check_choice
from .models import EditMatrix, frozen
from .moments import Kind, Moment, MomentSum, weighted_sum
from .pieces import HiddenStates, hidden_states
from .progress import Progress, log, no_progress
from .spectrum import Spectrum
from .texts import TokenBatch, next_tokens

Fisher = Literal["mc", "empirical"]
SAVE_SECONDS, SAVE_TIMES = 30.0, 20
"""A pass with a file saves its state after so many seconds; and after so many times what the last save took."""


def check_fisher(fisher: str) -> None:
    """Raises :class:`ConfigError` unless ``fisher`` is ``mc`` or ``empirical``."""
    check_choice("fisher", fisher, get_args(Fisher))


def check_kind(kind: str) -> None:
    """Raises :class:`ConfigError` unless ``kind`` is ``auto``, ``dense`` or ``sketch``."""
    check_choice("factors", kind, ("auto", *get_args(Kind)))


def dense_bytes(shapes: Sequence[tuple[int, int]]) -> int:
    """What dense factors of matrices of these shapes (d_out, d_in) take at the most.

    Float32 sums of all, and beside them the float64 diagonalisation of the widest: matrix, eigenvectors, workspace.
    """
    return sum(4 * (d_out**2 + d_in**2) for d_out, d_in in shapes) + 24 * max(max(shape) for shape in shapes) ** 2


def choose_kind(shapes: Sequence[tuple[int, int]], free_bytes: int) -> Kind:
    """The memory rule: dense factors if they take no more than half of the free memory, else sketches."""
    return "dense" if dense_bytes(shapes) <= free_bytes / 2 else "sketch"


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Both Kronecker factors of one matrix, as means over ``num_tokens`` tokens.

    Args:
        A: Input second moment, (d_in, d_in) float32, or a sketch of it.
        G: Output-gradient second moment, (d_out, d_out) float32, or a sketch of it.
        num_tokens: How many tokens were averaged.
    """

    A: Moment
    G: Moment
    num_tokens: int

    @property
    def dense(self) -> tuple[Tensor, Tensor] | None:
        """A and G where both are dense."""
        return (self.A, self.G) if isinstance(self.A, Tensor) and isinstance(self.G, Tensor) else None

    def to(self, device: torch.device) -> "Factors":
        """The factors on another device."""
        return replace(self, A=self.A.to(device), G=self.G.to(device))


class FactorSums:
    """Sums of a aᵀ and g gᵀ over tokens, streamed; divided only at the end. Pure tensors.

    Args:
        shape: (d_out, d_in) of the matrix.
        device: Where the float32 sums live.
        kind: ``dense`` or ``sketch``.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device, kind: Kind = "dense") -> None:
        d_out, d_in = shape
        self.A, self.G = MomentSum(d_in, kind, device), MomentSum(d_out, kind, device)
        self.num_tokens = 0

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds tokens: ``inputs`` (tokens, d_in) and ``gradients`` (tokens, d_out)."""
        self.A.add(inputs)
        self.G.add(gradients)
        self.num_tokens += len(inputs)

    def state(self) -> dict[str, Tensor]:
        """The tensors from which the sums go on, the count of tokens aside."""
        sides = {"A": self.A, "G": self.G}
        return {f"{side}/{part}": tensor for side, moment in sides.items() for part, tensor in moment.state().items()}

    def add_up(self) -> None:
        """Adds the sums of all processes, in place; each of them calls it once, when its own are complete."""
        tokens = torch.tensor(self.num_tokens)
        distributed.sum_tensors([*self.state().values(), tokens])
        self.num_tokens = int(tokens)

    def mean(self) -> Factors:
        """The factors."""
        return Factors(A=self.A.mean(self.num_tokens), G=self.G.mean(self.num_tokens), num_tokens=self.num_tokens)


@contextmanager
def recorded(matrices: Sequence[EditMatrix]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within, every forward pass leaves input and output of each matrix's module, by name."""
    records: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # below the first edited matrix nothing is differentiated
                output = output.detach().requires_grad_()
            records[name] = (arguments[0].detach(), output)
            return output.clone()  # a later in-place addition must not reach what was recorded

        return hook

    handles = [matrix.module.register_forward_hook(hook_for(matrix.name)) for matrix in matrices]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _passes(
    model: Any,
    matrices: Sequence[EditMatrix],
    batches: Sequence[TokenBatch],
    fisher: Fisher,
    seed: int,
    first: int = 0,
) -> Iterator[tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]:
    """A forward and a backward pass per batch, down to the matrices' outputs.

    Of several processes each passes over its share. Labels are the same whoever samples them, and wherever a pass
    begins: every token has a random number of its own, drawn before the first batch.

    Args:
        model: A causal LM.
        matrices: The matrices of interest.
        batches: All of them.
        fisher: How labels come about.
        seed: Of sampled labels.
        first: How many of this process's batches are behind it.

    Yields:
        Which positions predict a token, (rows, length) bool; and per matrix name the inputs (rows, length, d_in) and
        the gradients at the outputs (rows, length, d_out) of the loss, summed over a sequence's tokens.

    Raises:
        NumericsError: The loss is not finite.
    """
    device = model.get_input_embeddings().weight.device
    draws = _draws(batches, seed) if fisher == "mc" else ()
    with frozen(model), recorded(matrices) as records, torch.enable_grad():
        mine = distributed.share(range(len(batches)))
        passes = [(number, True) for number in mine[first:]]
        if ranks.in_step():  # as many for every process: those of a sharded model run together
            passes += [(0, False)] * (max(distributed.gather(len(passes))) - len(passes))
        for number, counted in passes:
            batch = batches[number].to(device)
            labels = next_tokens(batch)
            predicted = labels != -100
            hidden = hidden_states(model, batch).at(predicted)
            uniform = draws[number] if fisher == "mc" else None
            loss, pulled = _pulled(hidden, labels[predicted].to(hidden.states.device), uniform)
            gradients = torch.autograd.grad(hidden.states, [records[m.name][1] for m in matrices], pulled)
            found = {m.name: (records[m.name][0], g) for m, g in zip(matrices, gradients, strict=True)}
            records.clear()
            if not torch.isfinite(loss):
                layers = ", ".join(str(m.layer) for m in matrices)
                raise NumericsError(f"the capability loss of batch {number + 1} is not finite (layers {layers})")
            if counted:
                yield predicted, found


def _pulled(hidden: HiddenStates, labels: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of tokens, summed, and its gradient in their hidden states; a few tokens at a time.

    Args:
        hidden: (tokens, width).
        labels: (tokens,).
        uniform: Numbers by which labels are sampled in place of these, if they are.
    """
    pulled = torch.empty_like(hidden.states)
    loss = torch.zeros((), device=labels.device)
    for piece in hidden.pieces():
        part = hidden.states[piece]
        logits = hidden.head(part).float()
        wanted = labels[piece].to(logits.device) if uniform is None else sampled(logits.detach(), uniform[piece])
        of_part = nn.functional.cross_entropy(logits, wanted, reduction="sum")
        (pulled[piece],) = torch.autograd.grad(of_part, part)
        loss += of_part.detach().to(loss.device)
    return loss, pulled


class _State:
    """Where a pass is: the sums so far, and the batches behind it."""

    def __init__(self, matrices: Sequence[EditMatrix], kind: Kind) -> None:
        self.sums = {m.name: FactorSums(m.shape, m.parameter.device, kind) for m in matrices}
        self.done = 0
        self.whole = True

    def add(self, predicted: Tensor, found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Adds what one batch gave."""
        self.whole = False  # an interruption in here leaves a batch that only some matrices have
        for name, (inputs, gradients) in found.items():
            counted = predicted.to(gradients.device)
            self.sums[name].add(inputs[counted], gradients[counted])
        self.done += 1
        self.whole = True

    def save(self, path: Path, key: str) -> None:
        """Writes the state to a temporary name and renames it: a kill leaves the one before.

        Raises:
            ArtifactError: It cannot be written.
        """
        tensors = {f"{name}/{part}": t.cpu() for name, sums in self.sums.items() for part, t in sums.state().items()}
        tokens = next(iter(self.sums.values())).num_tokens
        about = {"key": key, "done": str(self.done), "tokens": str(tokens)}
        write_tensors(path, tensors, about, "the state of the curvature pass")

    def try_to_save(self, path: Path, key: str) -> bool:
        """As :meth:`save`; where it cannot be written, the pass is none the worse for it."""
        try:
            self.save(path, key)
        except ArtifactError as error:
            log.info("%s; the pass goes on", error)
            return False
        return True

    def restore(self, path: Path, key: str) -> bool:
        """Goes back to what :meth:`save` wrote for the same pass; ``False`` where there is no such file."""
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("key") != key:
                    return False
                tokens, done = int(about["tokens"]), int(about["done"])
                parts = {f"{name}/{part}": t for name, sums in self.sums.items() for part, t in sums.state().items()}
                if any(file.get_slice(key).get_shape() != list(tensor.shape) for key, tensor in parts.items()):
                    return False
                for name, tensor in parts.items():  # nothing can be missing now
                    tensor.copy_(file.get_tensor(name))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
            return False  # damaged, or none: begin again
        for sums in self.sums.values():
            sums.num_tokens = tokens
        self.done = done
        return True


def estimate_factors(
    model: Any,
    matrices: Sequence[EditMatrix],
    batches: Sequence[TokenBatch],
    *,
    fisher: Fisher = "mc",
    seed: int = 0,
    kind: Kind = "dense",
    resume: Path | None = None,
    key: str = "",
    every: float | None = None,
    progress: Progress = no_progress,
) -> dict[str, Factors]:
    """The factors of token batches: :func:`sum_factors`, added up over all processes and divided.

    Args:
        model: See :func:`sum_factors`, like all others.
        matrices: See there.
        batches: See there.
        fisher: See there.
        seed: See there.
        kind: See there.
        resume: See there.
        key: See there.
        every: See there.
        progress: See there.

    Returns:
        Factors by matrix name, on the matrices' devices.

    Raises:
        NumericsError: An activation or a gradient is not finite.
    """
    options: dict[str, Any] = {"resume": resume, "key": key, "every": every, "progress": progress}
    sums = sum_factors(model, matrices, batches, fisher=fisher, seed=seed, kind=kind, **options)
    return {name: factors_of(name, sums.pop(name)) for name in list(sums)}


def sum_factors(
    model: Any,
    matrices: Sequence[EditMatrix],
    batches: Sequence[TokenBatch],
    *,
    fisher: Fisher = "mc",
    seed: int = 0,
    kind: Kind = "dense",
    resume: Path | None = None,
    key: str = "",
    every: float | None = None,
    progress: Progress = no_progress,
) -> dict[str, FactorSums]:
    """One pass over token batches: forward, backward to the matrices' outputs, two outer products each.

    Padding under the mask and every row's last token, which predicts nothing, are left out, so the
    factors do not depend on how rows were put together. Only the outputs of the matrices are
    differentiated; no parameter gets a gradient.

    Args:
        model: A causal LM.
        matrices: The matrices of interest.
        batches: Right-padded token rows.
        fisher: Labels sampled from the model (``mc``) or the texts' own (``empirical``).
        seed: Of the sampled labels.
        kind: ``dense`` factors, or a ``sketch`` of each.
        resume: A file for the state of the pass. If it holds that of the same pass, the pass goes on from there,
            and ends with the same factors bit for bit as one that was never interrupted (same machine, same number
            of threads). Whoever called removes it.
        key: Says which pass it is: everything that its result depends on.
        every: Seconds between saves, :data:`SAVE_SECONDS` when omitted; infinity saves the end only.
        progress: Called after every batch.

    Returns:
        Sums by matrix name, on the matrices' devices: of several processes, over this one's share of the batches.

    Raises:
        ArtifactError: The state cannot be written.
        KeyboardInterrupt: As it came, after the state was saved.
        NumericsError: An activation or a gradient is not finite.
    """
    state, total = _State(matrices, kind), len(distributed.share(batches))
    if resume is not None and ranks.size() > 1:  # its own state: with other processes it would be of other batches
        resume, key = own_state(resume), f"{key} {ranks.rank()} of {ranks.size()}"
    restored = resume is not None and state.restore(resume, key)
    finished = restored and state.done == total
    if restored and not finished:
        log.info("an interrupted pass goes on after batch %d of %d", state.done, total)
    every = SAVE_SECONDS if every is None else every
    saved, pause = time.monotonic(), every
    try:
        for predicted, found in _passes(model, matrices, batches, fisher, seed, state.done):
            state.add(predicted, found)
            progress("curvature", state.done, total)
            if resume is not None and state.done < total and time.monotonic() - saved >= pause:
                started = time.monotonic()
                state.try_to_save(resume, key)
                saved = time.monotonic()
                pause = max(every, SAVE_TIMES * (saved - started))
    except KeyboardInterrupt:
        if resume is not None and state.whole and every < math.inf and state.try_to_save(resume, key):
            log.info("interrupted after batch %d of %d; the same command goes on from there", state.done, total)
        raise
    if resume is not None and not finished:
        state.save(resume, key)
    return state.sums


def own_state(path: Path) -> Path:
    """Where a process keeps its state of a pass, of which ``path`` is that of a process alone."""
    if ranks.size() == 1:
        return path
    return path.with_name(f"{path.stem}.{ranks.rank()}-of-{ranks.size()}{path.suffix}")


def saved_sums(path: Path, opened: Any, matrix: EditMatrix) -> FactorSums:
    """The sums of one matrix from the file of a finished pass; the others stay on disk.

    Args:
        path: Where the state is (:func:`own_state`).
        opened: The same, opened by ``safetensors.safe_open`` when the pass was finished: it can be read even when
            another process that did the same pass has removed the file. What is read from it stays mapped, and counts
            as memory, until it is closed; so it is read only then.
        matrix: The matrix.

    Returns:
        The sums, on the device of the matrix.
    """
    try:
        with safe_open(path, "pt") as file:
            return _read_sums(file, matrix)
    except OSError:
        return _read_sums(opened, matrix)


def _read_sums(file: Any, matrix: EditMatrix) -> FactorSums:
    shapes = [file.get_slice(f"{matrix.name}/{side}/total").get_shape() for side in "AG"]
    dense = all(rows == columns for rows, columns in shapes)
    found = FactorSums(matrix.shape, matrix.parameter.device, "dense" if dense else "sketch")
    for part, tensor in found.state().items():
        tensor.copy_(file.get_tensor(f"{matrix.name}/{part}"))
    found.num_tokens = int(file.metadata()["tokens"])
    return found


def factors_of(name: str, sums: FactorSums) -> Factors:
    """The factors of complete sums, added up over all processes.

    Args:
        name: Of the matrix.
        sums: Of this process.

    Returns:
        The factors, the same everywhere.

    Raises:
        NumericsError: A number is not finite.
    """
    sums.add_up()
    factors = sums.mean()
    for moment in (factors.A, factors.G):
        # |A_ij| is at most the larger of A_ii and A_jj: the diagonal of a dense factor tells
        if not torch.isfinite(moment.diagonal() if isinstance(moment, Tensor) else moment.product).all():
            raise NumericsError(f"the curvature factors of {name} are not finite; load the model with --dtype float32")
    return factors


def estimate_second_moments(
    model: Any,
    matrices: Sequence[EditMatrix],
    batches: Sequence[TokenBatch],
    spectra: Mapping[str, Spectrum],
    *,
    fisher: Fisher = "mc",
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information in the Kronecker eigenbasis, measured: EK-FAC (George et al. 2018).

    ∇W is the gradient of one sequence's loss, summed over its tokens, so that what tokens of a sequence have in
    common counts, which K-FAC leaves out.

    Args:
        model: A causal LM.
        matrices: The matrices of interest.
        batches: Right-padded token rows.
        spectra: By matrix name; complete.
        fisher: See :func:`estimate_factors`, like the next two.
        seed: See there.
        progress: See there.

    Returns:
        By matrix name, (d_out, d_in) float32: E[(U_Gᵀ ∇W U_A)²_ij], divided by tokens as the factors are.
    """
    bases = {m.name: spectra[m.name].to(m.parameter.device) for m in matrices}
    sums = {m.name: torch.zeros(m.shape, device=m.parameter.device) for m in matrices}
    num_tokens = torch.tensor(0)
    for number, (predicted, found) in enumerate(_passes(model, matrices, batches, fisher, seed)):
        num_tokens += int(predicted.sum())
        for name, (inputs, gradients) in found.items():
            counted = predicted.to(gradients.device)
            for row, of_row in enumerate(counted):
                a = inputs[row][of_row].float() @ bases[name].input_basis
                g = gradients[row][of_row].float() @ bases[name].output_basis
                sums[name] += (g.T @ a).square()
        progress("second moments", number + 1, len(distributed.share(batches)))
    distributed.sum_tensors([*sums.values(), num_tokens])
    return {name: total / num_tokens for name, total in sums.items()}


def _draws(batches: Sequence[TokenBatch], seed: int) -> tuple[Tensor, ...]:
    """A uniform number for every token of every batch that is a label (:func:`crispedit.texts.next_tokens`)."""
    counts = [int(batch.mask[:, 1:].sum()) for batch in batches]
    return torch.split(torch.rand(sum(counts), generator=torch.Generator().manual_seed(seed)), counts)


def sampled(logits: Tensor, uniform: Tensor) -> Tensor:
    """One label per position from softmax(logits), by the inverse of its distribution function.

    A random number per position is enough for that, whatever the vocabulary: the CPU draws those of all texts, the same
    for every device and every process, in no time. Gumbel's trick takes one per logit.

    Args:
        logits: (positions, vocabulary) float32.
        uniform: (positions,) float32 in [0, 1), on any device.

    Returns:
        (positions,) int64: the first label whose probability and that of all before it exceed ``uniform``.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]  # 1 but for rounding
    sought = uniform.to(logits.device)[:, None] * total
    below = total.nextafter(torch.zeros_like(total))  # at the total itself there may be labels without a share
    found = torch.searchsorted(cumulative, torch.minimum(sought, below), right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)  # of logits that are not numbers too: the loss will say so


def merge_factors(factors: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """Factors over several corpora, weighted by their token counts (CrispEdit, Algorithm 2).

    Args:
        factors: At least one, of equal shapes.
        weights: In place of the token counts.

    Returns:
        A = Σ w_k A_k / Σ w_k, and G likewise; sketched where one of them is.
    """
    tokens = [f.num_tokens for f in factors]
    raw = tokens if weights is None else weights
    shares = [weight / sum(raw) for weight in raw]
    return Factors(
        A=weighted_sum([f.A for f in factors], shares),
        G=weighted_sum([f.G for f in factors], shares),
        num_tokens=sum(tokens),
    )
