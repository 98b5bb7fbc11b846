"""Capability texts: reading them, holding some out, and turning them into batches of tokens."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import TextsError, did_you_mean
from .models import context_length, intermediate_width, text_config

TokenRow = TypeVar("TokenRow", bound=Sequence[int])

HELD_OUT_SHARE = 0.2
PADDING = 0
"""Fills rows under the mask: a token of every model. A tokenizer's own may lie beyond the model's embeddings."""
MAX_TOKENS = 512
"""Texts are cut here, as in the paper (Wikipedia texts of up to 512 tokens)."""


@dataclass(frozen=True, kw_only=True)
class CapabilityTexts:
    """Texts that stand for all the model must go on doing.

    Args:
        fit: What the curvature is computed on.
        held_out: A seeded fifth, on which drift is measured.
        source: The file they came from, or a label.
        seed: Of the drawing and the division.
        samples: How many were asked for; ``None`` for all.
    """

    fit: tuple[str, ...]
    held_out: tuple[str, ...]
    source: str
    seed: int
    samples: int | None

    @property
    def sha256(self) -> str:
        """A hash of all texts, in order."""
        return hashlib.sha256(json.dumps([self.fit, self.held_out]).encode()).hexdigest()

    def manifest(self) -> dict[str, Any]:
        """Where the texts came from and how they were divided, JSON-ready, without the texts."""
        return {"source": self.source, "sha256": self.sha256, "seed": self.seed, "samples": self.samples}


def split_texts(
    texts: Sequence[str], *, source: str = "memory", samples: int | None = None, seed: int = 0
) -> CapabilityTexts:
    """Draws ``samples`` of the texts and holds a fifth of them out.

    Args:
        texts: At least two that are not blank.
        source: A name for messages and provenance.
        samples: How many to use; all when omitted or when there are fewer.
        seed: Of the drawing.

    Returns:
        The texts, divided.

    Raises:
        TextsError: There are fewer than two texts, or ``samples`` is less than two.
    """
    if samples is not None and samples < 2:
        raise TextsError(f"samples is {samples}; at least 2 texts are needed, one of them held out")
    usable = list(dict.fromkeys(text for text in texts if text.strip()))
    if len(usable) < 2:
        raise TextsError(f"{source} has {len(usable)} different texts; at least 2 are needed, one of them held out")
    random.Random(seed).shuffle(usable)
    usable = usable[:samples]
    held_out = max(1, round(HELD_OUT_SHARE * len(usable)))
    return CapabilityTexts(
        fit=tuple(usable[held_out:]), held_out=tuple(usable[:held_out]), source=source, seed=seed, samples=samples
    )


def load_texts(path: str | Path) -> list[str]:
    """Reads texts: .jsonl or .json with a ``text`` field (or a list of strings), or .txt split at blank lines.

    Args:
        path: The file.

    Returns:
        The texts, in the file's order.

    Raises:
        TextsError: The file is missing, empty, of another kind, not UTF-8, or not what its name says.
    """
    path = Path(path)
    if not path.is_file():
        raise TextsError(f"there is no file of texts '{path}'")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextsError(f"{path.name} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if path.suffix == ".txt":
        texts = [block.strip() for block in content.replace("\r\n", "\n").split("\n\n")]
    elif path.suffix in (".json", ".jsonl"):
        texts = [_text_of(row, number, path.name) for number, row in _rows(content, path)]
    else:
        raise TextsError(f"{path.name} is not .jsonl, .json or .txt")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise TextsError(f"{path.name} has no text in it")
    return texts


def _rows(content: str, path: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of every row of a JSON file or JSON-lines file."""
    number = 0
    try:
        if path.suffix == ".jsonl":
            for number, line in enumerate(content.split("\n"), 1):  # splitlines() would also split inside strings
                if line.strip():
                    yield number, json.loads(line)
            return
        rows = json.loads(content) if content.strip() else []
    except json.JSONDecodeError as error:
        where = number or error.lineno
        raise TextsError(f"{path.name} line {where} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(rows, list):
        raise TextsError(f"{path.name} must hold a list of texts, not {type(rows).__name__}")
    yield from enumerate(rows, 1)


def _text_of(row: Any, number: int, name: str) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    near = did_you_mean("text", row) if isinstance(row, dict) else ""
    raise TextsError(f"{name} row {number} has no string 'text'{near}; a row is a string or has the field 'text'")


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Right-padded token rows: ``ids`` and ``mask`` (1 for real tokens), both (rows, length) int64."""

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> "TokenBatch":
        """The batch on another device."""
        return TokenBatch(ids=self.ids.to(device), mask=self.mask.to(device))


def pad(rows: Sequence[Sequence[int]], padding: int = PADDING) -> TokenBatch:
    """Rows of token ids as one right-padded batch."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return TokenBatch(ids=ids, mask=mask)


def token_groups(rows: Sequence[TokenRow], batch_tokens: int) -> list[list[TokenRow]]:
    """Rows, ascending in length, as groups of at most ``batch_tokens`` tokens each with their padding.

    Args:
        rows: Token rows, the shortest first.
        batch_tokens: Most tokens of a group (one row longer than that stands alone).

    Returns:
        The groups, none of them empty.
    """
    groups: list[list[TokenRow]] = []
    for row in rows:
        if not groups or len(row) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def text_batches(model: Any, tokenizer: Any, texts: Sequence[str], *, batch_tokens: int = 4096) -> list[TokenBatch]:
    """Texts as batches of token rows, texts of like length together.

    Args:
        model: The causal LM: texts are cut at its context, and at ``MAX_TOKENS``.
        tokenizer: Its tokenizer; the default special tokens are added.
        texts: The texts.
        batch_tokens: Most tokens of a batch, padding included (one long text may exceed it); fewer where
            the vocabulary is so large that their logits would take more than half a gigabyte, or the model so wide
            that one activation inside an MLP would take more than 32 MB: a backward pass keeps some twenty.

    Returns:
        The batches. Texts with fewer than two tokens, which have no next token to predict, are left out.

    Raises:
        TextsError: There is no text, or none has two tokens.
    """
    longest = min(MAX_TOKENS, context_length(model) or MAX_TOKENS)
    if not texts:
        raise TextsError("there is no capability text")
    rows = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
    rows = [row for row in rows if len(row) >= 2]
    if not rows:
        raise TextsError("no capability text has two tokens; there is no next token to predict")
    return row_batches(model, rows, batch_tokens=batch_tokens)


def row_batches(model: Any, rows: Sequence[Sequence[int]], *, batch_tokens: int = 4096) -> list[TokenBatch]:
    """Token rows as batches, rows of like length together.

    Args:
        model: The causal LM.
        rows: At least one.
        batch_tokens: See :func:`text_batches`.

    Returns:
        The batches.
    """
    return [pad(group) for group in row_groups(model, list(map(list, rows)), batch_tokens=batch_tokens)]


def row_groups(model: Any, rows: Sequence[TokenRow], *, batch_tokens: int = 4096) -> list[list[TokenRow]]:
    """Token rows as they go into batches, see :func:`row_batches`."""
    batch_tokens = min(batch_tokens, 2**27 // text_config(model).vocab_size, 2**23 // intermediate_width(model))
    return token_groups(sorted(rows, key=len), batch_tokens)


def next_tokens(batch: TokenBatch) -> Tensor:
    """Labels (rows, length): the next token at every position that has one, −100 elsewhere."""
    labels = torch.full_like(batch.ids, -100)
    labels[:, :-1] = torch.where(batch.mask[:, 1:].bool(), batch.ids[:, 1:], -100)
    return labels
