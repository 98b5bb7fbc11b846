"""MEND: a trained hypernetwork turns the gradient of an edit into the change that makes it.

    W' = W − α Σ_t g̃_t h̃_tᵀ,    [h̃_t; g̃_t] = network([h_t; g_t])

with h_t and g_t the input and the output gradient of W at every token of the edit, and one learned α per matrix
(:mod:`crispedit.editors._hypernetwork`). The network is trained beforehand, on other edits of the same model
(:mod:`crispedit.editors._meta`): with ``crispedit train-mend``, or else at the beginning of the edit.
("Fast Model Editing at Scale", Mitchell et al., arXiv 2110.11309.)

A network learns what updates of so many edits do to the model as it was. It is of no use for more edits at a time, nor
for another round: the model is not as it was any more.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from ..edits import Edit
from ..errors import ConfigError, NumericsError
from ..models import EditMatrix, decoder_blocks, edit_matrices
from ..progress import log
from ..training import mean_loss
from ._capture import capture
from ._hypernetwork import Hypernetwork
from ._meta import MetaSettings, lessons, load_hypernetwork, read_training, train_hypernetwork
from .base import EditorConfig, EditProblem, Presets, Round

LIMIT = 256
"""At most so many edits make one update, unless more are asked for."""
BLOCKS = 3
"""So many of the last blocks are edited."""
STEP = 0.13
"""α begins at this / d_in: a token's pseudo-gradient moves its own output by α ‖h̃‖² of its size, about α d_in."""


