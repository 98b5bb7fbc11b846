"""What the commands are given: edits and capability texts by their names, the same for all processes."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from . import __version__, distributed, ranks
from .bundled import corpus, world
from .curvature import Curvature
from .edits import EditSet, edits_from_rows, load_edits
from .errors import ConfigError
from .models import BUNDLED, LoadedModel, fingerprint, tokenizer_hash
from .texts import CapabilityTexts, load_texts, split_texts

BUNDLED_EDITS = "bundled:"


def read_edits(name: str, *, limit: int | None = None, conflicts: str = "error") -> EditSet:
    """Edits from a file, or a split of the bundled world's (``bundled:demo``, ``:eval``, ``:train``).

    Args:
        name: Path, or ``bundled:SPLIT``.
        limit: The first N rows.
        conflicts: What to do with one prompt and several targets.

    Returns:
        The edits.

    Raises:
        ConfigError: There is no such split.
    """
    options: dict[str, Any] = {"limit": limit, "conflicts": conflicts}
    if not name.startswith(BUNDLED_EDITS):
        return load_edits(name, **options)
    split = name.removeprefix(BUNDLED_EDITS)
    if split not in world.SPLIT_SIZES:
        raise ConfigError(f"there are no bundled edits '{split}'; there are {', '.join(world.SPLIT_SIZES)}")
    return edits_from_rows(world.edit_rows(split), source=name, **options)


def has_tasks(model: Any) -> bool:
    """Whether :mod:`crispedit.bundled.train` has made a model, edited or not: the tasks were made for those."""
    return hasattr(model.config, "crispedit_world")


def capability_texts(model: str, path: Path | None, samples: int | None, seed: int) -> CapabilityTexts | None:
    """The capability texts of a file, else the bundled ones for the bundled model, else none.

    Args:
        model: The model's name.
        path: A file of texts.
        samples: How many to use.
        seed: Of drawing and division.

    Returns:
        The texts, divided.
    """
    if path is not None:
        return split_texts(load_texts(path), source=str(path), samples=samples, seed=seed)
    if model == BUNDLED:
        return split_texts(corpus.capability_texts(), source=BUNDLED, samples=samples, seed=seed)
    return None


def check_same(
    loaded: LoadedModel,
    edits: EditSet | None = None,
    texts: CapabilityTexts | Sequence[str] | None = None,
    curvature: Curvature | None = None,
    settings: Any = None,
) -> None:
    """Refuses processes that were not given the same: two hosts may have other files under one name.

    Args:
        loaded: The model.
        edits: The edits.
        texts: The texts, divided or not.
        curvature: A curvature that was read.
        settings: What else the result depends on.

    Raises:
        ConfigError: Something differs; what, and on which host.
    """
    if ranks.size() == 1:
        return
    config = {k: v for k, v in loaded.model.config.to_dict().items() if k != "_name_or_path"}
    divided = texts if texts is None or isinstance(texts, CapabilityTexts) else list(texts)
    distributed.check_equal(
        {
            "the versions": f"{__version__} {torch.__version__} {transformers.__version__}",
            "the model's configurations": _hash(config),
            "the model's weights": fingerprint(loaded.model),
            "the tokenizers": tokenizer_hash(loaded.tokenizer),
            "the edits": edits.sha256 if edits is not None else "",
            "the texts": divided.sha256 if isinstance(divided, CapabilityTexts) else _hash(divided),
            "the curvatures": _hash(curvature.manifest() if curvature is not None else None),
            "the settings": _hash(settings),
        }
    )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
