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


class WordTokenizer:
    """Every word is a token."""

    pad_token_id = None
    eos_token_id = 2

    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        return {"input_ids": [[3 + len(word) for word in text.split()][:max_length] for text in texts]}


def long_texts() -> list[str]:
    words = [chr(97 + i) * (1 + i) for i in range(20)]
    return [" ".join(words[(i * j) % 20] for j in range(1, 12 + i % 7)) for i in range(40)]
