"""Objects of the package made by hand, for tests that need one and not what it stands for."""

from typing import Any

from crispedit.curvature import Curvature
from crispedit.factors import Factors


def curvature_of(factors: dict[str, Factors], **changes: Any) -> Curvature:
    """A curvature with given factors; of its other fields, those that matter to a test may be given."""
    about = {
        "layers": tuple(range(len(factors))),
        "fisher": "mc",
        "model_name": "m",
        "model_revision": None,
        "model_fingerprint": "f",
        "dtype": "float32",
        "tokenizer": "k",
        "chat_template": None,
        "held_out": ("a text",),
        "texts": {"source": "s", "sha256": "t", "seed": 0, "samples": None},
        "seed": 0,
    }
    return Curvature(factors=factors, **about | changes)
