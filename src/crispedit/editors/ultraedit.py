"""UltraEdit: one closed-form update per round, from inputs and gradients at the answers; nothing is trained.

With inputs h_t of a matrix W and output gradients v_t = ∂loss/∂(W h_t) at the T answer tokens of a round, rows of H, V:

    [ĥ; v̂] = ([h; v] − μ) / σ        μ, σ over all tokens so far of all matrices of W's shape, this round's included
    u_t = −lr ‖ĥ_t‖² v̂_t             rows of U
    ΔWᵀ = (HᵀH + λI)⁻¹ Hᵀ U          ridge regression of the wanted output shifts on the inputs

("UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models", Gu et al., arXiv 2505.14679.)

ΔW is linear in lr, and to first order so is what it does to the loss L of the round: L − lr S, with
S = −Σ_t ⟨v_t, ΔW h_t⟩ / lr summed over matrices. With lr ``auto`` it is ``strength`` × L / S. Shifts of size lr d_in
in so many matrices mean something else in every model; the share of the loss that they should take away does not.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import NumericsError
from ..models import EditMatrix, decoder_blocks, edit_matrices
from ..training import mean_loss
from ._capture import Captured, RunningMoments, TokenFactors, Tokens, capture
from .base import EditorConfig, EditProblem, Presets, Round

GATE_LAYERS, UP_LAYERS = (11, 16), (18, 25)
"""The blocks, from the first to before the last, whose gates and whose up-projections are edited of 32."""
_PUBLISHED = {"lr": 1e-6, "round_size": 100, "batch_size": 10, "reduction": "mean", "eos": False}


class Config(EditorConfig):
    """Settings of UltraEdit.

    Args:
        lr: Size of the wanted output shifts, or ``auto``: by ``strength``.
        strength: With lr ``auto``, how many times the loss of a round the shifts would take away to first order.
        round_size: Edits per closed form; they are taken in their order.
        batch_size: Edits per backward pass.
        ridge: λ.
        tokens: ``answer``: tokens whose next one is of the target; ``all``: prompts too.
        normaliser: ``kept`` over rounds, or new in each (``round``).
        reduction: v_t is the gradient of a row's loss (``sum``), or of the mean over a batch's targets (``mean``).
    """

    presets: ClassVar[Presets] = {
        "published": _PUBLISHED,
        # the port in EasyEdit, but for its labels, which ask for padding and for the prompt too
        "easyedit": {**_PUBLISHED, "normaliser": "round", "tokens": "all"},
    }
    lowers_loss: ClassVar[bool] = False

    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    strength: Annotated[float, Field(gt=0)] = 2.0
    round_size: Annotated[int, Field(ge=1)] = 1000
    batch_size: Annotated[int, Field(ge=1)] = 32
    ridge: Annotated[float, Field(gt=0)] = 1.0
    tokens: Tokens = "answer"
    normaliser: Literal["kept", "round"] = "kept"
    reduction: Literal["sum", "mean"] = "sum"

    def matrices(self, model: object, layers: Sequence[int] | None) -> tuple[EditMatrix, ...]:
        """Gates of some blocks and up-projections of others (:func:`default_parts`); both of blocks that are named."""
        if layers is not None:
            return edit_matrices(model, layers, ("gate", "up"))
        gates, ups = default_parts(len(decoder_blocks(model)[1]))
        found = (*edit_matrices(model, gates, ("gate",)), *edit_matrices(model, ups, ("up",)))
        each = {matrix.name: matrix for matrix in found}  # a family may keep both in one matrix
        return tuple(sorted(each.values(), key=lambda matrix: matrix.layer))


def default_parts(num_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The blocks whose gates, and those whose up-projections are edited unless the user names some.

    Gates 11–15 and up-projections 18–24 of 32 blocks, as published for LLaMA-3-8B; elsewhere the same shares of the
    depth, whole blocks: 2–3 and 4–6 of 8.

    Args:
        num_layers: L, the number of decoder blocks.

    Returns:
        Ascending indices of each, none of them empty.
    """

    def blocks(first: int, end: int) -> tuple[int, ...]:
        return tuple(range(first * num_layers // 32, -(-end * num_layers // 32)))

    return blocks(*GATE_LAYERS), blocks(*UP_LAYERS)


def ridge_regression(inputs: Tensor, outputs: Tensor, ridge: float) -> Tensor:
    """The matrix D that makes ‖H Dᵀ − U‖² + λ ‖D‖² smallest, by Cholesky's method in float64.

    Dᵀ = (HᵀH + λI)⁻¹ HᵀU = Hᵀ (HHᵀ + λI)⁻¹ U, whichever system is the smaller. HᵀH squares the condition of H: in
    float32 its small directions would drown.

    Args:
        inputs: H, (tokens, d_in).
        outputs: U, (tokens, d_out).
        ridge: λ, above 0.

    Returns:
        D, (d_out, d_in) float32.
    """
    H, U = inputs.double(), outputs.double()
    wide = H.shape[0] <= H.shape[1]
    system = H @ H.T if wide else H.T @ H
    system.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(system)
    solved = H.T @ torch.cholesky_solve(U, factor) if wide else torch.cholesky_solve(H.T @ U, factor)
    return solved.T.float().contiguous()


def direction(factors: TokenFactors, moments: RunningMoments, ridge: float) -> Tensor:
    """ΔW of a matrix at lr 1.

    Args:
        factors: Its inputs and output gradients in a round.
        moments: Of all matrices of its shape.
        ridge: λ.

    Returns:
        (d_out, d_in) float32.
    """
    normalised = moments.normalised(factors.joined).to(factors.joined.device)  # matrices of a shape may lie apart
    d_in = factors.inputs.shape[1]
    weights = normalised[:, :d_in].square().sum(1, keepdim=True)
    if not weights.any():  # all inputs so far are the same
        weights = torch.full_like(weights, d_in)
    return ridge_regression(factors.inputs, -weights * normalised[:, d_in:], ridge)


def edit(problem: EditProblem, config: Config) -> Iterator[Round]:
    """Edits round by round.

    Args:
        problem: What is to be edited.
        config: Settings.

    Yields:
        One round after the other.

    Raises:
        NumericsError: Gradients or the edit loss are not finite, or no lr would lower the loss.
    """
    moments: dict[tuple[int, int], RunningMoments] = {}
    for number, chosen in enumerate(problem.rounds(config.round_size), 1):
        if config.normaliser == "round":
            moments.clear()
        rows = [problem.rows[index] for index in chosen]
        captured = capture(
            problem.model,
            problem.matrices,
            rows,
            tokens=config.tokens,
            reduction=config.reduction,
            batch_size=config.batch_size,
            done=partial(_tell, problem, chosen.start),
        )
        for matrix in problem.matrices:
            joined = captured.factors[matrix.name].joined
            if not torch.isfinite(joined).all():
                raise NumericsError(
                    f"inputs or gradients of {matrix.name} are not finite in round {number}; lower --lr, or load the "
                    "model with --dtype float32"
                )
            of_shape = moments.setdefault(matrix.shape, RunningMoments(joined.shape[1], joined.device))
            of_shape.update(joined)
        directions = [direction(captured.factors[m.name], moments[m.shape], config.ridge) for m in problem.matrices]
        rate = _rate(problem.matrices, directions, captured, config) if config.lr == "auto" else config.lr
        for matrix, change in zip(problem.matrices, directions, strict=True):
            matrix.weight.add_(change, alpha=rate)
        before, after = float(captured.losses.mean()), mean_loss(problem.model, rows)
        if after != after or after == float("inf"):
            raise NumericsError(f"the edit loss is {after} after round {number}; lower --lr ({rate:g})")
        tokens = len(captured.factors[problem.matrices[0].name].inputs)
        yield Round(
            num_edits=chosen.stop,
            details={"lr": rate, "tokens": tokens, "loss_before": before, "loss_after": after},
        )


def _tell(problem: EditProblem, first: int, done: int) -> None:
    """Progress: gradients are nearly all of the work."""
    problem.progress("edit", first + done, len(problem.edits))


def _rate(matrices: Sequence[EditMatrix], directions: Sequence[Tensor], captured: Captured, config: Config) -> float:
    """``strength`` × L / S; see the top of this file.

    Raises:
        NumericsError: S is not positive.
    """
    fall = 0.0
    for matrix, change in zip(matrices, directions, strict=True):
        factors = captured.factors[matrix.name]
        fall -= float(((factors.inputs @ change.T) * factors.gradients).sum(dtype=torch.float64))
    if not fall > 0:
        raise NumericsError("the update of a round would not lower its edit loss at any rate; give --lr to make it")
    return config.strength * captured.total / fall
