"""Tiny models of many families, built from configuration with random weights, and a tiny real tokenizer.

A family is one entry of ``FAMILIES``; the tests of every family meet a new entry without a change.
"""

from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SPECIAL = ("<pad>", "<s>", "</s>", *CHAT_TOKENS)
CHARACTERS = ("Ċ", "Ġ", *map(chr, range(33, 127)))
"""Printable ASCII as byte-level tokens: ``Ċ`` is a line break, ``Ġ`` a blank."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def tiny_tokenizer(
    *,
    merges: tuple[tuple[str, str], ...] = (),
    begins: bool = True,
    ends: bool = False,
    pad: bool = True,
    eos: bool = True,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE over ASCII in which every character is a token.

    Args:
        merges: Pairs of tokens that make further tokens, also across blanks.
        begins: Whether texts get a leading ``<s>``.
        ends: Whether texts get a trailing ``</s>``.
        pad: Whether there is a padding token.
        eos: Whether there is an end-of-sequence token.
        chat_template: Its chat template.
    """
    tokens = [*SPECIAL, *CHARACTERS, *(left + right for left, right in merges)]
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = TemplateProcessing(
        single=" ".join(["<s>"] * begins + ["$A"] + ["</s>"] * ends), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>" if eos else None,
        pad_token="<pad>" if pad else None,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


class Family(NamedTuple):
    """How to build a tiny model of a family, and the name of its down-projections."""

    config: str
    settings: dict[str, Any]
    down: str = "model.layers.{}.mlp.down_proj.weight"


_WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
_GROUPED = {**_WIDTHS, "num_key_value_heads": 2}
_SLIDING = {**_GROUPED, "head_dim": 8, "sliding_window": 16}
_GPT2 = {"n_embd": 32, "n_inner": 48, "n_layer": 4, "n_head": 4}
_GPT2_DOWN, _NEOX_DOWN = "transformer.h.{}.mlp.c_proj.weight", "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight"

FAMILIES = {
    "llama": Family("LlamaConfig", _GROUPED),
    "qwen2": Family("Qwen2Config", _GROUPED),
    "qwen3": Family("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "mistral": Family("MistralConfig", _SLIDING),
    "gemma2": Family("Gemma2Config", {**_SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3": Family("Gemma3TextConfig", {**_SLIDING, "query_pre_attn_scalar": 8}),
    "phi3": Family("Phi3Config", _GROUPED),
    "gpt2": Family("GPT2Config", _GPT2, _GPT2_DOWN),
    "gpt_neox": Family("GPTNeoXConfig", _WIDTHS, _NEOX_DOWN),
    "olmo2": Family("Olmo2Config", _GROUPED),
}
_SQUARE = {**_WIDTHS, "intermediate_size": 32}
AWKWARD = {  # every matrix of a block that can be is 32 × 32
    "llama, square": Family("LlamaConfig", _SQUARE),
    "qwen3, square": Family("Qwen3Config", {**_SQUARE, "num_key_value_heads": 4, "head_dim": 8}),
    "gpt2, square": Family("GPT2Config", {**_GPT2, "n_inner": 32}, _GPT2_DOWN),
    "gpt2, no n_inner": Family("GPT2Config", {**_GPT2, "n_inner": None}, _GPT2_DOWN),
    "gpt_neox, square": Family("GPTNeoXConfig", _SQUARE, _NEOX_DOWN),
}
EXPERTS = {
    "mixtral": Family("MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "olmoe": Family("OlmoeConfig", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Family(
        "Qwen3MoeConfig", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    ),
}
_ALL = FAMILIES | AWKWARD | EXPERTS


def tiny_model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A tiny random causal LM in evaluation mode, for :func:`tiny_tokenizer`.

    Args:
        name: A key of ``FAMILIES``, ``AWKWARD`` or ``EXPERTS``.
        dtype: Of its weights.
        seed: Of its weights.
        **changes: To the configuration.
    """
    settings = {
        "vocab_size": len(SPECIAL) + len(CHARACTERS) + 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.25,  # embeddings so wide that the model can be certain of an answer
        **_ALL[name].settings,
        **changes,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, _ALL[name].config)(**settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
