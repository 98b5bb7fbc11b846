"""Change what a language model says about chosen things, and leave everything else as it was.

    import crispedit as ce
    edits     = ce.load_edits("zsre_3k.json")
    curvature = ce.Curvature.estimate(model, tokenizer, texts, layers=range(19, 24))
    result    = ce.edit(model, tokenizer, edits, curvature=curvature, energy=0.9)
    result.metrics, result.delta, result.save("edited/")

An independent implementation of CrispEdit (arXiv 2602.15823).
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .checkpoint import load_edited as load_model
    from .curvature import Curvature
    from .editing import EditResult, edit
    from .edits import Edit, EditSet, Locality, load_edits
    from .errors import CrispEditError, EditFailed, InputError
    from .evaluation import evaluate
    from .merging import merge
    from .subspace import Subspace
    from .texts import load_texts

_WHERE = {
    "Curvature": "curvature",
    "Edit": "edits",
    "EditResult": "editing",
    "EditSet": "edits",
    "Locality": "edits",
    "Subspace": "subspace",
    "edit": "editing",
    "evaluate": "evaluation",
    "load_edits": "edits",
    "load_model": "checkpoint:load_edited",
    "load_texts": "texts",
    "merge": "merging",
    "CrispEditError": "errors",
    "EditFailed": "errors",
    "InputError": "errors",
}

__all__ = [
    "CrispEditError",
    "Curvature",
    "Edit",
    "EditFailed",
    "EditResult",
    "EditSet",
    "InputError",
    "Locality",
    "Subspace",
    "__version__",
    "edit",
    "evaluate",
    "load_edits",
    "load_model",
    "load_texts",
    "merge",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: torch and transformers take seconds to import."""
    if name not in _WHERE:
        raise AttributeError(f"module 'crispedit' has no attribute '{name}'")
    module, _, inside = _WHERE[name].partition(":")
    return getattr(importlib.import_module(f".{module}", __name__), inside or name)
