"""The file of a curvature: its manifest, its tensors, and what it is called by its content."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .artifacts import read_json
from .errors import ArtifactError
from .factors import Factors
from .moments import Kind, Moment, Sketch

FORMAT = 2
MANIFEST, TENSORS = "curvature.json", "factors.safetensors"


def read_manifest(directory: Path) -> dict[str, Any]:
    """What ``curvature.json`` says of a curvature: everything but the numbers.

    Args:
        directory: The curvature directory.

    Returns:
        Its fields, of this version's format.

    Raises:
        ArtifactError: It is no curvature directory, or one of a format this version does not read.
    """
    if not (directory / MANIFEST).is_file():
        raise ArtifactError(f"'{directory}' is not a curvature directory: it has no {MANIFEST}")
    manifest = read_json(directory / MANIFEST)
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise ArtifactError(f"'{directory}' has curvature format {version}; this version reads {FORMAT}")
    return dict(manifest)


def content_key(about: Mapping[str, Any], kind: Kind) -> str:
    """What a curvature is called by its content: all that its factors depend on.

    Args:
        about: A manifest, or what of it is known before the pass.
        kind: Of the factors.

    Returns:
        24 hexadecimal digits.
    """
    names = ("model_fingerprint", "dtype", "tokenizer", "fisher", "seed")
    content = [FORMAT, kind, list(about["layers"]), about["texts"]["sha256"], *(about[name] for name in names)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def tensors_of_factors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Factors as tensors of a file, on the CPU.

    Args:
        factors: By name of the matrix.

    Returns:
        By name of the matrix and the side; of a sketch its product and its trace.
    """
    return {
        key: tensor
        for name, of_matrix in factors.items()
        for side, moment in (("A", of_matrix.A), ("G", of_matrix.G))
        for key, tensor in _stored(f"{name}/{side}", moment).items()
    }


def factors_of_tensors(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """What :func:`tensors_of_factors` made tensors of.

    Args:
        manifest: Which matrices there are, and of how many tokens.
        tensors: Theirs.

    Returns:
        By name of the matrix.

    Raises:
        KeyError: A tensor, or what the manifest should say, is missing.
    """
    count = manifest["num_tokens"]
    return {
        name: Factors(A=_restored(tensors, f"{name}/A"), G=_restored(tensors, f"{name}/G"), num_tokens=count)
        for name in manifest["matrices"]
    }


def _stored(key: str, moment: Moment) -> dict[str, Tensor]:
    """A moment as tensors of a file."""
    if isinstance(moment, Tensor):
        return {key: moment.cpu().contiguous()}
    trace_of = torch.tensor(moment.trace, dtype=torch.float64)
    return {f"{key}.product": moment.product.cpu().contiguous(), f"{key}.trace": trace_of}


def _restored(tensors: Mapping[str, Tensor], key: str) -> Moment:
    """What :func:`_stored` made tensors of."""
    if f"{key}.product" in tensors:
        return Sketch(tensors[f"{key}.product"], float(tensors[f"{key}.trace"]))
    return tensors[key]
