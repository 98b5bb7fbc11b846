"""What editors that train matrices with Adam have in common: their settings, and a round of the loop."""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..adam import AdamMemory
from ..ownership import owned
from ..precision import Precision
from ..replay import Start
from ..rotation import rotated
from ..training import START, STOP_LOSS, RuledMatrices, Trace, Trainee, rows_per_step, train
from ..updates import Elsewhere, Unconstrained, UpdateRule
from .base import EditorConfig, EditProblem, Round

PUBLISHED = {"lr": 5e-4, "batch_size": 32, "epochs": 25, "eos": False}
"""Of all gradient editors in the published comparison (CrispEdit, arXiv 2602.15823, appendix E)."""
ROUNDS_START = START / 4
"""The first learning rate that ``auto`` tries in rounds, times d_in: what one round may do to the model, the next does
again (docs/decisions.md)."""


class GradientConfig(EditorConfig):
    """Settings of the edit loop.

    Args:
        lr: Adam's learning rate, or ``auto``.
        epochs: Passes over the edits, at most.
        batch_size: Edits per step, at most, and never more than an eighth of the edits.
        stop_loss: The mean loss of an epoch that ends the edit.
        replay: From where every step is computed at the most; see :mod:`crispedit.replay`.
        precision: ``bfloat16`` computes steps in mixed precision around float32 masters, ``float32`` in the model's
            dtype; see :func:`crispedit.precision.mixed_precision`.
        eos: Whether targets end with an end-of-sequence (in a chat: end-of-turn) token.
    """

    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    epochs: Annotated[int, Field(ge=1)] = 25
    batch_size: Annotated[int, Field(ge=1)] = 32
    stop_loss: Annotated[float, Field(ge=0)] = STOP_LOSS
    replay: Start = "matrix"
    precision: Precision = "auto"


class RuledConfig(GradientConfig):
    """Settings of the edit loop on the matrices themselves.

    Args:
        first_lr: The first learning rate that ``auto`` tries, times d_in.
    """

    in_rounds: ClassVar[dict[str, Any]] = {"first_lr": ROUNDS_START}

    first_lr: Annotated[float, Field(gt=0)] = START


def unconstrained(problem: EditProblem) -> list[UpdateRule]:
    """Rules of plain fine-tuning for all matrices."""
    return [
        Unconstrained(matrix.shape, matrix.parameter.device) if own else Elsewhere(matrix)
        for matrix, own in zip(problem.matrices, owned(problem.matrices), strict=True)
    ]


def train_in(
    problem: EditProblem,
    config: GradientConfig,
    trainee: Trainee,
    chosen: Sequence[int],
    *,
    lr: float | Literal["auto"] | None = None,
    **options: Any,
) -> Trace:
    """Trains some of the edits into a trainee.

    Args:
        problem: What is to be edited.
        config: Settings.
        trainee: What is trained.
        chosen: Indices of edits.
        lr: In place of the configured rate.
        **options: Of :func:`crispedit.training.train`, in place of those that the settings give.

    Returns:
        How it went.
    """
    given = {
        "lr": config.lr if lr is None else lr,
        "epochs": config.epochs,
        "batch_size": rows_per_step(len(chosen), config.batch_size),
        "seed": problem.seed,
        "stop_loss": config.stop_loss,
        "start": config.replay,
        "precision": config.precision,
        "progress": problem.progress,
    }
    rows = [problem.rows[index] for index in chosen]
    return train(problem.model, problem.matrices, trainee, rows, **{**given, **options})


def train_rules(
    problem: EditProblem,
    config: RuledConfig,
    rules: Sequence[UpdateRule],
    chosen: Sequence[int],
    *,
    lr: float | Literal["auto"] | None = None,
    **options: Any,
) -> Trace:
    """Trains some of the edits into the matrices, each through its rule.

    Args:
        problem: What is to be edited.
        config: Settings.
        rules: One per matrix.
        chosen: Indices of edits.
        lr: In place of the configured rate.
        **options: Of :func:`crispedit.training.train`, in place of those that the settings give.

    Returns:
        How it went.
    """
    with rotated(problem.matrices, [rule.frame for rule in rules]):
        trainee = RuledMatrices(problem.matrices, rules)
        return train_in(problem, config, trainee, chosen, lr=lr, first=config.first_lr, **options)


class RoundsConfig(GradientConfig):
    """Settings of the edit loop, round by round.

    Args:
        round_size: Edits per round; they are taken in their order.
    """

    round_size: Annotated[int, Field(ge=1)] = 100


class RuledRoundsConfig(RoundsConfig, RuledConfig):
    """Settings of the edit loop on the matrices themselves, round by round.

    Args:
        optimizer: Whether every round has a ``fresh`` Adam, or one is ``kept`` through all of them.
    """

    first_lr: Annotated[float, Field(gt=0)] = ROUNDS_START
    optimizer: Literal["fresh", "kept"] = "fresh"


def train_rounds(
    problem: EditProblem,
    config: RuledRoundsConfig,
    rules_of_round: Callable[[], Sequence[UpdateRule]],
    finished: Callable[[range], dict[str, Any]] = lambda chosen: {},
) -> Iterator[Round]:
    """Trains the edits in rounds; a rate that is to be found is found in the first.

    Args:
        problem: What is to be edited.
        config: Settings.
        rules_of_round: Makes the rules of a round, one per matrix.
        finished: Called with the edits of a round when they are in; gives its details.

    Yields:
        One round after the other.
    """
    lr, memory = config.lr, AdamMemory() if config.optimizer == "kept" else None
    for chosen in problem.rounds(config.round_size):
        trace = train_rules(problem, config, rules_of_round(), chosen, lr=lr, memory=memory)
        lr = trace.rates[0] if lr == "auto" else lr
        yield Round(num_edits=chosen.stop, trace=trace, details=finished(chosen))
