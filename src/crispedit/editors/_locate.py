"""Locate-then-edit: value vectors for subjects, brought about by closed-form changes of down-projections.

For the edits of a round, with keys K_l (d_in, n) of layer l, the input of its down-projection at the subjects' last
tokens, and value vectors Z for the output of the last edited block, layer after layer l, of which m are left:

    R_l = (Z − H) / m,   H the block's output at the same tokens as the model is by now
    ΔW_l = argmin  ‖ΔW K_l − R_l‖² + ‖ΔW K_p‖² + μ tr(ΔW S⁻¹ ΔWᵀ)
         = [0 R_l] (μ I + K̄ᵀ S K̄)⁻¹ K̄ᵀ S,     K̄ = [K_p K_l]

K_p are the keys of earlier rounds. S says how freely a direction of keys may be used: the inverse of their second
moment (MEMIT), or a projector (AlphaEdit). This is the published R Kᵀ (μ S⁻¹ + K_p K_pᵀ + K Kᵀ)⁻¹ by the matrix
inversion lemma, with a system of as many equations as there are edits, not inputs. Keys are ½ of the bare prompt's and
½ of the mean over prompts in sampled contexts. (MEMIT, arXiv 2210.07229, section 4; AlphaEdit, arXiv 2410.02355.)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from ..curvature import Curvature
from ..errors import ModelError
from ..models import EditMatrix, decoder_blocks, edit_matrices
from ..training import Trace
from ._activations import at_last_tokens
from ._subjects import Asked, asked, sampled_contexts
from ._values import ValueConfig, Values, find_values
from .base import EditProblem, Round


class LocateConfig(ValueConfig):
    """Settings of value vectors, and of rounds.

    Args:
        round_size: Edits per round, taken in their order; all in one when none is given.
    """

    needs_subject: ClassVar[bool] = True
    lowers_loss: ClassVar[bool] = False

    round_size: Annotated[int, Field(ge=1)] | None = None

    def matrices(self, model: Any, layers: Sequence[int] | None) -> tuple[EditMatrix, ...]:
        """Down-projections; of :func:`recall_layers` unless layers are named."""
        return edit_matrices(model, recall_layers(len(decoder_blocks(model)[1])) if layers is None else layers)

    def needs_curvature(self) -> bool:
        """Its A: the second moment of keys."""
        return True


def recall_layers(num_layers: int) -> tuple[int, ...]:
    """The blocks in which subjects are looked up: five, the last at a quarter of the depth.

    It gives the published 4–8 for 32 blocks.

    Args:
        num_layers: Blocks of the model.

    Returns:
        Ascending indices, never empty.
    """
    last = num_layers // 4
    return tuple(range(max(0, last - 4), last + 1))


class Freedom(Protocol):
    """S of one matrix, and μ."""

    def times(self, keys: Tensor) -> Tensor:
        """S K of keys (d_in, n), float64."""

    def ridge(self, keys: Tensor) -> float:
        """μ for the keys of a round."""

    def details(self) -> dict[str, Any]:
        """What a user may want to know of it, JSON-ready."""


def edit_rounds(
    problem: EditProblem, config: LocateConfig, freedom_of: Callable[[Curvature, EditMatrix], Freedom], *, memory: bool
) -> Iterator[Round]:
    """Edits round by round.

    Args:
        problem: What is to be edited.
        config: Settings.
        freedom_of: Gives S of a matrix by the curvature; asked once for each.
        memory: Whether later rounds keep what keys of earlier ones give.

    Yields:
        One round after the other.
    """
    assert problem.curvature is not None
    model, matrices, curvature = problem.model, problem.matrices, problem.curvature
    layer = matrices[-1].layer
    contexts = sampled_contexts(model, problem.prompter, config.contexts, problem.seed)
    freedoms = {matrix.name: freedom_of(curvature, matrix) for matrix in matrices}
    earlier: dict[str, Tensor] = {}
    for chosen in problem.rounds(config.round_size):
        edits = asked(model, problem.prompter, [problem.edits[index] for index in chosen], contexts)
        scales = {matrix.name: _written_share(model, matrix, edits[0]) for matrix in matrices}
        values = find_values(model, layer, edits, config, problem.progress)
        bare = [edit.rows[0].until_subject for edit in edits]
        details: dict[str, Any] = {}
        for number, matrix in enumerate(matrices):
            keys = subject_keys(model, matrix, edits).T.double()
            missing = values.wanted - at_last_tokens(model, layer, bare).to(values.wanted)
            wanted = missing.T.double() / ((len(matrices) - number) * scales[matrix.name])
            freedom = freedoms[matrix.name]
            change = closed_form(keys, wanted.to(keys.device), freedom, earlier.get(matrix.name))
            matrix.weight.add_(change.to(matrix.weight))
            details[matrix.name] = {
                "fit": _ratio(change @ keys, wanted.to(keys.device)),
                "ridge": freedom.ridge(keys),
                **freedom.details(),
            }
            problem.progress("layers", number + 1, len(matrices))
        if memory and chosen.stop < len(problem.edits):
            for matrix in matrices:
                keys = subject_keys(model, matrix, edits).T.double()
                earlier[matrix.name] = _compressed(torch.cat([earlier.get(matrix.name, keys[:, :0]), keys], 1))
        left = values.wanted - at_last_tokens(model, layer, bare).to(values.wanted)
        yield Round(
            num_edits=chosen.stop,
            trace=_trace(values, config),
            details={
                "value_loss": float(values.losses[:, -1].mean()),
                "value_missed": _ratio(left, values.wanted - values.before),
                "matrices": details,
            },
        )


def subject_keys(model: Any, matrix: EditMatrix, edits: Sequence[Asked]) -> Tensor:
    """Keys of edits: ½ of the bare prompt's, ½ of the mean over the prompt in sampled contexts.

    Args:
        model: A causal LM.
        matrix: Whose inputs they are.
        edits: In all contexts.

    Returns:
        (edits, d_in) float32.
    """
    rows = [row.until_subject for edit in edits for row in edit.rows]
    every = at_last_tokens(model, matrix.layer, rows, matrix)
    keys = every.view(len(edits), -1, every.shape[1])
    return keys[:, 0] if keys.shape[1] == 1 else (keys[:, 0] + keys[:, 1:].mean(1)) / 2


def closed_form(keys: Tensor, wanted: Tensor, freedom: Freedom, earlier: Tensor | None = None) -> Tensor:
    """The change of a matrix that gives keys what is wanted; see the top of the module.

    Args:
        keys: K, (d_in, n) float64.
        wanted: R, (d_out, n) float64.
        freedom: S and μ.
        earlier: K_p, (d_in, m) float64.

    Returns:
        ΔW, (d_out, d_in) float64.
    """
    every = keys if earlier is None else torch.cat([earlier, keys], 1)
    free = freedom.times(every)
    system = every.T @ free
    system = (system + system.T) / 2
    ridge, largest = freedom.ridge(keys), float(system.diagonal().max())
    system.diagonal().add_(ridge)
    targets = torch.cat([wanted.new_zeros(len(wanted), every.shape[1] - keys.shape[1]), wanted], 1)
    if ridge > 10 * len(system) * torch.finfo(system.dtype).eps * largest:
        weights = torch.cholesky_solve(targets.T, torch.linalg.cholesky(system)).T
    else:  # next to no ridge: edits with keys that depend on each other leave the system singular
        weights = targets @ torch.linalg.pinv(system, hermitian=True)
    return weights @ free.T


def _compressed(keys: Tensor) -> Tensor:
    """As many keys as there are inputs, with the same K Kᵀ, where there are more."""
    d_in, count = keys.shape
    return keys if count <= d_in else torch.linalg.qr(keys.T, mode="r").R.T


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part.norm() / whole.norm().clamp_min(1e-30))


def _trace(values: Values, config: ValueConfig) -> Trace:
    """The search for value vectors as the history of a run: an epoch is a step of all edits."""
    below = values.losses < config.value_loss
    passes = min(config.steps, int((~below.all(0)).sum()) + 1)
    losses = values.losses.mean(0)[:passes].tolist()
    return Trace(
        epoch_losses=losses,
        rates=[float(values.rates.mean())] * passes,
        steps=passes - 1,
        stopped_early=bool(below[:, -1].all()),
    )


@torch.no_grad()
def _written_share(model: Any, matrix: EditMatrix, edit: Asked) -> float:
    """The factor with which a matrix's output is added to its block's: 1 in most families.

    Raises:
        ModelError: It is no factor: a norm follows, and no change of the matrix brings about a wanted sum.
    """
    row = edit.rows[0].until_subject
    outputs: list[Tensor] = []

    def push(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if not outputs:
            outputs.append(output)
            return output
        return output + output.roll(1, dims=-1) / 2

    handle = matrix.module.register_forward_hook(push)
    try:
        before, after = (at_last_tokens(model, matrix.layer, [row])[0] for _ in range(2))
    finally:
        handle.remove()
    pushed = outputs[0][0, -1].float().roll(1, dims=-1) / 2
    moved = after - before
    factor = float(moved @ pushed / (pushed @ pushed).clamp_min(1e-30))
    # in low precision a sum is rounded to the scale of the residual stream
    rounding = 4 * torch.finfo(model.dtype).eps * float(after.norm())
    if abs(factor) < 1e-3 or float((moved - factor * pushed).norm()) > 1e-3 * float(moved.norm()) + rounding:
        raise ModelError(
            f"what {matrix.name} puts out is not added to its block's output as it is (a norm follows it in "
            f"{type(model).__name__}): this editor cannot bring about a value there; use crispedit or ft"
        )
    return factor if abs(factor - 1) > 1e-2 else 1.0
