"""CrispEdit-Seq: rounds, each of which keeps off the curvature of the capabilities and of all earlier rounds.

    round k:  CrispEdit on D_k with A, G;   then, at the new weights, A_k and G_k of D_k, and
    A ← (n A + n_k A_k) / (n + n_k),   G ← (n G + n_k G_k) / (n + n_k),   n ← n + n_k

n counts tokens. A_k and G_k are of whole rows, prompts included; no earlier edit is kept. (CrispEdit, arXiv 2602.15823,
Algorithm 2.)
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ..curvature import merge
from ._gradient import PUBLISHED, RoundsConfig, train_rounds
from .base import EditProblem, Presets, Round
from .crispedit import Config as BatchConfig


class Config(RoundsConfig, BatchConfig):
    """Settings of CrispEdit and of rounds.

    Args:
        energy: γ, the share of the curvature that the excluded directions hold; without any it would be ``ft-seq``.
    """

    presets: ClassVar[Presets] = {"published": {**PUBLISHED, **BatchConfig.presets["published"]}}

    energy: Annotated[float, Field(gt=0, lt=1)] = 0.9

    def subspace(self, *_: Any) -> None:
        """None: every round has its own, and what rounds add up to lies in none of them."""


def edit(problem: EditProblem, config: Config) -> Iterator[Round]:
    """Edits round by round.

    Args:
        problem: What is to be edited.
        config: Settings.

    Yields:
        One round after the other.
    """
    assert problem.curvature is not None
    curvature = problem.curvature

    def finished(chosen: Sequence[int]) -> dict[str, Any]:
        nonlocal curvature
        if chosen[-1] + 1 < len(problem.edits):  # else nothing follows that it would be kept from
            rows = [problem.rows[index].ids for index in chosen]
            curvature = merge(
                [curvature, curvature.of_rows(problem.model, problem.matrices, rows, problem.seed + chosen[0])]
            )
        return {"tokens": next(iter(curvature.factors.values())).num_tokens}

    yield from train_rounds(problem, config, lambda: config.rules(curvature, problem.matrices), finished)