class Config(EditorConfig):
    """Settings of MEND; all but the first two are of the network's training.

    Args:
        network: A directory written by ``crispedit train-mend``; without it, a network is trained first.
        round_size: Edits whose changes are computed from the same weights and added up; ``auto`` is as many as the
            network was trained for, and 1 edits one after the other.
        rank: r of the network's layers; ``auto`` is an eighth of d_in + d_out, and 1920 at the most.
        step_size: Where every α begins; ``auto`` is :data:`STEP` / d_in.
        lr: Adam's learning rate for the network.
        step_size_lr: Adam's learning rate for α, in parts of where it begins.
        edit_weight: c_edit, of the edit loss.
        locality_weight: c_loc, of the divergence where answers must stay.
        clip: Norm at which the gradient of a step is clipped.
        steps: Of Adam; ``auto`` is 4000 train edits' worth and 120 at the least.
        edits_per_step: Train edits of a step; ``auto`` is 10, or those of an update.
        edits_per_update: How many make one update together; ``auto`` is all to be made, up to 256; for train-mend 1.
    """

    presets: ClassVar[Presets] = {
        "published": {
            "rank": 1920, "step_size": 1e-4, "lr": 1e-6, "step_size_lr": 1.0, "steps": 10_000, "round_size": 1,
            "edits_per_step": 10, "edits_per_update": 1, "eos": False,
        },
    }  # fmt: skip
    lowers_loss: ClassVar[bool] = False

    network: str | None = None
    round_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    rank: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    step_size: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    lr: Annotated[float, Field(gt=0)] = 1e-4
    step_size_lr: Annotated[float, Field(gt=0)] = 0.2
    edit_weight: Annotated[float, Field(gt=0)] = 0.1
    locality_weight: Annotated[float, Field(ge=0)] = 1.0
    clip: Annotated[float, Field(gt=0)] = 100.0
    steps: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    edits_per_step: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    edits_per_update: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"

    def matrices(self, model: Any, layers: Sequence[int] | None) -> tuple[EditMatrix, ...]:
        """The whole MLP of the last three blocks, or of those that are named or that the network was trained for."""
        if layers is None and self.network is not None:
            layers = read_training(Path(self.network))["layers"]
        if layers is None:
            count = len(decoder_blocks(model)[1])
            layers = range(max(0, count - BLOCKS), count)
        return edit_matrices(model, layers, ("gate", "up", "down"))

    def needs_train_edits(self) -> bool:
        """Unless there is a network."""
        return self.network is None

    def meta(self, matrices: Sequence[EditMatrix], seed: int, together: int = 1) -> MetaSettings:
        """The settings of a training.

        Args:
            matrices: What the network will edit.
            seed: Of everything drawn at random.
            together: The edits of an update, where that is ``auto``.

        Returns:
            Numbers for all that is ``auto``.
        """
        widest, narrowest = max(sum(m.shape) for m in matrices), min(m.shape[1] for m in matrices)
        together = together if self.edits_per_update == "auto" else self.edits_per_update
        per_step = max(10, together) if self.edits_per_step == "auto" else self.edits_per_step
        return MetaSettings(
            rank=max(1, min(1920, widest // 8)) if self.rank == "auto" else self.rank,
            step_size=STEP / narrowest if self.step_size == "auto" else self.step_size,
            lr=self.lr,
            step_size_lr=self.step_size_lr,
            edit_weight=self.edit_weight,
            locality_weight=self.locality_weight,
            clip=self.clip,
            steps=max(120, 4000 // per_step) if self.steps == "auto" else self.steps,
            edits_per_step=per_step,
            edits_per_update=together,
            seed=seed,
        )


def unseen(train_edits: Sequence[Edit], edits: Sequence[Edit]) -> list[Edit]:
    """The train edits whose prompt is not that of an edit to be made; what is left out is told.

    Args:
        train_edits: To learn from.
        edits: To be made.

    Returns:
        At least one.

    Raises:
        ConfigError: None is left.
    """
    taken = {edit.prompt for edit in edits}
    left = [edit for edit in train_edits if edit.prompt not in taken]
    if not left:
        raise ConfigError(
            "editor mend learns how to edit from other edits, and there are none: give --train-edits FILE, or --limit "
            "N, so that the rows beyond it are left to learn from, or --set network=DIR"
        )
    if len(left) < len(train_edits):
        log.info(
            "%d train edits have the prompt of an edit to be made; they are left out", len(train_edits) - len(left)
        )
    return left


def _network(problem: EditProblem, config: Config) -> tuple[Hypernetwork, dict[str, Any], int]:
    """The trained network, how it was trained, and for how many edits at a time."""
    if config.network is not None:
        network = load_hypernetwork(Path(config.network), problem.model, problem.matrices)
        record = read_training(Path(config.network))
        return network, record["training"], record["settings"]["edits_per_update"]
    train_edits = unseen(problem.train_edits, problem.edits)
    log.info(
        "mend trains its hypernetwork first, on %d other edits; 'crispedit train-mend' keeps one", len(train_edits)
    )
    taught = lessons(problem.model, problem.prompter, train_edits, problem.texts, problem.seed)
    wanted = min(len(problem.edits), LIMIT) if config.round_size == "auto" else config.round_size
    settings = config.meta(problem.matrices, problem.seed, together=min(wanted, max(1, len(taught) // 2)))
    meta = train_hypernetwork(problem.model, problem.matrices, taught, settings, progress=problem.progress)
    return meta.network, meta.report(), settings.edits_per_update


def edit(problem: EditProblem, config: Config) -> Iterator[Round]:
    """Trains or loads the network, then edits round by round.

    Args:
        problem: What is to be edited.
        config: Settings.

    Yields:
        One round after the other.

    Raises:
        ConfigError: There is neither a network nor an edit to learn from.
        NumericsError: The edit loss is not finite any more.
    """
    network, details, trained_for = _network(problem, config)
    size = trained_for if config.round_size == "auto" else config.round_size
    for number, chosen in enumerate(problem.rounds(size), 1):
        rows = [problem.rows[index] for index in chosen]
        captured = capture(problem.model, problem.matrices, rows, tokens="all")
        with torch.no_grad():
            for index, matrix in enumerate(problem.matrices):
                matrix.weight.add_(network.update(index, captured.factors[matrix.name]).delta())
        before, after = float(captured.losses.mean()), mean_loss(problem.model, rows)
        if after != after or after == float("inf"):
            raise NumericsError(f"the edit loss is {after} after round {number}; lower step_size, or make fewer edits")
        problem.progress("edit", chosen.stop, len(problem.edits))
        yield Round(
            num_edits=chosen.stop,
            details={"loss_before": before, "loss_after": after, **({"training": details} if number == 1 else {})},
        )
