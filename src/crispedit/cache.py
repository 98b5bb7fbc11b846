"""The cache of curvatures: computed once per model, found again by what they are of, not by a name.

An entry is a curvature directory, or a JSON file that points to one elsewhere. Its name is a hash of all that its
factors depend on (:func:`crispedit.curvature_file.content_key`). The cache lies in ``CRISPEDIT_CACHE``, else in
``~/.cache/crispedit``; beside the curvatures lie the states of passes under way and the replies of judges.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .artifacts import read_json, write_json
from .curvature import Curvature
from .curvature_file import MANIFEST, content_key
from .errors import ArtifactError


def cache_directory() -> Path:
    """Where curvatures are kept."""
    root = os.environ.get("CRISPEDIT_CACHE") or Path.home() / ".cache" / "crispedit"
    return Path(root) / "curvature"


def replies_file() -> Path:
    """Where the replies of judges are kept."""
    return cache_directory().with_name("judges") / "replies.sqlite"


def passes_directory() -> Path:
    """Where the states of unfinished passes are kept; those that nobody touched for a month are removed."""
    root = cache_directory().with_name("passes")
    if root.is_dir():
        for entry in root.iterdir():
            if time.time() - _modified(entry) > 30 * 24 * 3600:
                shutil.rmtree(entry, ignore_errors=True)
    return root


def _modified(path: Path) -> float:
    """When a path was last changed; long ago if another process has removed it meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def keep(curvature: Curvature) -> Path:
    """Puts a curvature into the cache: a pointer if it is on disk already, else a copy.

    Args:
        curvature: The curvature.

    Returns:
        The directory where it can be read.
    """
    key = content_key(curvature.manifest(), curvature.kind)
    if curvature.path is not None:  # the main process writes, here and there
        write_json(cache_directory() / f"{key}.json", {"path": str(curvature.path.absolute())})
        return curvature.path
    return curvature.save(cache_directory() / key, overwrite=True)


def find(model_fingerprint: str, layers: Sequence[int], tokenizer: str, **wanted: Any) -> Curvature | None:
    """A cached curvature of these weights, layers and this tokenizer.

    Args:
        model_fingerprint: Of the model.
        layers: The layers that must be in it, exactly.
        tokenizer: Hash of the tokenizer.
        **wanted: Other fields of the manifest that matter (``fisher``, ``factors``, ``dtype``, ``seed``);
            ``texts_sha256`` for the texts'.

    Returns:
        The newest match with dense factors, else the newest, or ``None``.
    """
    texts_sha256 = wanted.pop("texts_sha256", None)
    wanted |= {"model_fingerprint": model_fingerprint, "layers": list(layers), "tokenizer": tokenizer}
    matches = []
    for directory in _directories():
        try:
            manifest = read_json(directory / MANIFEST)
            same_texts = texts_sha256 in (None, manifest["texts"]["sha256"])
            if same_texts and all(manifest.get(name) == value for name, value in wanted.items()):
                matches.append((manifest["factors"] == "dense", _modified(directory / MANIFEST), directory))
        except (ArtifactError, KeyError, TypeError, AttributeError):
            continue  # a damaged entry is as good as none: what it held will be computed again
    for _, _, directory in sorted(matches, reverse=True):
        try:
            return Curvature.load(directory)
        except ArtifactError:
            continue
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
