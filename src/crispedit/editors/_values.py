"""Value vectors: what a block must put out at a subject's last token for the model to say an edit's target.

    z = h + δ,   δ = argmin  mean over contexts c of  −(1/|y|) Σ_t log p_δ(y_t | c(x), y_<t)
                             + kl · KL( p_δ(· | subject) ‖ p(· | subject) )  +  weight_decay · ‖δ‖ / ‖h‖²
                     subject to  ‖δ‖ ≤ clamp · ‖h‖

h is the block's output at that token, p_δ the model with δ added to it, in every context (ROME, arXiv 2202.05262,
section 3.1; MEMIT, arXiv 2210.07229, section 4). Adam takes each δ on its own way, and stops on its own, but edits go
through the model together, what δ does not change is run once, and only target tokens get logits.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import DynamicCache

from ..errors import NumericsError
from ..forward import RowBatch, collate, target_logits
from ..models import CACHE, decoder_blocks
from ..progress import Progress, log
from ..recording import calling
from ..replay import tolerance
from ..rows import EditRow
from ..texts import pad
from ._activations import run_to_block
from ._subjects import Asked, SubjectRow
from .base import EditorConfig

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's, as everywhere."""
RATE = 0.5
"""The learning rate of ``auto``, in parts of the root mean square of h."""
CHECKED = 8
"""Rows on which the model from the block on is compared with the whole model."""


class ValueConfig(EditorConfig):
    """Settings of the search for value vectors.

    Args:
        lr: Adam's learning rate for δ; ``auto`` goes by the length of h.
        steps: Forward passes; after the last one δ is not moved any more.
        clamp: The longest δ, in parts of ‖h‖.
        weight_decay: Weight of ‖δ‖ / ‖h‖².
        kl: Weight of what keeps the model's distribution after the bare subject.
        value_loss: An edit whose loss is below this is not moved any more.
        contexts: Sampled contexts beside the empty one.
        batch_size: Edits that go through the model together; beyond rounding, no result depends on it.
        eos: Whether targets end with an end-of-sequence (in a chat: end-of-turn) token.
    """

    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    steps: Annotated[int, Field(ge=1)] = 25
    clamp: Annotated[float, Field(gt=0)] = 1.5
    weight_decay: Annotated[float, Field(ge=0)] = 0.5
    kl: Annotated[float, Field(ge=0)] = 0.0625
    value_loss: Annotated[float, Field(ge=0)] = 0.05
    contexts: Annotated[int, Field(ge=0)] = 5
    batch_size: Annotated[int, Field(ge=1)] = 32


@dataclass(frozen=True)
class Values:
    """Value vectors of edits.

    Args:
        wanted: z, (edits, hidden width) float32.
        before: h.
        rates: (edits,), the learning rate of each.
        losses: (edits, steps) float64 on the CPU: what was minimised, before every step; an edit that was not moved
            any more keeps its last one.
    """

    wanted: Tensor
    before: Tensor
    rates: Tensor
    losses: Tensor


def find_values(model: Any, layer: int, edits: Sequence[Asked], config: ValueConfig, progress: Progress) -> Values:
    """Value vectors of edits for the output of a block.

    Args:
        model: A causal LM in evaluation mode, as edited so far.
        layer: The block.
        edits: At least one.
        config: Settings.
        progress: Called after every batch of edits.

    Returns:
        The values, in the order of the edits.

    Raises:
        NumericsError: A loss or a vector is not finite.
    """
    # neighbours in length pad each other the least
    order = sorted(range(len(edits)), key=lambda index: max(len(row.row.ids) for row in edits[index].rows))
    found: list[Values] = []
    for start in range(0, len(order), config.batch_size):
        batch = [edits[index] for index in order[start : start + config.batch_size]]
        found.append(_find_together(model, layer, batch, config))
        progress("value vectors", start + len(batch), len(edits))
    back = torch.tensor(order).argsort()

    def of_all(name: str) -> Tensor:
        together = torch.cat([getattr(values, name) for values in found])
        return together[back.to(together.device)]

    return Values(**{name: of_all(name) for name in ("wanted", "before", "rates", "losses")})


