"""Shapes of some public models, so that an edit of them can be planned where there is nothing to load.

Numbers are those of the ``config.json`` that their authors publish (Qwen/Qwen2.5-0.5B, Qwen/Qwen2.5-1.5B,
meta-llama/Meta-Llama-3-8B, meta-llama/Meta-Llama-3-70B, meta-llama/Llama-3.1-405B on huggingface.co; The Llama 3 Herd
of Models, arXiv 2407.21783, Table 3; Qwen2.5 Technical Report, arXiv 2412.15115, Table 1). Weights are bfloat16.
"""

from typing import Any

import transformers

_QWEN = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True}
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False}
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_SHAPES: dict[str, tuple[dict[str, Any], tuple[int, int, int, int, int]]] = {
    "Qwen-2.5-0.5B": (_QWEN, (896, 4864, 24, 14, 2)),
    "Qwen-2.5-1.5B": (_QWEN, (1536, 8960, 28, 12, 2)),
    "Llama-3-8B": (_LLAMA, (4096, 14336, 32, 32, 8)),
    "Llama-3-70B": (_LLAMA, (8192, 28672, 80, 64, 8)),
    "Llama-3-405B": (_LLAMA, (16384, 53248, 126, 128, 8)),
}
SHAPES = tuple(_SHAPES)
"""The names, in ascending size."""


def shape_config(name: str) -> Any | None:
    """The configuration of a public model by the name of its shape.

    Args:
        name: One of :data:`SHAPES`, in upper or lower case.

    Returns:
        A transformers configuration; ``None`` for any other name.
    """
    known = next((shape for shape in SHAPES if shape.lower() == name.lower()), None)
    if known is None:
        return None
    family, numbers = _SHAPES[known]
    options = {**family, **dict(zip(_FIELDS, numbers, strict=True)), "dtype": "bfloat16"}
    return transformers.AutoConfig.for_model(**options)
