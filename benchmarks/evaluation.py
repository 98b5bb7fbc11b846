"""What drafts save when a model is asked, and what the proof of an edit costs beside the edit.

    python benchmarks/evaluation.py --json evaluation.json
    python benchmarks/evaluation.py --parts proof --models random --epochs 5
    python benchmarks/evaluation.py --parts wild --edits zsre_3k.json

``drafts``: the questions of the bundled model's proof after an edit, in both contexts, asked without drafts, with the
answers that would be right, with the answers of another time, and by one plain call of transformers' ``generate`` per
batch, in which every row is computed until the last one ends. ``proof``: an edit of the bundled model (200 edits) and
of a random Llama of 53 million parameters (512 edits of the same world, over the bundled tokenizer; its learning rate
is given, as a model that knows nothing has no rate to find), and the seconds of the proof and of saving beside it.
``wild``: the edit prompts of a file (`--edits`), asked of the bundled model in both contexts as ``evaluate`` does, and
one at a time without a cache, token after token; the latter on a sample of the prompts, and scaled (`--sample`). The
same answers are asserted.

Ratios are of processor seconds on the CPU, which other programs do not stretch, and of wall-clock seconds elsewhere.
Every figure is a median.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from crispedit import editing
from crispedit.curvature import Curvature
from crispedit.editing import EditResult, edit
from crispedit.editors import crispedit as editor
from crispedit.edits import Edit, spread
from crispedit.generation import MAX_NEW_TOKENS, Answer, answers
from crispedit.inputs import capability_texts, read_edits
from crispedit.judge import Case, is_exact
from crispedit.models import BUNDLED, load_model
from crispedit.proof import PROOF_EDITS
from crispedit.rows import Prompter
from crispedit.texts import PADDING, token_groups
from crispedit.wild import CONTEXTS, Question, ask, expected_drafts, in_context, questions

PARTS = ("ask", "mean_loss", "drift_from", "write_model", "read_back")


def clock() -> float:
    """Processor seconds; on a GPU wall-clock seconds, when it is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds of some work, and its result."""
    taken = []
    for _ in range(repeats):
        started = clock()
        result = work()
        taken.append(clock() - started)
    return statistics.median(taken), result


def random_llama(vocab_size: int, eos: int) -> Any:
    """53 million random parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=640,
        intermediate_size=1760,
        num_hidden_layers=10,
        num_attention_heads=10,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=eos,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def plain(model: Any, prompter: Prompter, prompts: Sequence[Any]) -> list[str]:
    """Answers by transformers alone, from their definition: no drafts, no stop at a line, no row leaves."""
    encoded = [prompter.prompt(prompt) for prompt in prompts]
    settings = GenerationConfig(
        do_sample=False,
        pad_token_id=PADDING,
        eos_token_id=list(prompter.end_tokens),
        max_new_tokens=MAX_NEW_TOKENS,
    )
    found: dict[tuple[int, ...], str] = {}
    for group in token_groups(sorted(set(encoded), key=len), 4096):
        width = len(group[-1])
        ids = torch.tensor([[PADDING] * (width - len(row)) + list(row) for row in group], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in group], device=model.device)
        out: Tensor = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        texts = prompter.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        found |= {row: text.lstrip().split("\n")[0].strip() for row, text in zip(group, texts, strict=True)}
    return [found[row] for row in encoded]


def with_expected(model: Any, prompter: Prompter, asked: list[Question], context: str) -> list[Answer]:
    """Answers with those that would be right as drafts; to make drafts of them is counted too."""
    return ask(model, prompter, asked, context, drafts=expected_drafts(prompter, asked, context))


def drafts(result: EditResult, edits: list[Edit], repeats: int) -> list[dict[str, Any]]:
    """One row per context: seconds of every way of asking, and whether all ways agree."""
    model, rows = result.model, []
    prompter = Prompter.of(model, result.tokenizer)
    asked = questions(spread(edits, PROOF_EDITS))
    for context in CONTEXTS:
        prompts = [in_context(question.prompt, context) for question in asked]
        known = [[answer.ids] for answer in answers(model, prompter, prompts)]
        by_generate, texts = timed(partial(plain, model, prompter, prompts), repeats)
        without, first = timed(partial(answers, model, prompter, prompts), repeats)
        expected, second = timed(partial(with_expected, model, prompter, asked, context), repeats)
        earlier, third = timed(partial(answers, model, prompter, prompts, drafts=known), repeats)
        rows.append(
            {
                "context": context,
                "prompts": len(prompts),
                "right": sum(a.text == question.expected for a, question in zip(first, asked, strict=True)),
                "generate_seconds": by_generate,
                "leaving_seconds": without,
                "expected_seconds": expected,
                "earlier_seconds": earlier,
                "leaving_speedup": by_generate / without,
                "expected_speedup": by_generate / expected,
                "earlier_speedup": by_generate / earlier,
                "equal": first == second == third and texts == [answer.text for answer in first],
            }
        )
    return rows


