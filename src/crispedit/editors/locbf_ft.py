"""LocBF-FT (LocFT-BF): breadth-first fine-tuning of one matrix that was chosen for it.

    minimise  mean over edits of (mean over its target tokens of −log p(y_t | x, y_<t))    in one matrix

Every epoch goes through all edits in mini-batches; targets end with an end-of-sequence token. Which matrix is best
differs between models: ``crispedit compare --editors locbf-ft --sweep layers=…`` looks for it. ("Fine-tuning Done Right
in Model Editing", Yang et al., arXiv 2509.22072.)
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ..errors import ConfigError
from ..models import EditMatrix, decoder_blocks, edit_matrices
from ._gradient import PUBLISHED, RuledConfig, train_rules, unconstrained
from .base import EditProblem, Presets, Round


class Config(RuledConfig):
    """Settings of LocBF-FT: those of the loop.

    Args:
        batch_size: Edits per step, at most, and never more than an eighth of the edits.
    """

    presets: ClassVar[Presets] = {
        "published": {**PUBLISHED, "batch_size": 100, "eos": True},
        "crispedit-paper": PUBLISHED,  # as the comparison of that paper ran it: other batches, no end-of-sequence
    }

    batch_size: Annotated[int, Field(ge=1)] = 100

    def matrices(self, model: Any, layers: Sequence[int] | None) -> tuple[EditMatrix, ...]:
        """One down-projection: that of block 22 of 32 (LLaMA-3-8B), or as far up, unless a layer is named."""
        if layers is None:
            layers = (22 * len(decoder_blocks(model)[1]) // 32,)
        if len(layers) != 1:
            raise ConfigError(f"locbf-ft tunes one matrix, and {len(layers)} layers are named; name one")
        return edit_matrices(model, layers)


def edit(problem: EditProblem, config: Config) -> Iterator[Round]:
    """Edits in one round.

    Args:
        problem: What is to be edited.
        config: Settings.

    Yields:
        One round.
    """
    every = range(len(problem.edits))
    trace = train_rules(problem, config, unconstrained(problem), every, reduction="sample")
    yield Round(num_edits=len(every), trace=trace)
