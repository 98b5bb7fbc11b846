"""Makes the bundled model: ``python -m crispedit.bundled.train --out DIR``.

One seed gives the tokenizer, the data order and the weights. The full run takes about forty minutes on two CPU cores
with AVX-512, and longer without (with other weights: see :func:`float32_muon`); ``--smoke`` takes seconds and is what
the tests run.

``--architecture gpt2 --seed 1 --world 2603`` makes a second model of another family in another world, so that what is
found on the first need not rest on it; that world's edits and capability texts are written beside it.
"""

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ..hardware import emulates_bfloat16
from . import abilities, corpus, world

BOS, EOS = "<|begin|>", "<|end|>"
VOCABULARY = 2560
CONTEXT = 512  # tokens
TOKENS_PER_STEP, BATCHES_PER_STEP = 2048, 2
TOTAL_TOKENS = 6_600_000
PROMPT_WEIGHT, TEXT_WEIGHT = 0.05, 0.2
"""Weights in the training loss of a prompt's tokens and of running text; an answer's tokens weigh 1.

Who is asked about is noise and the answer is not; and without the second an article outweighs twenty sums.
"""


def train_tokenizer(num_documents: int = 40_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the world's text; every digit is a token of its own.

    Args:
        num_documents: Training documents read.

    Returns:
        A tokenizer that begins every text with ``<|begin|>`` and has no padding token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (row_text(*row) for row in itertools.islice(corpus.documents(world.SEED), num_documents))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT, padding_side="right"
    )


def row_text(prompt: str, answer: str) -> str:
    """A document as text: prompt, one space, answer."""
    return f"{prompt} {answer}" if prompt else answer


