"""The factors of texts by halves: two passes, so that what one half says can be held against the other.

The first half's factors are on disk while the second's are summed; the two are merged, and described, matrix by matrix.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .description import Description, describe
from .errors import TextsError
from .factors import Factors, merge_factors, saved_factors
from .models import EditMatrix
from .progress import Progress
from .texts import TokenBatch, text_batches


def pass_key(key: str, halves: Sequence[Sequence[TokenBatch]]) -> str:
    """The key of a curvature, and the very batches of its pass: another version may put them together otherwise."""
    digest = hashlib.sha256(key.encode())
    for batch in (batch for batches in halves for batch in batches):
        digest.update(str(tuple(batch.ids.shape)).encode() + batch.ids.numpy().tobytes() + batch.mask.numpy().tobytes())
    return digest.hexdigest()


def token_halves(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[list[TokenBatch]]:
    """Token batches of every other text and of the rest; of all together where a half would be empty."""
    try:
        return [text_batches(model, tokenizer, half) for half in (texts[0::2], texts[1::2])]
    except TextsError:
        return [text_batches(model, tokenizer, texts)]


def factors_of_halves(
    one_pass: Callable[..., dict[str, Factors]],
    matrices: Sequence[EditMatrix],
    halves: Sequence[Sequence[TokenBatch]],
    seed: int,
    energy: float,
    directory: Path,
    progress: Progress,
) -> tuple[dict[str, Factors], dict[str, Description]]:
    """Passes over the halves, the first one's factors on disk meanwhile; merged and described matrix by matrix."""
    total, behind = sum(map(len, halves)), 0
    files = [directory / f"half-{number}.safetensors" for number in range(len(halves))]
    last: dict[str, Factors] = {}
    finished: list[Any] = []
    for number, (batches, file) in enumerate(zip(halves, files, strict=True)):
        last = {}  # free the first half's before the second's are summed

        def report(what: str, done: int, _: int, behind: int = behind) -> None:
            progress(what, behind + done, total)

        last = one_pass(batches, seed=len(halves) * seed + number, resume=file, progress=report)
        behind += len(batches)
        if number < len(halves) - 1:
            finished.append(safe_open(file, "pt"))
    factors, description = {}, {}
    for number, matrix in enumerate(matrices):
        earlier = zip(files[:-1], finished, strict=True)
        parts = [*(saved_factors(*file, matrix.name) for file in earlier), last.pop(matrix.name)]
        parts = [_on(part, matrix.parameter.device) for part in parts]
        factors[matrix.name] = merge_factors(parts)
        description[matrix.name] = describe(factors[matrix.name], parts if len(parts) == 2 else (), energy)
        progress("describing the curvature", number + 1, len(matrices))
    return factors, description


def _on(factors: Factors, device: torch.device) -> Factors:
    return replace(factors, A=factors.A.to(device), G=factors.G.to(device))
