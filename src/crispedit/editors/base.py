"""What an editor is: a validated ``Config`` and a generator that edits a problem's model in place.

    def edit(problem: EditProblem, config: Config) -> Iterator[Round]

It yields after every round of edits. The driver (:mod:`crispedit.editing`) owns everything else: the
original weights, float32 masters, the proof, saving. See CONTRIBUTING.md, "Add an editor".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..curvature import Curvature
from ..errors import ConfigError, did_you_mean
from ..models import EditMatrix
from ..progress import Progress
from ..rows import EditRow
from ..training import Trace


class EditorConfig(BaseModel):
    """Settings of an editor; an unknown or unfit one is refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "EditorConfig":
        """Validates settings.

        Args:
            settings: By name.

        Returns:
            The configuration.

        Raises:
            ConfigError: A setting is unknown or has a value that does not fit.
        """
        try:
            return cls(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else "settings"
            if first["type"] == "extra_forbidden":
                near = did_you_mean(name, cls.model_fields)
                raise ConfigError(
                    f"this editor has no setting '{name}'{near}; it has {', '.join(cls.model_fields)}"
                ) from None
            raise ConfigError(f"{name} is {first['input']!r}: {first['msg'].lower()}") from None


@dataclass(kw_only=True)
class EditProblem:
    """What an editor is given.

    Args:
        model: The causal LM, in evaluation mode; only ``matrices`` require gradients, and they are float32.
        tokenizer: Its tokenizer.
        matrices: The matrices that may be changed; nothing else may.
        rows: One training row per edit.
        curvature: Of the capability loss, where there is one.
        seed: For everything drawn at random.
        progress: To be called after every step.
    """

    model: Any
    tokenizer: Any
    matrices: Sequence[EditMatrix]
    rows: Sequence[EditRow]
    curvature: Curvature | None
    seed: int
    progress: Progress


@dataclass(frozen=True, kw_only=True)
class Round:
    """What an editor yields after a round: how many edits are in the model now, and how it went.

    Args:
        num_edits: Edits made so far, this round included.
        trace: Of the round's training.
    """

    num_edits: int
    trace: Trace