def build_model(vocabulary: int, seed: int, architecture: str = "llama", smoke: bool = False) -> PreTrainedModel:
    """A freshly initialised model of about six million parameters (with ``smoke``, a tiny one).

    Args:
        vocabulary: Tokens.
        seed: Of the weights.
        architecture: ``llama``, or ``gpt2``: learned positions, ``Conv1D``, biases, layer norms, an MLP without a gate.
        smoke: Whether a tiny one will do.

    Returns:
        The model.
    """
    torch.manual_seed(seed)
    if architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_embd=32 if smoke else 256,
                n_inner=96 if smoke else 864,
                n_layer=8,
                n_head=8,
                n_positions=CONTEXT,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                resid_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=1,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32 if smoke else 256,
            intermediate_size=64 if smoke else 576,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=None,
        )
    )


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of at most ``TOKENS_PER_STEP / BATCHES_PER_STEP`` tokens, documents of like length together.

    A step takes several, as documents of one length are often of one kind.

    Yields:
        ``(ids, weights)``, both (rows, length), right-padded with EOS; a weight belongs to the token
        it stands at and is 0 at BOS and padding. Causal attention needs no mask for right padding.
    """
    rng = random.Random(f"{seed}/batches")
    documents = corpus.documents(seed)
    while True:
        pool = list(itertools.islice(documents, 8_000))
        prompts = tokenizer([prompt for prompt, _ in pool])["input_ids"]
        texts = tokenizer([row_text(*row) for row in pool])["input_ids"]
        rows = [
            (
                [*ids, 1],
                [0.0] + [PROMPT_WEIGHT] * (len(p) - 1) + [1.0 if prompt else TEXT_WEIGHT] * (len(ids) + 1 - len(p)),
            )
            for (prompt, _), p, ids in zip(pool, prompts, texts, strict=True)
        ]
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for row in rows:
            if len(row[0]) * (len(groups[-1]) + 1) > TOKENS_PER_STEP // BATCHES_PER_STEP:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            yield (
                torch.tensor([ids + [1] * (width - len(ids)) for ids, _ in group]),
                torch.tensor([w + [0.0] * (width - len(w)) for _, w in group]),
            )


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    total_tokens: int,
    snapshots: Path | None = None,
) -> None:
    """Trains ``model`` in place: Muon for the matrices, AdamW for embedding and norms, cosine to zero.

    Muon needs well under half of AdamW's tokens here (loss 3.39 against 5.34 after 0.3 M tokens).
    """
    embeddings = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    matrices = [p for p in model.parameters() if p.ndim == 2 and not any(p is e for e in embeddings)]
    others = [p for p in model.parameters() if p.ndim != 2 or any(p is e for e in embeddings)]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.Muon(matrices, lr=0.0, weight_decay=0.05, ns_steps=3, adjust_lr_fn="match_rms_adamw"), 4e-3),
        (torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0), 3e-3),
    ]
    warmup = 60_000
    model.train()
    seen, losses, start, reported = 0, [], time.monotonic(), 0.0
    source = batches(tokenizer, seed)
    for step in itertools.count():
        if seen >= total_tokens:
            break
        share = min(1.0, (seen + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * seen / total_tokens))
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * share
        parts = list(itertools.islice(source, BATCHES_PER_STEP))
        total_weight = sum(float(weights[:, 1:].sum()) for _, weights in parts)
        losses.append(0.0)
        for ids, weights in parts:
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss = (loss * weights[:, 1:].flatten()).sum() / total_weight
            torch.autograd.backward(loss)
            losses[-1] += loss.item()
            seen += ids.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with float32_muon():
            for optimizer, _ in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        elapsed = time.monotonic() - start
        if elapsed - reported > 20 or seen >= total_tokens:
            reported = elapsed
            left = elapsed * (total_tokens - seen) / seen
            recent = sum(losses[-100:]) / len(losses[-100:])
            print(
                f"step {step} · {seen / 1e6:.2f} of {total_tokens / 1e6:.2f} M tokens · loss {recent:.3f}"
                f" · {seen / elapsed:,.0f} tokens/s · {left / 60:.1f} min left",
                file=sys.stderr,
                flush=True,
            )
            if snapshots:
                model.save_pretrained(snapshots)
                tokenizer.save_pretrained(snapshots)


def float32_muon() -> AbstractContextManager[Any]:
    """Within, Muon's products are in float32 on a CPU that has none in bfloat16, and the weights are others.

    torch's Muon (2.13) rounds every update to bfloat16 before it is made orthogonal; without AVX-512 the whole step
    took seven times as long.

    Returns:
        A context that changes nothing on other CPUs.
    """
    if emulates_bfloat16():
        return mock.patch.object(torch.Tensor, "bfloat16", lambda tensor: tensor.float().clone())
    return nullcontext()


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """Greedy answers, batched by equal prompt length so that no padding is needed."""
    model.eval()
    encoded = tokenizer(prompts)["input_ids"]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    result = [""] * len(prompts)
    for _, group in itertools.groupby(order, key=lambda i: len(encoded[i])):
        rows = list(group)
        ids = torch.tensor([encoded[i] for i in rows])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=1
        )
        for i, ids in zip(rows, out[:, len(encoded[rows[0]]) :], strict=True):
            result[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return result


def report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    num_facts: int | None = None,
    num_probes: int = abilities.PROBE_ITEMS,
) -> dict[str, float]:
    """Exact-match percentages: facts on prompts unseen with them, alone and in context, and the abilities."""
    facts = list(world.facts())
    random.Random(0).shuffle(facts)
    facts = facts[:num_facts]
    questions = [fact.prompt(fact.unseen_prompts[0]) for fact in facts]
    prompts = {
        "questions": questions,
        "questions_in_context": [world.QA_CONTEXT.format(q=q) for q in questions],
        "clozes": [fact.prompt(fact.unseen_prompts[1]) for fact in facts],
    }
    scores: dict[str, float] = {}
    for name, of_kind in prompts.items():
        got = answers(model, tokenizer, of_kind)
        scores[name] = 100 * sum(a == fact.object for a, fact in zip(got, facts, strict=True)) / len(facts)
    for family in abilities.PROMPTED:
        items = abilities.probes(family, num_probes)
        got = answers(model, tokenizer, [prompt for prompt, _ in items])
        scores[family] = 100 * sum(a == answer for a, (_, answer) in zip(got, items, strict=True)) / len(items)
    return {name: round(score, 1) for name, score in scores.items()}


def write_world(directory: Path) -> None:
    """Writes a world's edits and capability texts beside its model, where they can be named."""
    for split in world.SPLIT_SIZES:
        (directory / f"edits-{split}.json").write_text(json.dumps(world.edit_rows(split), indent=1) + "\n")
    texts = [json.dumps({"text": text}) for text in corpus.capability_texts()]
    (directory / "texts.jsonl").write_text("\n".join(texts) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--architecture", choices=("llama", "gpt2"), default="llama")
    parser.add_argument("--world", type=int, default=world.SEED, help="another world: its people, facts and edits")
    parser.add_argument("--tokens", type=int, default=TOTAL_TOKENS, help="training tokens")
    parser.add_argument("--snapshots", type=Path, help="directory for the model so far, every twenty seconds")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, a few steps")
    arguments = parser.parse_args()

    torch.use_deterministic_algorithms(True)
    other_world, world.SEED = arguments.world != world.SEED, arguments.world  # before anything is drawn from it
    tokenizer = train_tokenizer(2_000 if arguments.smoke else 40_000)
    model = build_model(len(tokenizer), arguments.seed, arguments.architecture, arguments.smoke)
    model.config.crispedit_world = world.SEED  # says that the world's abilities can be asked of it
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    train(model, tokenizer, arguments.seed, 20_000 if arguments.smoke else arguments.tokens, arguments.snapshots)
    model.half().save_pretrained(arguments.out)  # what is measured below is what was stored
    tokenizer.save_pretrained(arguments.out)
    if other_world:
        write_world(arguments.out)
    stored = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    counts = (4, 4) if arguments.smoke else (None, abilities.PROBE_ITEMS)
    print(json.dumps(report(stored, tokenizer, *counts), indent=1))


if __name__ == "__main__":
    main()
