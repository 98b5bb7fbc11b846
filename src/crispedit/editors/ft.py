"""Plain fine-tuning (FT-M): Adam on the matrices themselves, loss at target tokens only, nothing left out.

    minimise  mean over target tokens of −log p(y_t | x, y_<t)    in the edited matrices

What the CrispEdit paper (arXiv 2602.15823, appendix E) calls FT: its own loop without the projection. FT-M, with its
masked prompt: Zhang et al., arXiv 2401.01286.
"""

from collections.abc import Iterator
from typing import ClassVar

from ._gradient import PUBLISHED, RuledConfig, train_rules, unconstrained
from .base import EditProblem, Presets, Round


class Config(RuledConfig):
    """Settings of fine-tuning: those of the loop."""

    presets: ClassVar[Presets] = {"published": PUBLISHED}


def edit(problem: EditProblem, config: Config) -> Iterator[Round]:
    """Edits in one round.

    Args:
        problem: What is to be edited.
        config: Settings.

    Yields:
        One round.
    """
    every = range(len(problem.edits))
    yield Round(num_edits=len(every), trace=train_rules(problem, config, unconstrained(problem), every))
