"""MEMIT: values for all subjects at once, brought about by five MLPs, off the keys that the model has used so far.

    ΔW_l = R_l K_lᵀ (λ C_l + K_p K_pᵀ + K_l K_lᵀ)⁻¹,     C_l = E[a aᵀ] over tokens of capability texts

K_l, R_l and the value vectors behind them: :mod:`crispedit.editors._locate`. C_l is the factor A of the curvature.
("Mass-Editing Memory in a Transformer", Meng et al., arXiv 2210.07229; K_p, the keys of earlier rounds, is the MEMIT
that edits in rounds in the AlphaEdit paper, arXiv 2410.02355.)

What λ means: a key k has the leverage kᵀ C⁻¹ k, which is d_in on average over the tokens that C is of. Alone, an edit
comes to leverage / (λ + leverage) of what it wants from a layer; the published 15000 is about d_in (14336 in LLaMA-3,
16384 in GPT-J), and ``auto`` is d_in.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..curvature import Curvature
from ..models import EditMatrix
from ..moments import ROUNDING, Moment, Sketch
from ._locate import LocateConfig, edit_rounds
from .base import EditProblem, Presets, Round

WEIGHT = 1.0
"""λ of ``auto``, in parts of d_in."""


class Config(LocateConfig):
    """Settings of MEMIT: those of value vectors and rounds, and how much is kept.

    Args:
        mom2_weight: λ, the weight of what the model has used so far; ``auto`` goes by the width of the matrix.
        memory: Whether later rounds keep what earlier ones did.
    """

    presets: ClassVar[Presets] = {
        "published": {"lr": 0.1, "clamp": 0.75, "weight_decay": 0.5, "mom2_weight": 15000, "eos": False},
        "memit-paper": {"lr": 0.5, "clamp": 0.75, "weight_decay": 0.5, "mom2_weight": 15000, "eos": False},
        "crispedit-paper": {
            "lr": 0.5,
            "clamp": 4,
            "weight_decay": 1e-3,
            "mom2_weight": 15000,
            "round_size": 32,
            "memory": False,
            "eos": False,
        },
    }

    mom2_weight: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    memory: bool = True


class InverseMoment:
    """S = C⁻¹, C the second moment of inputs, with what rounding leaves of it lifted.

    Of a sketch, C is its leading eigenpairs, and in all other directions the mean of what the trace says is left.

    Args:
        moment: C.
        weight: μ = λ.
        device: Where keys are.
    """

    def __init__(self, moment: Moment, weight: float, device: torch.device) -> None:
        self.weight = weight
        self.basis, self.shrinks, self.rest = torch.empty(0), torch.empty(0), 0.0
        if isinstance(moment, Sketch):
            pairs = moment.eigenpairs
            left = max(pairs.trace - float(pairs.values.sum()), 0.0) / max(len(moment) - len(pairs.values), 1)
            rest = max(left, ROUNDING * float(pairs.values[0]))
            self.basis = pairs.vectors.to(device).double()
            self.shrinks, self.rest = (1 / pairs.values - 1 / rest).to(device), 1 / rest
        else:
            C = moment.to(device).double()
            C = (C + C.T) / 2
            C.diagonal().add_(torch.finfo(torch.float32).eps * float(C.norm()))  # what float32 sums cannot know
            self.factor = torch.linalg.cholesky(C)

    def times(self, keys: Tensor) -> Tensor:
        """C⁻¹ K."""
        if len(self.basis):
            return keys * self.rest + self.basis @ (self.shrinks[:, None] * (self.basis.T @ keys))
        return torch.cholesky_solve(keys, self.factor)

    def ridge(self, keys: Tensor) -> float:
        """λ."""
        return self.weight

    def details(self) -> dict[str, Any]:
        """Nothing beside λ."""
        return {}


def edit(problem: EditProblem, config: Config) -> Iterator[Round]:
    """Edits in one round, or in several.

    Args:
        problem: What is to be edited.
        config: Settings.

    Yields:
        One round after the other.
    """

    def freedom_of(curvature: Curvature, matrix: EditMatrix) -> InverseMoment:
        weight = WEIGHT * matrix.shape[1] if config.mom2_weight == "auto" else config.mom2_weight
        return InverseMoment(curvature.factors[matrix.name].A, weight, matrix.parameter.device)

    yield from edit_rounds(problem, config, freedom_of, memory=config.memory)
