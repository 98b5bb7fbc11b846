"""What an editor is: a validated ``Config`` and a generator that edits a problem's model in place.

    def edit(problem: EditProblem, config: Config) -> Iterator[Round]

It yields after every round of edits. The driver (:mod:`crispedit.editing`) owns everything else: the
original weights, float32 masters, the proof, saving. See CONTRIBUTING.md, "Add an editor".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ..curvature import Curvature
from ..edits import Edit
from ..errors import ConfigError, did_you_mean
from ..models import EditMatrix, edit_matrices
from ..progress import Progress
from ..rows import EditRow, Prompter
from ..subspace import Subspace
from ..texts import CapabilityTexts, TokenBatch
from ..training import Trace

Presets = dict[str, dict[str, Any]]


class EditorConfig(BaseModel):
    """Settings of an editor, and what it needs; an unknown or unfit setting is refused by name.

    Args:
        eos: Whether targets end with an end-of-sequence (in a chat: end-of-turn) token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    presets: ClassVar[Presets] = {}
    """Settings by name: of a publication, or of a variant that has a name of its own."""
    needs_subject: ClassVar[bool] = False
    """Whether every edit must name a subject that its prompt contains."""
    in_rounds: ClassVar[dict[str, Any]] = {}
    """Settings that have another default where edits come in rounds, one after the other."""
    lowers_loss: ClassVar[bool] = True
    """Whether the edit loss must fall. Where it is not what is minimised, that it did not is a warning."""

    eos: bool = True

    @classmethod
    def of(cls, settings: dict[str, Any], preset: str | None = None) -> Self:
        """Validates settings.

        Args:
            settings: By name.
            preset: Gives the values of those that are not among them.

        Returns:
            The configuration.

        Raises:
            ConfigError: There is no such preset, or a setting is unknown or has a value that does not fit.
        """
        if preset is not None and preset not in cls.presets:
            known = f"it has {', '.join(cls.presets)}" if cls.presets else "it has none"
            raise ConfigError(f"this editor has no preset '{preset}'{did_you_mean(preset, cls.presets)}; {known}")
        try:
            return cls(**{**cls.presets.get(preset or "", {}), **settings})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else "settings"
            if first["type"] == "extra_forbidden":
                near = did_you_mean(name, cls.model_fields)
                raise ConfigError(
                    f"this editor has no setting '{name}'{near}; it has {', '.join(cls.model_fields)}"
                ) from None
            raise ConfigError(f"{name} is {first['input']!r}: {first['msg'].lower()}") from None

    def matrices(self, model: Any, layers: Sequence[int] | None) -> tuple[EditMatrix, ...]:
        """What is edited.

        Args:
            model: A causal LM.
            layers: The decoder blocks that the user names, if any.

        Returns:
            The matrices, in the order in which the model uses them.
        """
        return edit_matrices(model, layers)

    def needs_curvature(self) -> bool:
        """Whether these settings need the capability curvature of the edited matrices, which are down-projections."""
        return False

    def needs_texts(self) -> bool:
        """Whether these settings need the capability texts themselves."""
        return False

    def needs_train_edits(self) -> bool:
        """Whether these settings need other edits to learn from."""
        return False

    def asks_after_rounds(self) -> bool:
        """Whether the proof's questions are asked after every round too; the scores go into the round's details."""
        return False

    def subspace(self, curvature: Curvature, name: str) -> Subspace | None:
        """What the change of a matrix has to stay in, for the proof.

        Args:
            curvature: Of the capability loss.
            name: Of the matrix.

        Returns:
            The subspace, or ``None`` where the editor promises none.
        """
        return None


@dataclass(kw_only=True)
class EditProblem:
    """What an editor is given.

    Args:
        model: The causal LM, in evaluation mode; only ``matrices`` require gradients, and they are float32.
        prompter: Builds prompts and rows; it has the tokenizer.
        matrices: The matrices that may be changed; nothing else may.
        edits: The edits.
        rows: One training row per edit.
        curvature: Of the capability loss, where there is one.
        texts: Capability texts, where there are any.
        train_edits: Other edits, for editors that learn how to edit.
        held_out: Texts on which drift is measured, in batches, the shortest first; none where there are none.
        seed: For everything drawn at random.
        progress: To be called after every step.
    """

    model: Any
    prompter: Prompter
    matrices: Sequence[EditMatrix]
    edits: Sequence[Edit]
    rows: Sequence[EditRow]
    curvature: Curvature | None
    texts: CapabilityTexts | None = None
    train_edits: Sequence[Edit] = ()
    held_out: Sequence[TokenBatch] = ()
    seed: int
    progress: Progress

    def rounds(self, size: int | None) -> Iterator[range]:
        """The edits in rounds, in their order.

        Args:
            size: Of a round; all in one when omitted.

        Yields:
            Indices of edits.
        """
        size = size or len(self.edits)
        for first in range(0, len(self.edits), size):
            yield range(first, min(first + size, len(self.edits)))


@dataclass(frozen=True, kw_only=True)
class Round:
    """What an editor yields after a round: how many edits are in the model now, and how it went.

    Args:
        num_edits: Edits made so far, this round included.
        trace: Of the round's training, if that is how it was made.
        details: What else a user may want to know of it, JSON-ready.
        budget: What an editor that was given one says of it; see :func:`crispedit.certificate.certificate`.
    """

    num_edits: int
    trace: Trace = field(default_factory=Trace)
    details: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] | None = None
