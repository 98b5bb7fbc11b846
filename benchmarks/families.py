"""Do the defaults work on models nobody tuned for? Other families, widths and depths, other numbers of edits.

    python benchmarks/families.py --out families.jsonl --counts 1 10 100
    python benchmarks/families.py --table families.jsonl

Every model is built from its configuration with the bundled tokenizer's vocabulary and trained on the bundled world's
text for some minutes, so that it has a curvature worth the name and looks at whom it is asked about. Then it is edited
with the defaults: layers, energy, learning rate and epochs as a user gets them.
"""

import itertools
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import runs
import torch
import transformers

from crispedit.bundled import corpus, train
from crispedit.curvature import Curvature
from crispedit.editing import edit
from crispedit.inputs import read_edits
from crispedit.models import BUNDLED, decoder_blocks, load_model
from crispedit.texts import split_texts

SIZES = {  # hidden, inner, blocks, heads
    "narrow": (96, 256, 6, 4),
    "deep": (128, 384, 16, 4),
    "wide": (384, 1536, 4, 6),
}
FAMILIES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "gemma3": transformers.Gemma3TextConfig,
    "gpt2": transformers.GPT2Config,
    "gpt_neox": transformers.GPTNeoXConfig,
}


def build(family: str, size: str, vocabulary: int) -> Any:
    """A freshly initialised model of a family and a size."""
    hidden, inner, blocks, heads = SIZES[size]
    shared = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    if family == "gpt2":
        shape = {"n_embd": hidden, "n_inner": inner, "n_layer": blocks, "n_head": heads, "n_positions": train.CONTEXT}
        shape |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    else:
        shape = {
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": blocks,
            "num_attention_heads": heads,
            "max_position_embeddings": train.CONTEXT,
        }
    if family in ("llama", "qwen2", "gemma3"):
        shape["num_key_value_heads"] = heads // 2
    if family == "gemma3":
        shape |= {"head_dim": hidden // heads, "query_pre_attn_scalar": hidden // heads}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(FAMILIES[family](**shared, **shape))


def trained(family: str, size: str, tokenizer: Any, tokens: int, kept: Path | None) -> Any:
    """A model of a family and a size after some training, in evaluation mode; taken from ``kept`` if it is there."""
    path = kept / f"{family}_{size}" if kept else None
    if path and path.is_dir():
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model = build(family, size, len(tokenizer))
    print(f"{family}, {size}", file=sys.stderr, flush=True)
    train.train(model, tokenizer, 0, tokens)
    if path:
        model.save_pretrained(path)
    return model.eval()


def run(case: dict[str, Any], model: Any, curvature: Curvature, tokenizer: Any, source: str) -> dict[str, Any]:
    """One edit with the defaults, measured by its own proof; the model is as before afterwards."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    started = time.monotonic()
    result = edit(model, tokenizer, read_edits(source, limit=case["count"]), curvature=curvature, **case["settings"])
    model.load_state_dict(before)
    training, metrics = result.metrics["training"], result.metrics
    return {
        **case,
        "blocks": len(decoder_blocks(model)[1]),
        "layers": result.settings["layers"],
        "reliability": metrics["after"]["reliability"],
        "generalization": metrics["after"]["generalization"],
        "drift": metrics["capability"]["drift"],
        "capability_loss": metrics["capability"]["loss_base"],
        "last_loss": training["epoch_losses"][-1],
        "epochs_run": len(training["epoch_losses"]),
        "rate_times_width": training["learning_rates"][0] * max(f.A.shape[0] for f in curvature.factors.values()),
        "seconds": round(time.monotonic() - started, 1),
    }


def table(path: Path) -> None:
    """Prints the runs as a Markdown table."""
    print("| model | layers | edits | settings | rel | gen | drift | loss of the texts | epochs | lr · d_in |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in runs.read(path):
        print(
            f"| {row['family']}, {row['size']} | {row['layers'][0]}–{row['layers'][-1]} of {row['blocks']} "
            f"| {row['count']} | {row['settings'] or ''} | {row['reliability']:.1f} | {row['generalization']:.1f} "
            f"| {row['drift']:.3f} | {row['capability_loss']:.2f} | {row['epochs_run']} "
            f"| {row['rate_times_width']:g} |"
        )


def main() -> None:
    """The command line."""
    parser = runs.options(__doc__)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 10, 100])
    parser.add_argument("--tokens", type=int, default=1_500_000, help="of training before the edit; 0 for none")
    parser.add_argument("--models", type=Path, help="keep trained models in this directory, and take them from it")
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments.table)
        return
    tokenizer = load_model(BUNDLED).tokenizer
    texts = split_texts(corpus.capability_texts(), seed=0)
    for family, size in itertools.product(arguments.families, arguments.sizes):
        model = trained(family, size, tokenizer, arguments.tokens, arguments.models)
        curvature = Curvature.estimate(model, tokenizer, texts)
        for count, settings in itertools.product(arguments.counts, map(json.loads, arguments.set)):
            case = {"family": family, "size": size, "count": count, "tokens": arguments.tokens, "settings": settings}
            row = runs.record(arguments.out, case, partial(run, case, model, curvature, tokenizer, arguments.edits))
            if row:
                print(row, flush=True)


if __name__ == "__main__":
    main()
