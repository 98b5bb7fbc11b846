"""What an edit costs: crispedit's loop, the published algorithm, plain fine-tuning and LoRA, side by side.

    python benchmarks/edit_loop.py --json edit_loop.json
    python benchmarks/edit_loop.py --edits zsre_3k.json --repeats 1
    python benchmarks/edit_loop.py --precision bfloat16 --variants published ft our-ft crispedit exact

A Llama of 176 million random parameters (16 blocks, hidden 768, intermediate 3072, tied vocabulary of 32,000), blocks 9
to 12 edited, synthetic curvature (random bases, 1/j spectra, γ 0.8), 512 edits of the bundled generator, batch 32, 5
epochs.
Every run is a process of its own, so that its peak memory is its own; runs take turns, and ratios are of medians.

The partners are written out here as the paper and the published code have them: ``ft`` runs the whole model forward on
shuffled batches padded to their longest row, logits everywhere, and back as far as the first edited matrix, everything
else frozen; ``published`` projects every gradient with both dense eigenbases (the paper's eq. 6), then takes torch's
Adam step; ``lora`` is PEFT's, rank 8, on the same matrices. Ours run through crispedit's own loop: ``our-ft`` without
constraint; ``crispedit``, what it does by itself with matrices of this width, leading coordinates off a cross;
``exact``, what it does where the staircase is asked for, the update projected; and other rules for comparison.

Keys: ``speedup_vs_published``, ``…_ft`` and ``…_lora`` are seconds of the whole edit, curvature given, of the partner
over those of ``crispedit``; ``exact_…`` the same of ``exact``; ``crisp_step_over_ft_step`` and
``exact_step_over_ft_step`` a step of either over one of ``our-ft``, medians; ``…_projection_share`` the share of a step
that is not in ``our-ft``'s; ``peak_memory_over_ft`` and ``exact_…`` whole-process peaks over those of ``ft``;
``replay_max_rel_diff`` the largest relative difference of final weights between replay and the whole forward pass after
20 steps. ``of peak`` is the roofline: counted flops (torch's counter, in epochs run once more) over seconds, as a
share of the fastest matrix product measured in the same process.

On a GPU: ``--shape llama-3-8b --device cuda --precision bfloat16 --edits zsre_3k.json --count 3000 --epochs 1``; with
``--token-ids`` random tokens of the edits' lengths stand for the edits where no tokenizer is at hand.
"""

import argparse
import itertools
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from crispedit.artifacts import write_json
from crispedit.models import EditMatrix, edit_matrices, frozen
from crispedit.precision import float32_masters
from crispedit.rotation import rotated
from crispedit.rows import EditRow
from crispedit.rule_choice import update_rule
from crispedit.spectrum import Spectrum
from crispedit.subspace import Subspace
from crispedit.training import fine_tune
from crispedit.updates import Unconstrained, UpdateRule, leading_counts

SHAPES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "176m": (
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 16,
            "num_attention_heads": 12,
            "vocab_size": 32000,
            "tie_word_embeddings": True,
        },
        (9, 10, 11, 12),
    ),
    "llama-3-8b": (
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
        (19, 20, 21, 22, 23),
    ),
}
OURS: dict[str, tuple[str, str] | None] = {
    "our-ft": None,
    "crispedit": ("cross", "auto"),
    "exact": ("auto", "auto"),
    "cross-projected": ("cross", "projected"),
    "exact-projected": ("auto", "projected"),
    "coordinates": ("auto", "coordinates"),
}
"""The form of a subspace and the update rule; ``auto`` of either is what crispedit takes by itself at such a width."""
PARTNERS = ("published", "ft", "lora")
RATE = 1e-4


