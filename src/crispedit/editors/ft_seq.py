"""Plain fine-tuning in rounds (FT Sequential): what comes later is trained into what is there, and nothing is kept.

The equations are those of :mod:`crispedit.editors.ft`, once per round. (CrispEdit, arXiv 2602.15823, section 4.3 and
appendix E, where one Adam runs through all rounds, as with preset ``published``.)
"""

from collections.abc import Iterator
from typing import ClassVar

from ._gradient import PUBLISHED, RuledRoundsConfig, train_rounds, unconstrained
from .base import EditProblem, Presets, Round


class Config(RuledRoundsConfig):
    """Settings of sequential fine-tuning: those of the loop."""

    presets: ClassVar[Presets] = {"published": {**PUBLISHED, "optimizer": "kept"}}


def edit(problem: EditProblem, config: Config) -> Iterator[Round]:
    """Edits round by round.

    Args:
        problem: What is to be edited.
        config: Settings.

    Yields:
        One round after the other.
    """
    yield from train_rounds(problem, config, lambda: unconstrained(problem))
