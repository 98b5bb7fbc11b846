"""CrispEdit-Seq: rounds, each of which spares the curvature of the capabilities and of all earlier rounds.

    round k:  CrispEdit on D_k with A, G;   then, at the new weights, A_k and G_k of D_k, and
    A ← (n A + n_k A_k) / (n + n_k),   G ← (n G + n_k G_k) / (n + n_k),   n ← n + n_k

n counts tokens. A_k and G_k are of whole rows, prompts included; no earlier edit is kept. (CrispEdit, arXiv 2602.15823,
Algorithm 2.) By default the edits' sums are weighted so that they have as much curvature as the capabilities
(:mod:`crispedit.history`): by their few tokens they would have no say. And where the paper has a mask, every
direction has its price (:class:`crispedit.priced.PricedCoordinates`). The variants are compared in docs/decisions.md.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..curvature import Curvature
from ..history import HISTORY_WEIGHT, with_history
from ..merging import merge
from ..updates import Update
from ._gradient import PUBLISHED, RuledRoundsConfig, train_rounds
from .base import EditProblem, Presets, Round
from .crispedit import SubspaceConfig

_PUBLISHED = {**PUBLISHED, **SubspaceConfig.presets["published"], "optimizer": "kept", "history_weight": 1.0}
POOLED = 1000
"""Of all earlier edits the published mix draws at most so many."""


class Config(RuledRoundsConfig, SubspaceConfig):
    """Settings of CrispEdit and of rounds.

    Args:
        energy: γ, the share of the curvature that lies in directions above τ, of which the price is; of another update
            than ``priced``, what the excluded directions hold.
        update: ``priced`` in place of the mask of the paper: what a mask lets go for nothing adds up over rounds.
        history: ``merged`` is Algorithm 2. ``mix`` estimates the curvature anew after every round, of the capability
            texts and of earlier edits, which it keeps: the default of the published code.
        history_weight: What a token of an edit weighs in the sum, a token of the capability texts being 1, as in
            Algorithm 2; 0 keeps off the capabilities alone. ``equal-trace`` gives all edits together as much curvature
            as the capabilities.
        refresh: Estimates the curvature of the capability texts anew when a matrix has moved so far, in parts of its
            norm, since it was last estimated; never when omitted. The paper's is 0.25.
    """

    presets: ClassVar[Presets] = {"published": _PUBLISHED, "mix": {**_PUBLISHED, "history": "mix"}}

    energy: Annotated[float, Field(gt=0, lt=1)] = 0.9
    update: Update | Literal["auto"] = "priced"
    history: Literal["merged", "mix"] = "merged"
    history_weight: Annotated[float, Field(ge=0)] | Literal["equal-trace"] = HISTORY_WEIGHT
    refresh: Annotated[float, Field(gt=0)] | None = None

    def subspace(self, *_: Any) -> None:
        """None: every round has its own, and what rounds add up to lies in none of them."""

    def needs_texts(self) -> bool:
        """To estimate their curvature again."""
        return self.history == "mix" or self.refresh is not None


def edit(problem: EditProblem, config: Config) -> Iterator[Round]:
    """Edits round by round.

    Args:
        problem: What is to be edited.
        config: Settings.

    Yields:
        One round after the other.
    """
    assert problem.curvature is not None
    history = _History(problem, config, problem.curvature)
    yield from train_rounds(problem, config, lambda: config.rules(history.joined, problem.matrices), history.add)


class _History:
    """The curvature that the next round keeps off.

    Args:
        problem: What is edited.
        config: Settings.
        capabilities: The curvature before the first round.
    """

    def __init__(self, problem: EditProblem, config: Config, capabilities: Curvature) -> None:
        self.problem, self.config = problem, config
        self.joined = self.capabilities = capabilities
        self.edits: Curvature | None = None
        self._mark()

    def _mark(self) -> None:
        """Where the weights are as the capabilities' curvature is estimated, if anybody will ask how far they moved."""
        if self.config.refresh is not None:
            self.marks = [matrix.weight.clone() for matrix in self.problem.matrices]

    def add(self, chosen: range) -> dict[str, Any]:
        """Adds a round, which is in the weights already.

        Args:
            chosen: Its edits.

        Returns:
            The ``tokens`` that the curvature is of, and whether that of the texts was ``refreshed``.
        """
        refreshed = False
        if chosen.stop < len(self.problem.edits):  # else nothing follows that it would be kept from
            refreshed = self.config.history == "mix" or self._moved()
            if refreshed:
                self._refresh(chosen)
            if self.config.history_weight:
                self._add_edits(chosen)
            self.joined = with_history(self.capabilities, self.edits, self.config.history_weight, start=self.joined)
        return {"tokens": self.joined.num_tokens, **({"refreshed": True} if refreshed else {})}

    def _moved(self) -> bool:
        """Whether a matrix is too far from where the capabilities' curvature was estimated."""
        limit = self.config.refresh
        return limit is not None and any(
            float((matrix.weight - mark).norm()) > limit * float(mark.norm())
            for matrix, mark in zip(self.problem.matrices, self.marks, strict=True)
        )

    def _refresh(self, chosen: range) -> None:
        problem = self.problem
        assert problem.texts is not None
        seed, tokenizer = problem.seed + chosen.start, problem.prompter.tokenizer
        self.capabilities = self.capabilities.of_texts(problem.model, tokenizer, problem.matrices, problem.texts, seed)
        self._mark()

    def _add_edits(self, chosen: range) -> None:
        seed = self.problem.seed + chosen.start
        if self.config.history == "mix":
            so_far = range(chosen.stop)
            self.edits = self._of(random.Random(seed).sample(so_far, min(POOLED, len(so_far))), seed)
        else:
            own = self._of(chosen, seed)
            self.edits = own if self.edits is None else merge([self.edits, own])

    def _of(self, chosen: Sequence[int], seed: int) -> Curvature:
        rows = [self.problem.rows[index].ids for index in chosen]
        return self.capabilities.of_rows(self.problem.model, self.problem.matrices, rows, seed)
