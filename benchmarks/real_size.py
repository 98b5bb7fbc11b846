"""Does an edit of real size take what plan says? The whole pipeline on 64 edits, in bfloat16, beside its plan.

    python benchmarks/real_size.py --shape Qwen-2.5-0.5B --out real-size.jsonl
    python benchmarks/real_size.py --shape tiny --out real-size.jsonl      # seconds: that it runs
    python benchmarks/real_size.py --table real-size.jsonl

A model of a public shape with random weights whose spectra fall as a trained model's do (:func:`falling`), the bundled
tokenizer and texts; ``crispedit plan`` and ``crispedit edit`` (curvature, eigenproblems, edit, proof, save, read back),
each in a process of its own, on a quiet machine. Measured by :mod:`plan` beside this file: wall seconds and the largest
resident set of every stage. The last line says whether the peak of the whole is within 20 % of what was planned.
"""

import argparse
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import plan
import runs

from crispedit.shapes import SHAPES, shape_config

TINY = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6, "vocab_size": 4096}
WITHIN = 0.2


def build(shape: str, directory: Path) -> None:
    """Writes a random model of a shape in bfloat16, with the bundled tokenizer."""
    import torch
    import transformers

    from crispedit.models import BUNDLED, load_model, model_directory

    config = shape_config(SHAPES[0] if shape == "tiny" else shape)
    assert config is not None
    tokenizer = load_model(BUNDLED).tokenizer
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    smaller = {**TINY, "num_attention_heads": 4, "num_key_value_heads": 2} if shape == "tiny" else {}
    fields = {**config.to_dict(), **special, **smaller}
    fields.pop("layer_types", None)  # of the blocks of the shape, which a smaller model has fewer of
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(type(config)(**fields), dtype=torch.bfloat16)
    falling(model)
    model.save_pretrained(directory)
    for file in Path(model_directory(BUNDLED)).glob("tokenizer*"):
        shutil.copy(file, directory)


def falling(model: Any) -> None:
    """Gives all that is written into the residual stream a covariance whose eigenvalues fall like 1/j, as plan assumes.

    Random weights leave every direction alike: the curvature of such a model has no leading eigenpairs, as that of a
    trained one has, and whole matrices are diagonalised.
    """
    import torch

    width = model.config.hidden_size
    falls = torch.arange(1, width + 1).rsqrt()
    turned = torch.linalg.qr(torch.randn(width, width))[0] * (falls / falls.square().mean().sqrt())
    embedding = model.get_input_embeddings().weight
    writers = [m for name, m in model.named_modules() if name.endswith(("o_proj", "down_proj"))]
    with torch.no_grad():
        embedding.copy_(embedding.float() @ turned.T)
        for module in writers:
            module.weight.copy_(turned @ module.weight.float())


def verdict(row: dict[str, Any]) -> str:
    """Whether plan and measurement agree, in a line."""
    planned = max(stage["bytes"] for stage in row["plan"]["stages"].values())
    measured = max(row["measured"]["bytes"].values())
    ratio = planned / measured
    agree = "agree" if abs(ratio - 1) <= WITHIN else "do not agree"
    return f"{row['model']}: peaks {agree} within {WITHIN:.0%}: {ratio:.2f} planned over measured"


def table(path: Path) -> None:
    """Prints plan and measurement by stage, and a verdict on every run."""
    plan.table(path)
    for row in runs.read(path):
        print(verdict(row))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="Qwen-2.5-0.5B")
    parser.add_argument("--out", type=Path, default=Path("real-size.jsonl"), help="finished runs, one a line")
    parser.add_argument("--table", type=Path, help="print the table of such a file")
    parser.add_argument("--edits", default="bundled:eval")
    parser.add_argument("--options", default="--limit 64 --epochs 4 --samples 100", help="of both commands")
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments.table)
        return
    case = {"model": arguments.shape, "edits": arguments.edits, "options": arguments.options.split()}
    if runs.record(arguments.out, case, partial(plan.run, case, build)) is None:
        sys.exit(1)
    table(arguments.out)


if __name__ == "__main__":
    main()
