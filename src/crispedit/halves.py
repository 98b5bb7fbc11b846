"""The factors of texts by halves: two passes, so that what one half says can be held against the other.

The first half's sums are on disk while the second's are made; the two are merged, and described, matrix by matrix. Of
several processes each has the sums of its share of either half; they are added up when the halves are merged.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from . import distributed, ranks
from .description import Description, describe
from .errors import TextsError
from .factors import Factors, FactorSums, factors_of, merge_factors
from .memory import give_back
from .models import EditMatrix
from .pass_state import own_state, saved_sums
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
    one_pass: Callable[..., dict[str, FactorSums]],
    matrices: Sequence[EditMatrix],
    halves: Sequence[Sequence[TokenBatch]],
    seed: int,
    energy: float,
    directory: Path,
    progress: Progress,
) -> tuple[dict[str, Factors], dict[str, Description]]:
    """Passes over the halves, the first one's sums on disk meanwhile; merged and described matrix by matrix."""
    total, behind = sum(map(len, halves)), 0
    files = [directory / f"half-{number}.safetensors" for number in range(len(halves))]
    last: dict[str, FactorSums] = {}
    finished: list[Any] = []
    for number, (batches, file) in enumerate(zip(halves, files, strict=True)):
        last = {}  # free the first half's sums before the second's are summed

        def report(what: str, done: int, _: int, behind: int = behind) -> None:
            progress(what, behind + done, total)

        last = one_pass(batches, seed=len(halves) * seed + number, resume=file, progress=report)
        behind += len(batches)
        give_back()
        if number < len(halves) - 1:
            finished.append(safe_open(own_state(file), "pt"))
    factors: dict[str, Factors] = {}
    description: dict[str, Description] = {}
    waiting: dict[str, list[Factors]] = {}
    owners = distributed.owners([sum(size**3 for size in matrix.shape) for matrix in matrices])
    for number, (matrix, owner) in enumerate(zip(matrices, owners, strict=True)):
        earlier = zip(map(own_state, files[:-1]), finished, strict=True)
        sums = [*(saved_sums(*file, matrix) for file in earlier), last.pop(matrix.name)]
        parts = [factors_of(matrix.name, of_half) for of_half in sums]
        factors[matrix.name] = merge_factors(parts)
        if owner == ranks.rank():
            waiting[matrix.name] = parts if len(parts) == 2 else []
        if (
            ranks.size() == 1 or number == len(matrices) - 1
        ):  # others must not wait for it: what is described is diagonalised
            for name in list(waiting):
                description[name] = describe(factors[name], waiting.pop(name), energy)
        progress("describing the curvature", number + 1, len(matrices))
    if ranks.in_step():  # a model is divided because devices are too small for it: they have better to hold
        factors = {name: of_matrix.to(torch.device("cpu")) for name, of_matrix in factors.items()}
    return factors, _of_all(description, [matrix.name for matrix in matrices])


def _of_all(described: dict[str, Description], names: Sequence[str]) -> dict[str, Description]:
    """The descriptions that the processes have made, in the order of the matrices."""
    if ranks.size() == 1:
        return described
    found = {name: about for of_one in distributed.gather(_as_json(described)) for name, about in of_one.items()}
    return {name: Description.from_json(found[name]) for name in names}


def _as_json(described: dict[str, Description]) -> dict[str, dict[str, Any]]:
    return {name: asdict(about) for name, about in described.items()}