def _find_together(model: Any, layer: int, edits: Sequence[Asked], config: ValueConfig) -> Values:
    """Value vectors of edits that go through the model together."""
    rows = [row for edit in edits for row in (*edit.rows, edit.essence)]
    per_edit = len(rows) // len(edits)
    above = _Above(model, layer, rows)
    before = _wide(above.hidden[::per_edit][torch.arange(len(edits)), above.subjects[::per_edit]])
    lengths = before.norm(dim=1)
    rates = RATE * lengths / before.shape[1] ** 0.5 if config.lr == "auto" else torch.full_like(lengths, config.lr)
    delta, mean, square = (torch.zeros_like(before) for _ in range(3))
    essences = torch.empty(0)
    losses = torch.full((len(edits), config.steps), math.nan, dtype=torch.float64)
    going = torch.arange(len(edits), device=before.device)
    for step in range(config.steps):
        moved = delta[going].requires_grad_()
        with torch.enable_grad():
            chosen = [int(edit) * per_edit + number for edit in going for number in range(per_edit)]
            likelihood, log_p = above.losses(chosen, moved.repeat_interleave(per_edit, 0), per_edit)
            if step == 0:
                essences = log_p.detach()
            divergence = (log_p.exp() * (log_p - essences[going.to(log_p.device)])).sum(-1).to(moved.device)
            length = moved.norm(dim=1)
            loss = likelihood + config.kl * divergence + config.weight_decay * length / lengths[going].square()
        if not torch.isfinite(loss).all():
            wrong = edits[int(going[int((~torch.isfinite(loss)).nonzero()[0])])]
            raise NumericsError(f"row {wrong.number}: the loss of its value vector is not finite; lower --lr")
        losses[going.cpu(), step:] = loss.detach().double().cpu()[:, None]
        left = loss.detach() >= config.value_loss
        if step == config.steps - 1 or not left.any():
            break
        (gradient,) = torch.autograd.grad(loss.sum(), moved)
        going = going[left]
        mean[going] = BETAS[0] * mean[going] + (1 - BETAS[0]) * gradient[left]
        square[going] = BETAS[1] * square[going] + (1 - BETAS[1]) * gradient[left].square()
        root = (square[going] / (1 - BETAS[1] ** (step + 1))).sqrt() + EPSILON
        stepped = delta[going] - rates[going, None] / (1 - BETAS[0] ** (step + 1)) * mean[going] / root
        norms = stepped.norm(dim=1)
        if not torch.isfinite(norms).all():
            raise NumericsError(f"value vectors are not finite after step {step + 1}; lower --lr ({config.lr})")
        delta[going] = stepped * (config.clamp * lengths[going] / norms.clamp_min(1e-30)).clamp_max(1)[:, None]
    return Values(wanted=before + delta, before=before, rates=rates, losses=losses)


