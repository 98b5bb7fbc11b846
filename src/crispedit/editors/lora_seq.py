"""LoRA in rounds: a new adapter for every round, merged into the weights before the next.

The equations are those of :mod:`crispedit.editors.lora`, once per round, with W₀ what the rounds before left. (What
CrispEdit, arXiv 2602.15823, section 4.3, compares with as LoRA Sequential: the preset ``published``.)
"""

from collections.abc import Iterator
from typing import ClassVar

from ._gradient import RoundsConfig
from .base import EditProblem, Presets, Round
from .lora import Config as BatchConfig
from .lora import train_adapter


class Config(RoundsConfig, BatchConfig):
    """Settings of adapters and of rounds."""

    presets: ClassVar[Presets] = {
        **BatchConfig.presets,
        "published": {**BatchConfig.presets["published"], "lr": 5e-3, "epochs": 70},
    }


def edit(problem: EditProblem, config: Config) -> Iterator[Round]:
    """Edits round by round.

    Args:
        problem: What is to be edited.
        config: Settings.

    Yields:
        One round after the other.
    """
    for chosen in problem.rounds(config.round_size):
        yield train_adapter(problem, config, chosen)