def say(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- what is edited


def build_model(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama with random weights, the same in every process."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(max_position_embeddings=512, **SHAPES[shape][0])
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def edit_rows(edits: str, count: int, token_ids: bool) -> list[EditRow]:
    """The rows of edits by the bundled tokenizer, or random rows of the lengths of ZsRE's."""
    if token_ids:
        rng = random.Random(0)
        rows = []
        for _ in range(count):
            prompt, target = rng.randint(8, 30), rng.randint(2, 8)
            rows.append(EditRow(tuple(rng.randrange(3, 30000) for _ in range(prompt + target)), prompt))
        return rows
    from crispedit.inputs import read_edits
    from crispedit.models import load_model
    from crispedit.rows import Prompter

    tokenizer = load_model("bundled").tokenizer
    return Prompter(tokenizer).rows(read_edits(edits, limit=count, conflicts="first"))


def random_basis(n: int, seed: int, device: torch.device) -> Tensor:
    """An orthogonal matrix, (n, n) float32: eight reflections in random directions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.eye(n, device=device)
    for _ in range(8):
        v = torch.randn(n, 1, generator=generator).to(device)
        v /= v.norm()
        basis -= 2 * v @ (v.T @ basis)
    return basis


def synthetic_spectrum(shape: tuple[int, int], seed: int, device: torch.device) -> Spectrum:
    """Spectra like 1/j in random bases."""
    values = [1 / torch.arange(1, n + 1, dtype=torch.float64) for n in shape[::-1]]
    return Spectrum(
        alpha=values[0],
        beta=values[1],
        input_basis=random_basis(shape[1], 2 * seed, device),
        output_basis=random_basis(shape[0], 2 * seed + 1, device),
        traces=(float(values[0].sum()), float(values[1].sum())),
        residuals=(torch.zeros_like(values[0]), torch.zeros_like(values[1])),
    )


def of_a_cross(spectrum: Spectrum, energy: float) -> Spectrum:
    """What a curvature has computed where a cross is left out: the leading vectors and no others."""
    rows, columns = leading_counts(Subspace.of(spectrum, energy, "cross"))
    known = spectrum.leading(columns + 1, rows + 1)
    return replace(known, input_basis=known.input_basis.clone(), output_basis=known.output_basis.clone())


# ---------------------------------------------------------------- the partners


def plain_loop(model: Any, parameters: Sequence[nn.Parameter], rows: Sequence[EditRow], args: argparse.Namespace,
               project: Callable[[], None] | None = None) -> list[float]:  # fmt: skip
    """Fine-tuning as published: shuffled batches padded to their longest row, the whole model; seconds per step."""
    device, rng, seconds = parameters[0].device, random.Random(0), []
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    for _ in range(args.epochs):
        order = list(rows)
        rng.shuffle(order)
        for first in range(0, len(order), args.batch):
            started = time.perf_counter()
            batch = order[first : first + args.batch]
            width = max(len(row.ids) for row in batch)
            ids = torch.tensor([list(row.ids) + [0] * (width - len(row.ids)) for row in batch], device=device)
            mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in batch], device=device)
            labels = torch.full_like(ids, -100)
            for number, row in enumerate(batch):
                labels[number, row.prompt_length : len(row.ids)] = ids[number, row.prompt_length : len(row.ids)]
            with autocast(args, device):
                loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
            loss.item()  # the published loop reads it in every step
            if project is not None:
                project()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
    return seconds


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """bfloat16 where it was asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16")


def published(model: Any, matrices: Sequence[EditMatrix], rows: Sequence[EditRow], args: argparse.Namespace,
              spectra: Sequence[Spectrum]) -> list[float]:  # fmt: skip
    """The published algorithm: U_G [ (U_Gᵀ ∇ U_A) ⊙ M ] U_Aᵀ with dense bases, then Adam."""
    masks = [Subspace.of(spectrum, args.energy).mask for spectrum in spectra]

    def project() -> None:
        for matrix, spectrum, mask in zip(matrices, spectra, masks, strict=True):
            U_G, U_A = spectrum.output_basis, spectrum.input_basis
            gradient = matrix.parameter.grad
            assert gradient is not None
            matrix.parameter.grad = U_G @ ((U_G.T @ gradient @ U_A) * mask) @ U_A.T

    return plain_loop(model, [m.parameter for m in matrices], rows, args, project)


def lora(model: Any, matrices: Sequence[EditMatrix], rows: Sequence[EditRow], args: argparse.Namespace) -> list[float]:
    """PEFT's LoRA on the same matrices."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        sys.exit("the partner 'lora' needs PEFT: pip install -c constraints.txt peft")
    targets = [matrix.name.removesuffix(".weight") for matrix in matrices]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=targets))
    seconds = plain_loop(adapted, [p for p in adapted.parameters() if p.requires_grad], rows, args)
    adapted.unload()
    return seconds


# ---------------------------------------------------------------- one run


def update_rules(variant: str, matrices: Sequence[EditMatrix], args: argparse.Namespace, device: torch.device,
                 spectra: Sequence[Spectrum]) -> list[UpdateRule]:  # fmt: skip
    """The rules of one of our variants."""
    chosen = OURS[variant]
    if chosen is None:
        return [Unconstrained(matrix.shape, device) for matrix in matrices]
    form, update = chosen
    return [update_rule(update, Subspace.of(s, args.energy, form)) for s in spectra]  # type: ignore[arg-type]


def run(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """One whole edit, curvature given: seconds, steps, memory."""
    device = torch.device(args.device)
    model = build_model(args.shape, device, getattr(torch, args.dtype))
    matrices = edit_matrices(model, SHAPES[args.shape][1])
    rows = edit_rows(args.edits, args.count, args.token_ids)
    form, _ = OURS.get(variant) or ("", "")
    spectra = []
    if variant == "published" or form:
        for number, matrix in enumerate(matrices):
            spectrum = synthetic_spectrum(matrix.shape, number, device)
            spectra.append(of_a_cross(spectrum, args.energy) if form == "cross" else spectrum)
    result: dict[str, Any] = {"variant": variant}
    marks: list[tuple[str, float]] = []

    def edit(epochs: int) -> list[float]:
        asked = argparse.Namespace(**{**vars(args), "epochs": epochs})
        if variant == "published":
            return published(model, matrices, rows, asked, spectra)
        if variant == "ft":
            return plain_loop(model, [m.parameter for m in matrices], rows, asked)
        if variant == "lora":
            return lora(model, matrices, rows, asked)
        rules = update_rules(variant, matrices, asked, device, spectra)
        with rotated(matrices, [rule.frame for rule in rules]):
            trace = fine_tune(
                model, matrices, rules, rows, lr=RATE, epochs=epochs, batch_size=args.batch, stop_loss=0.0,
                start=args.start, precision=args.precision, alike=True if args.weights else None,
                progress=lambda what, *_: marks.append((what, time.perf_counter())),
            )  # fmt: skip
        result["forward"] = trace.forward
        result["rules"] = sorted({type(rule).__name__ for rule in rules})
        times = [at for what, at in marks if what == "edit"]
        return [after - before for before, after in itertools.pairwise(times)]

    with frozen(model), float32_masters(matrices):
        for matrix in matrices:
            matrix.parameter.requires_grad_(True)
        synchronize(device)
        started = time.perf_counter()
        steps = edit(args.epochs)
        synchronize(device)
        result["seconds"] = time.perf_counter() - started
        result["step"] = statistics.median(steps)
        if recorded := [at for what, at in marks if what == "recording"]:
            result["recording"] = recorded[-1] - started
        result["peak_bytes"] = peak_memory(device)
        if args.weights is not None:
            save_file({m.name: m.weight.cpu() for m in matrices}, args.weights)
            return result
        result["peak_flops_per_second"] = matmul_throughput(device, args)
        if args.flops:  # after the measurements: it slows things down
            # of a second epoch: what is recorded before the first belongs to no step
            counts = [count_flops(lambda epochs=epochs: edit(epochs)) for epochs in (1, 2)]
            result["step_flops"] = (counts[1] - counts[0]) / -(-len(rows) // args.batch)
    return result


def added_in_place(_: Any, a: Sequence[int], b: Sequence[int], *__: Any, **___: Any) -> int:
    """Flops of addmm_, of the shapes of its factors."""
    return 2 * a[0] * a[1] * b[1]


def count_flops(work: Callable[[], Any]) -> int:
    """Flops of matrix products by torch's counter, those that are added in place included."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_in_place}) as counter:
        work()
    return int(counter.get_total_flops())


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """The peak of the whole process in bytes; on a GPU that of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def matmul_throughput(device: torch.device, args: argparse.Namespace) -> float:
    """The most flops per second that a matrix product of the model's width and a thousand tokens reaches."""
    dtype = torch.bfloat16 if args.precision == "bfloat16" else getattr(torch, args.dtype)
    config = SHAPES[args.shape][0]
    x = torch.randn(1024, config["hidden_size"], device=device, dtype=dtype)
    w = torch.randn(config["intermediate_size"], config["hidden_size"], device=device, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        synchronize(device)
        started = time.perf_counter()
        nn.functional.linear(x, w)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * x.shape[0] * w.numel() / best


# ---------------------------------------------------------------- all runs


def child(variant: str, args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """A run in a process of its own."""
    values = {**vars(args), **changes, "variants": None, "json": None, "repeats": None, "child": variant}
    command = [sys.executable, __file__]
    for name, value in values.items():
        if value is True:
            command.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"the run of '{variant}' failed with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def replay_difference(args: argparse.Namespace) -> float:
    """The largest ‖W − W'‖ / ‖W'‖ between an edit by replay and by the whole model, after 20 steps."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        weights = []
        for start in ("matrix", "whole"):
            path = Path(directory) / start
            child("our-ft", args, weights=path, start=start, epochs=1, count=20 * args.batch)
            weights.append(load_file(path))
    replayed, whole = weights
    return max(float((replayed[name] - truth).norm() / truth.norm()) for name, truth in whole.items())


def report(runs: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> dict[str, Any]:
    """Medians and ratios of all runs, printed as a table."""
    middle = {
        variant: {
            key: statistics.median(run[key] for run in of_variant if key in run)
            for key in ("seconds", "step", "peak_bytes", "step_flops", "peak_flops_per_second")
        }
        for variant, of_variant in runs.items()
    }
    heads = ("seconds", 9), ("spread", 13), ("step, ms", 9), ("peak, GB", 9), ("GFLOP/step", 11), ("of peak", 8)
    print(f"{'variant':<12} " + " ".join(f"{head:>{width}}" for head, width in heads))
    for variant, m in middle.items():
        times = [run["seconds"] for run in runs[variant]]
        m["share_of_peak"] = m["step_flops"] / m["step"] / m["peak_flops_per_second"]
        print(
            f"{variant:<12} {m['seconds']:>9.1f} {f'{min(times):.1f}-{max(times):.1f}':>13} {1e3 * m['step']:>9.0f} "
            f"{m['peak_bytes'] / 1e9:>9.2f} {m['step_flops'] / 1e9:>11.1f} {m['share_of_peak']:>8.2f}"
        )

    def ratio(key: str, one: str, other: str) -> float | None:
        return middle[one][key] / middle[other][key] if one in middle and other in middle else None

    found: dict[str, float | None] = {}
    for variant, prefix in (("crispedit", ""), ("exact", "exact_")):
        for partner in PARTNERS:
            found[f"{prefix}speedup_vs_{partner}"] = ratio("seconds", partner, variant)
        step = ratio("step", variant, "our-ft")
        found[f"{prefix or 'crisp_'}step_over_ft_step"] = step
        found[f"{prefix or 'crisp_'}projection_share"] = None if step is None else 1 - 1 / step
        found[f"{prefix}peak_memory_over_ft"] = ratio("peak_bytes", variant, "ft")
    return {"ratios": found, "medians": middle, "runs": runs, "settings": {k: str(v) for k, v in vars(args).items()}}


def main() -> None:
    """Parses the command line, runs everything in turns, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="176m")
    parser.add_argument("--edits", default="bundled:train", help="a file of edits, or a bundled split")
    parser.add_argument("--count", type=int, default=512, help="how many edits")
    parser.add_argument("--token-ids", action="store_true", help="random tokens instead of edits")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--energy", type=float, default=0.8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--start", default="matrix", help="the most that our variants replay")
    parser.add_argument("--variants", nargs="+", choices=[*PARTNERS, *OURS], default=[*PARTNERS, *OURS])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--flops", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(run(args.child, args)))
        return
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in args.variants}
    for repeat in range(args.repeats):
        for variant in args.variants:
            found = child(variant, args, flops=repeat == 0)
            runs[variant].append(found)
            say(f"{repeat + 1}/{args.repeats} {variant}: {found['seconds']:.1f} s, step {1e3 * found['step']:.0f} ms")
    result = report(runs, args)
    result["ratios"]["replay_max_rel_diff"] = replay_difference(args)
    for key, value in result["ratios"].items():
        print(f"{key}: {'-' if value is None else f'{value:.3g}'}")
    if args.json is not None:
        write_json(args.json, {**result["ratios"], **{k: v for k, v in result.items() if k != "ratios"}})


if __name__ == "__main__":
    main()
