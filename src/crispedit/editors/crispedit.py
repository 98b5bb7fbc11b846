"""CrispEdit, batch: fine-tuning in the low-curvature subspace of the capability loss.

Paper: arXiv 2602.15823, Algorithm 1. Every edited matrix is W = W₀ + U_G (M ⊙ Z) U_Aᵀ, and Adam trains
the coordinates Z, so that the applied update never leaves the subspace; what is too wide for that goes by another
rule that does not leave it either. With ``energy`` 0 there is no
subspace to keep to, and this is plain fine-tuning: Adam on W itself.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ..curvature import Constraint
from ..errors import ConfigError
from ..replay import Start
from ..rotation import rotated
from ..training import STOP_LOSS, Precision, fine_tune, rows_per_step
from ..updates import ROTATION, Unconstrained, Update, UpdateRule, update_rule
from .base import EditorConfig, EditProblem, Round


class Config(EditorConfig):
    """Settings of CrispEdit.

    Args:
        energy: γ, the share of the curvature that the excluded directions hold; 0 is plain fine-tuning.
        lr: Adam's learning rate, or ``auto``.
        epochs: Passes over the edits, at most.
        batch_size: Edits per step, at most, and never more than an eighth of the edits.
        stop_loss: The mean loss of an epoch that ends the edit.
        constraint: Which directions are left out; see :meth:`crispedit.curvature.Curvature.subspace`.
        update: How a gradient becomes a change of the weights; see :mod:`crispedit.updates`. ``auto`` is the best
            rule that is known to cost little, by counting (:func:`crispedit.updates.chosen_update`).
        rotation: What the bases of update ``leading`` may cost; see :func:`crispedit.updates.leading_counts`.
        replay: From where every step is computed at the most; see :mod:`crispedit.replay`.
        precision: ``bfloat16`` computes steps in mixed precision around float32 masters, ``float32`` in the model's
            dtype; see :func:`crispedit.training.mixed_precision`.
    """

    energy: Annotated[float, Field(ge=0, lt=1)] = 0.9
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    epochs: Annotated[int, Field(ge=1)] = 25
    batch_size: Annotated[int, Field(ge=1)] = 32
    stop_loss: Annotated[float, Field(ge=0)] = STOP_LOSS
    constraint: Constraint | Literal["auto"] = "auto"
    update: Update | Literal["auto"] = "auto"
    rotation: Annotated[float, Field(ge=0)] = ROTATION
    replay: Start = "matrix"
    precision: Precision = "auto"


def edit(problem: EditProblem, config: Config) -> Iterator[Round]:
    """Edits in one round.

    Args:
        problem: What is to be edited.
        config: Settings.

    Yields:
        One round.

    Raises:
        ConfigError: ``energy`` is above 0 and the problem has no curvature.
    """
    rules: list[UpdateRule] = []
    for matrix in problem.matrices:
        device = matrix.parameter.device
        if config.energy == 0:
            rules.append(Unconstrained(matrix.shape, device))
        elif problem.curvature is None:
            raise ConfigError("an energy above 0 needs a curvature: give --curvature or --texts")
        else:
            subspace = problem.curvature.subspace(matrix.name, config.energy, config.constraint)
            rules.append(update_rule(config.update, subspace.to(device), config.rotation))
    with rotated(problem.matrices, [rule.frame for rule in rules]):
        trace = fine_tune(
            problem.model,
            problem.matrices,
            rules,
            problem.rows,
            lr=config.lr,
            epochs=config.epochs,
            batch_size=rows_per_step(len(problem.rows), config.batch_size),
            seed=problem.seed,
            stop_loss=config.stop_loss,
            start=config.replay,
            precision=config.precision,
            progress=problem.progress,
        )
    yield Round(num_edits=len(problem.rows), trace=trace)
