"""The cache of curvatures: computed once per model, found again by what they are of, not by a name.

An entry is a curvature directory, or a JSON file that points to one elsewhere. Its name is a hash of the
model's weights, the layers, the texts, the Fisher type and the seed. The cache lies in ``CRISPEDIT_CACHE``,
else in ``~/.cache/crispedit``.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .artifacts import read_json, write_json
from .curvature import MANIFEST, Curvature
from .errors import ArtifactError


def cache_directory() -> Path:
    """Where curvatures are kept."""
    root = os.environ.get("CRISPEDIT_CACHE") or Path.home() / ".cache" / "crispedit"
    return Path(root) / "curvature"


def _key(model_fingerprint: str, layers: Sequence[int], texts_sha256: str, fisher: str, seed: int) -> str:
    content = json.dumps([model_fingerprint, list(layers), texts_sha256, fisher, seed])
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _key_of(manifest: Mapping[str, Any]) -> str:
    m = manifest
    return _key(m["model_fingerprint"], m["layers"], m["texts"]["sha256"], m["fisher"], m["seed"])


def keep(curvature: Curvature) -> Path:
    """Puts a curvature into the cache: a pointer if it is on disk already, else a copy.

    Args:
        curvature: The curvature.

    Returns:
        The directory where it can be read.
    """
    key = _key_of(curvature.manifest())
    if curvature.path is not None:
        write_json(cache_directory() / f"{key}.json", {"path": str(curvature.path.absolute())})
        return curvature.path
    return curvature.save(cache_directory() / key, overwrite=True)


def find(
    model_fingerprint: str,
    layers: Sequence[int],
    *,
    texts_sha256: str | None = None,
    fisher: str | None = None,
    seed: int | None = None,
) -> Curvature | None:
    """A cached curvature of these weights and layers.

    Args:
        model_fingerprint: Of the model.
        layers: The layers that must be in it, exactly.
        texts_sha256: Of its texts, where they matter.
        fisher: Its Fisher type, where it matters.
        seed: Its seed, where it matters.

    Returns:
        The newest match, or ``None``.
    """
    wanted: dict[str, Any] = {"model_fingerprint": model_fingerprint, "layers": list(layers)}
    wanted |= {} if fisher is None else {"fisher": fisher}
    wanted |= {} if seed is None else {"seed": seed}
    for directory in sorted(_directories(), key=lambda d: (d / MANIFEST).stat().st_mtime, reverse=True):
        try:
            manifest = read_json(directory / MANIFEST)
            same_texts = texts_sha256 in (None, manifest["texts"]["sha256"])
            if same_texts and all(manifest.get(name) == value for name, value in wanted.items()):
                return Curvature.load(directory)
        except (ArtifactError, KeyError, TypeError):
            continue  # a damaged entry is as good as none: what it held will be computed again
    return None


def _directories() -> Iterator[Path]:
    root = cache_directory()
    if not root.is_dir():
        return
    for entry in root.iterdir():
        directory = entry
        if entry.suffix == ".json":
            try:
                directory = Path(read_json(entry)["path"])
            except (ArtifactError, KeyError, TypeError):
                continue
        if (directory / MANIFEST).is_file():
            yield directory