def proof(name: str, epochs: int) -> tuple[dict[str, Any], EditResult]:
    """One edit: its seconds, those of its proof, and those of reading back what was saved."""
    bundled = load_model(BUNDLED)
    texts = capability_texts(BUNDLED, None, None, 0)
    assert texts is not None
    edits = list(read_edits("bundled:eval", limit=200 if name == "bundled" else 512))
    settings: dict[str, Any] = {"epochs": epochs}
    curvature = None
    if name == "bundled":
        model, stored = bundled.model, bundled.stored_dtype
        curvature = Curvature.estimate(model, bundled.tokenizer, texts, model_name=BUNDLED)
    else:
        model, stored = random_llama(len(bundled.tokenizer), bundled.tokenizer.eos_token_id), torch.float32
        settings |= {"energy": 0.0, "lr": 5e-4}
    parts: dict[str, list[float]] = {}
    with timing(parts):
        started = clock()
        result = edit(
            model, bundled.tokenizer, edits, texts=texts, curvature=curvature, stored_dtype=stored, **settings
        )
        whole = clock() - started
        with tempfile.TemporaryDirectory() as directory:
            started = clock()
            result.save(Path(directory) / "edited")
            saving = clock() - started
    edited = sum(parts.pop("edit"))
    row = {
        "model": name,
        "edits": len(edits),
        "epochs": len(result.metrics["training"]["epoch_losses"]),
        "edit_seconds": edited,
        "proof_seconds": whole - edited,
        "saving_seconds": saving,
        "proof_over_edit": (whole - edited + saving) / edited,
        "parts": parts,
        "wall_clock": result.metrics["seconds"],
    }
    return row, result


@torch.inference_mode()
def one_at_a_time(model: Any, prompter: Prompter, prompt: Any) -> str:
    """A greedy answer from its definition: the whole row is run anew for every token, until the answer ends."""
    ids, new, text = list(prompter.prompt(prompt)), [], ""
    while len(new) < MAX_NEW_TOKENS and "\n" not in text:
        logits = model(
            input_ids=torch.tensor([ids + new], device=model.device), use_cache=False, logits_to_keep=1
        ).logits
        new.append(int(logits[0, -1].argmax()))
        if new[-1] in prompter.end_tokens:
            break
        text = str(prompter.tokenizer.decode(new, skip_special_tokens=True)).lstrip()
    return text.split("\n")[0].strip()


def wild(source: str, limit: int | None, sample: int, repeats: int) -> dict[str, Any]:
    """Seconds of free answers to edit prompts in both contexts: as ``evaluate`` asks, and one at a time."""
    loaded = load_model(BUNDLED)
    prompter = Prompter.of(loaded.model, loaded.tokenizer)
    edits = list(read_edits(source, limit=limit, conflicts="first"))
    asked = [question for question in questions(edits) if question.kind == "reliability"]
    chosen = sorted(random.Random(0).sample(range(len(asked)), min(sample, len(asked))))
    batched = single = 0.0
    tokens = right = 0
    for context in CONTEXTS:
        seconds, found = timed(partial(with_expected, loaded.model, prompter, asked, context), repeats)
        batched += seconds
        tokens += sum(len(answer.ids) for answer in found)
        right += sum(
            is_exact(Case("", question.expected or "", a.text)) for a, question in zip(found, asked, strict=True)
        )
        started = clock()
        for index in chosen:
            text = one_at_a_time(loaded.model, prompter, in_context(asked[index].prompt, context))
            assert text == found[index].text, (asked[index].prompt, context, text, found[index].text)
        single += (clock() - started) * len(asked) / len(chosen)
    return {
        "edits": source,
        "prompts": len(asked),
        "contexts": len(CONTEXTS),
        "tokens": tokens,
        "right": right,
        "sample": len(chosen),
        "seconds": batched,
        "one_at_a_time_seconds": single,
        "one_at_a_time_scaled": len(chosen) < len(asked),
        "wild_speedup": single / batched,
    }


@contextmanager
def timing(parts: dict[str, list[float]]) -> Iterator[None]:
    """Within, the seconds of every part of an edit are added to a dictionary."""

    def timed_part(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            started = clock()
            result = function(*arguments, **keywords)
            result = list(result) if name == "edit" else result
            parts.setdefault(name, []).append(clock() - started)
            return result

        return run

    with ExitStack() as patches:
        for module, name in ((editor, "edit"), *((editing, name) for name in PARTS)):
            patches.enter_context(patch.object(module, name, timed_part(name, getattr(module, name))))
        yield


def main() -> None:
    """Runs the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("drafts", "proof", "wild"), default=["drafts", "proof", "wild"])
    parser.add_argument("--models", nargs="+", choices=("bundled", "random"), default=["bundled", "random"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--edits", default="bundled:eval", help="of part wild")
    parser.add_argument("--limit", type=int, help="part wild takes the first so many edits")
    parser.add_argument("--sample", type=int, default=200, help="so many prompts are asked one at a time")
    parser.add_argument("--json", type=Path, help="write what is printed to this file too")
    options = parser.parse_args()
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "clock": "wall" if torch.cuda.is_available() else "cpu",
    }
    if "drafts" in options.parts:
        _, result = proof("bundled", options.epochs)
        found["drafts"] = drafts(result, list(read_edits("bundled:eval", limit=200)), options.repeats)
    if "proof" in options.parts:
        found["proof"] = []
        for name in options.models:
            rows = [proof(name, options.epochs)[0] for _ in range(options.repeats)]
            middle = sorted(rows, key=lambda row: row["proof_over_edit"])[len(rows) // 2]
            found["proof"].append({**middle, "all": [row["proof_over_edit"] for row in rows]})
    if "wild" in options.parts:
        found["wild"] = wild(options.edits, options.limit, options.sample, options.repeats)
    text = json.dumps(found, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")
        print(f"written to {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
