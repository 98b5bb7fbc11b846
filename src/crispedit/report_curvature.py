"""The curvature in a report: where it is found, and its spectra and staircases as plain numbers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import cache
from .curvature import Curvature
from .curvature_file import read_manifest
from .description import ENERGY, known_spectrum
from .errors import ArtifactError, ModelError
from .plot import NEAR_ZERO, Line, Points, boundary
from .progress import Progress, no_progress

IDENTITY = ("model_fingerprint", "layers", "tokenizer", "fisher", "factors", "dtype", "seed")
"""Fields of a manifest in which two curvatures of the same texts must agree to be the same."""
APART = 0.012
"""Decades between two points of a line that are both drawn: about a pixel."""


def find_curvature(record: Mapping[str, Any] | None, path: Path | None = None) -> Curvature | None:
    """The curvature that a model was edited with.

    Args:
        record: The model's ``crispedit.json``, if it has one.
        path: A directory that the user named, in place of the recorded one.

    Returns:
        That of ``path``; else the recorded one, from where it was or from the cache; ``None`` where there is none.

    Raises:
        ModelError: The curvature of ``path`` is of other weights than those that were edited.
    """
    recorded = (record or {}).get("curvature")
    if path is not None:
        found = Curvature.load(path)
        edited = (record or {}).get("model", {}).get("fingerprint", found.model_fingerprint)
        if found.model_fingerprint != edited:
            raise ModelError(f"the curvature in '{path}' is of other weights than those that were edited; name theirs")
        return found
    if not recorded:
        return None
    named = ((record or {}).get("job") or {}).get("curvature")
    if named and (there := _load_same(Path(named), recorded)) is not None:
        return there
    try:
        identity = {name: recorded[name] for name in IDENTITY}
        key = (identity.pop("model_fingerprint"), identity.pop("layers"), identity.pop("tokenizer"))
        return cache.find(*key, texts_sha256=recorded["texts"]["sha256"], **identity)
    except (KeyError, TypeError):
        return None  # a record of another version


def _load_same(path: Path, recorded: Mapping[str, Any]) -> Curvature | None:
    """The curvature in a directory, if it can be read and is the recorded one: a report is written without, too."""
    try:
        return Curvature.load(path) if _same(read_manifest(path), recorded) else None
    except (ArtifactError, KeyError, TypeError):
        return None


def _same(manifest: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    return manifest["texts"]["sha256"] == recorded["texts"]["sha256"] and all(
        manifest[name] == recorded[name] for name in IDENTITY
    )


def curvature_data(curvature: Curvature, energy: float = ENERGY, *, progress: Progress = no_progress) -> dict[str, Any]:
    """What a report draws of a curvature.

    Args:
        curvature: The curvature.
        energy: γ in [0, 1) that is marked.
        progress: Called after every matrix.

    Returns:
        The report's ``curvature``; see docs/evaluation.md.
    """
    matrices = []
    for layer, (name, factors) in zip(curvature.layers, curvature.factors.items(), strict=True):
        points = Points.of(known_spectrum(factors), energy)
        matrices.append({"name": name, "layer": layer, **_drawn(points)})
        progress("spectra for the report", len(matrices), len(curvature.factors))
    return {
        "model": last_name(curvature.model_name),
        "fisher": curvature.fisher,
        "factors": curvature.kind,
        "tokens": curvature.num_tokens,
        "texts": last_name(str(curvature.texts["source"])),
        "energy": energy,
        "matrices": matrices,
    }


def _drawn(points: Points) -> dict[str, Any]:
    d_out, d_in = points.shape
    size = d_out * d_in
    staircase = cross = None
    if points.staircase is not None:
        counts = points.staircase.counts
        staircase = {
            "directions": _short(points.staircase.num_high / size),
            "captured": _short(points.staircase.captured),
            "rows": int((counts > 0).sum()),
            "columns": int(counts[0]),
            "line": _thin(boundary(counts)),
        }
    if points.cross is not None:
        rows, columns = points.cross.cross or (0, 0)
        cross = {
            "directions": _short(points.cross.num_high / size),
            "captured": _short(points.cross.captured),
            "rows": rows,
            "columns": columns,
        }
    return {
        "d_out": d_out,
        "d_in": d_in,
        "inputs": _thin(_visible(points.inputs)),
        "outputs": _thin(_visible(points.outputs)),
        "staircase": staircase,
        "cross": cross,
        "held": _thin(points.held),
        "held_by_crosses": _thin(points.held_by_crosses),
    }


def _visible(line: Line) -> Line:
    """A descending spectrum without what is rounding in float32."""
    count = sum(y >= NEAR_ZERO for y in line[1])
    return line[0][:count], line[1][:count]


def _thin(line: Line) -> list[list[float]]:
    """The points (x, y) of a line on log axes that are a pixel or more from the one before; and the last."""
    kept: list[list[float]] = []
    last = None
    for x, y in zip(*line, strict=True):
        at = math.log10(x), math.log10(y)
        if last is None or math.dist(at, last) >= APART:
            kept.append([_short(x), _short(y)])
            last = at
    if line[0] and kept[-1] != (end := [_short(line[0][-1]), _short(line[1][-1])]):
        kept.append(end)
    return kept


def _short(value: float) -> float:
    """Six digits: more cannot be seen."""
    return float(f"{value:.6g}")


def last_name(path: str) -> str:
    """A model or file without the directories above it; what is no path, such as a name on a hub, as it is."""
    return Path(path).name if Path(path).is_absolute() or Path(path).exists() else path
