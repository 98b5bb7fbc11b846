"""CrispEdit, batch: fine-tuning in the low-curvature subspace of the capability loss.

    A = E[a aᵀ] = U_A diag(α) U_Aᵀ,   G = E[g gᵀ] = U_G diag(β) U_Gᵀ
    W = W₀ + U_G (M ⊙ Z) U_Aᵀ,   M zero at the pairs of largest β_i α_j, which hold γ of their sum

Adam trains the coordinates Z, so that the applied update never leaves the subspace; what is too wide for that goes by
another rule that does not leave it either. With ``energy`` 0 there is no subspace to keep to, and this is plain
fine-tuning: Adam on W itself. (CrispEdit, arXiv 2602.15823, Algorithm 1.)
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ..curvature import Constraint, Curvature
from ..errors import ConfigError
from ..models import EditMatrix
from ..subspace import Subspace
from ..updates import ROTATION, Update, UpdateRule, update_rule
from ._gradient import PUBLISHED, RuledConfig, train_rules, unconstrained
from .base import EditProblem, Presets, Round


class Config(RuledConfig):
    """Settings of CrispEdit: those of the loop, and of the subspace.

    Args:
        energy: γ, the share of the curvature that the excluded directions hold; 0 is plain fine-tuning.
        constraint: Which directions are left out; see :meth:`crispedit.curvature.Curvature.subspace`.
        update: How a gradient becomes a change of the weights; see :mod:`crispedit.updates`. ``auto`` is the best
            rule that is known to cost little, by counting (:func:`crispedit.updates.chosen_update`).
        rotation: What the bases of update ``leading`` may cost; see :func:`crispedit.updates.leading_counts`.
    """

    presets: ClassVar[Presets] = {"published": {**PUBLISHED, "constraint": "staircase", "update": "projected-gradient"}}

    energy: Annotated[float, Field(ge=0, lt=1)] = 0.9
    constraint: Constraint | Literal["auto"] = "auto"
    update: Update | Literal["auto"] = "auto"
    rotation: Annotated[float, Field(ge=0)] = ROTATION

    def needs_curvature(self) -> bool:
        """Unless nothing is left out."""
        return self.energy > 0

    def subspace(self, curvature: Curvature, name: str) -> Subspace | None:
        """The low-curvature subspace."""
        return curvature.subspace(name, self.energy, self.constraint) if self.energy > 0 else None

    def rules(self, curvature: Curvature, matrices: Sequence[EditMatrix]) -> list[UpdateRule]:
        """The update rules of matrices under a curvature."""
        rules = []
        for matrix in matrices:
            subspace = curvature.subspace(matrix.name, self.energy, self.constraint)
            rules.append(update_rule(self.update, subspace.to(matrix.parameter.device), self.rotation))
        return rules


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
    if config.energy == 0:
        rules = unconstrained(problem)
    elif problem.curvature is None:
        raise ConfigError("an energy above 0 needs a curvature: give --curvature or --texts")
    else:
        rules = config.rules(problem.curvature, problem.matrices)
    every = range(len(problem.edits))
    yield Round(num_edits=len(every), trace=train_rules(problem, config, rules, every))