class _Above:
    """The model from a block's output on, for rows whose subject's last token is moved there.

    Tokens before that one are what they are, wherever it goes: their keys and values are computed once. So is the
    block's output at that token and those behind it, and these are all that a step runs, through the blocks above.
    """

    def __init__(self, model: Any, layer: int, rows: Sequence[SubjectRow]) -> None:
        self.model, self.rows = model, rows
        blocks = list(decoder_blocks(model)[1])
        self.block, self.below, self.last = blocks[layer], blocks[:layer], len(blocks) - 1
        seen = run_to_block(model, layer, self._collated([row.row for row in rows]).of(model))
        self.hidden, self.others = seen.hidden, seen.others
        self.subjects = torch.tensor([row.subject for row in rows], device=self.hidden.device)
        self.tails = [EditRow(r.row.ids[r.subject :], r.row.prompt_length - r.subject) for r in rows]
        self.before: tuple[Any, Tensor] | None = None
        self.chosen: list[int] = []
        self.whole = not self._agrees()

    def _collated(self, rows: Sequence[EditRow]) -> RowBatch:
        return collate(rows).to(self.model.get_input_embeddings().weight.device)

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether what is left out changes nothing: on a few rows, their subjects moved, beside the whole model."""
        chosen = list(range(min(len(self.rows), CHECKED)))
        moves = 0.1 * _wide(self.hidden[chosen, self.subjects[chosen]]).roll(1, dims=-1)
        try:
            short = _wide(self._from_subjects(chosen, moves))
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            log.info("value vectors: the whole model is run (%s)", " ".join(str(error).split())[:200])
            return False
        full = _wide(self._from_beginning(chosen, moves))
        off = float((short - full).norm() / (full - full.mean(-1, keepdim=True)).norm().clamp_min(1e-30))
        if not off <= tolerance(self.model.dtype, self.last + 1):
            log.info("value vectors: the whole model is run (a part of it is off by %.1e of the logits)", off)
            return False
        return True

    def logits(self, chosen: Sequence[int], moves: Tensor) -> Tensor:
        """Logits at the targets of rows, with their subjects' last tokens moved.

        Args:
            chosen: Indices of rows.
            moves: (rows, hidden width) float32, added to the block's output.

        Returns:
            (targets, vocabulary).
        """
        return (self._from_beginning if self.whole else self._from_subjects)(list(chosen), moves)

    def _from_beginning(self, chosen: list[int], moves: Tensor) -> Tensor:
        """By the whole model."""
        here, at = torch.arange(len(chosen), device=moves.device), self.subjects[chosen]

        def changed(_: nn.Module, __: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden.index_put((here, at), (_wide(hidden[here, at]) + moves).to(hidden.dtype))
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = self.block.register_forward_hook(changed)
        try:
            return target_logits(self.model, self._collated([self.rows[index].row for index in chosen]))
        finally:
            handle.remove()

    def _from_subjects(self, chosen: list[int], moves: Tensor) -> Tensor:
        """By the blocks above, for the subjects' last tokens and those behind them."""
        if chosen != self.chosen:
            self._prepare(chosen)
        first = (_wide(self.kept[:, 0]) + moves).to(self.kept.dtype)
        hidden = torch.cat([first[:, None], self.kept[:, 1:]], 1)

        def handed_on(*arguments: Any, **keywords: Any) -> Any:
            return self._as_output(arguments[0] if arguments else keywords["hidden_states"])

        cache = copy(self.cache)
        cache.layers = [copy(layer) for layer in self.cache.layers]  # what is added to it is for this once
        with ExitStack() as patches:
            for block in self.below:
                patches.enter_context(calling(block, handed_on))
            patches.enter_context(calling(self.block, lambda *_, **__: self._as_output(hidden)))
            return target_logits(self.model, self.batch, {**self.given, CACHE: cache})

    @torch.no_grad()
    def _before_subjects(self) -> tuple[Any, Tensor]:
        """Keys and values of the tokens before the subjects' last ones, and (rows, length) which there are."""
        device = self.model.get_input_embeddings().weight.device
        unread = (0,)  # of a row that begins with its subject's last token
        before = pad([row.row.ids[: row.subject] or unread for row in self.rows]).to(device)
        # padding sees and is seen here, by padding alone; for what comes later it is masked
        given = {"input_ids": before.ids, "attention_mask": torch.ones_like(before.mask), "use_cache": True}
        cache = DynamicCache()
        run_to_block(self.model, self.last, {**given, CACHE: cache})
        places = torch.arange(before.ids.shape[1], device=device)
        return cache, (places < self.subjects.to(device)[:, None]).long()

    @torch.no_grad()
    def _prepare(self, chosen: list[int]) -> None:
        """What steps of these rows have in common."""
        if self.before is None:
            self.before = self._before_subjects()
        cache, mask = self.before
        rows = torch.tensor(chosen, device=mask.device)
        self.cache = copy(cache)
        self.cache.layers = [copy(layer) for layer in cache.layers]
        for layer in self.cache.layers:
            layer.keys, layer.values = (t[rows.to(t.device)] for t in (layer.keys, layer.values))
        self.batch = self._collated([self.tails[index] for index in chosen])
        at = self.subjects[rows.to(self.subjects.device)][:, None].to(mask.device)
        at = at + torch.arange(self.batch.ids.shape[1], device=mask.device)
        at = at.clamp_max(self.hidden.shape[1] - 1)  # padding
        self.given = {
            "input_ids": self.batch.ids,
            "attention_mask": torch.cat([mask[rows], self.batch.mask], 1),
            "position_ids": at,
            "use_cache": True,
        }
        self.kept = self.hidden[rows.to(self.hidden.device)[:, None], at.to(self.hidden.device)]
        self.chosen = chosen

    def _as_output(self, hidden: Tensor) -> Any:
        return hidden if self.others is None else (hidden, *self.others)

    def losses(self, chosen: Sequence[int], moves: Tensor, per_edit: int) -> tuple[Tensor, Tensor]:
        """Losses of whole edits.

        Args:
            chosen: Indices of rows, edit by edit, the bare subject's last.
            moves: (rows, hidden width).
            per_edit: Rows of an edit.

        Returns:
            (edits,) the mean over contexts of the target's negative log-likelihood per token, and (edits, vocabulary)
            log-probabilities after the bare subject.
        """
        log_p = _wide(self.logits(chosen, moves)).log_softmax(-1)
        rows = [self.rows[index].row for index in chosen]
        labels = torch.tensor([token for row in rows for token in row.ids[row.prompt_length :]], device=log_p.device)
        counts = torch.tensor([row.num_targets for row in rows], device=log_p.device)
        of_tokens = -log_p.gather(1, labels[:, None])[:, 0] / counts.repeat_interleave(counts)
        owners = torch.arange(len(rows), device=log_p.device).repeat_interleave(counts)
        of_rows = torch.zeros(len(rows), device=log_p.device, dtype=log_p.dtype).index_add(0, owners, of_tokens)
        last = counts.cumsum(0)[per_edit - 1 :: per_edit] - 1
        return of_rows.view(-1, per_edit)[:, :-1].mean(1).to(moves.device), log_p[last]


def _wide(values: Tensor) -> Tensor:
    """In float32, unless it is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
