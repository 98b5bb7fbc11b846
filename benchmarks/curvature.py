"""What the forms of the subspace and the partial eigensolver save, at a large model's shape and on real factors.

    python benchmarks/curvature.py --json curvature.json
    python benchmarks/curvature.py --shape 512 1792 --json small.json

The matrices have spectra that fall like 1/j ** exponent in a random basis (a product of reflections, so that making
them costs little). Times are medians of several runs, ratios are of times taken in one run, one after the other. At
LLaMA-3-8B's shape (4096 × 14336, the default) the dense diagonalisations take most of the time: some minutes on two
cores.

``spectrum_speedup`` is dense diagonalisation of both factors in float32, the cheaper precision, over the partial
spectrum for the cross. ``warm_speedup`` is a partial spectrum from nothing over one that sets out from the spectrum of
before 1 % new tokens were added (1,000 to 100,000; half of them from the distribution of the old, half from one with
another basis), both to the same accuracy, that of the defaults in ``crispedit.eigen``.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crispedit.bundled import corpus
from crispedit.curvature import Curvature
from crispedit.factors import estimate_factors
from crispedit.models import edit_matrices, load_model
from crispedit.subspace import Spectrum, Subspace, cross_threshold, energy_threshold
from crispedit.texts import next_tokens, text_batches


def say(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)


def seconds(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Median wall-clock seconds of some work."""
    times = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def power_law(n: int, exponent: float) -> Tensor:
    """1 / j ** exponent, float64."""
    return torch.arange(1, n + 1, dtype=torch.float64) ** -exponent


def random_matrix(spectrum: Tensor, seed: int, device: torch.device) -> Tensor:
    """A symmetric float32 matrix with a spectrum, in a basis that is a product of eight random reflections."""
    matrix = spectrum.diag().to(device)
    for v in reflections(len(spectrum), seed, device):
        matrix -= 2 * v @ (v.T @ matrix)
        matrix -= 2 * (matrix @ v) @ v.T
    return matrix.float()


def reflections(n: int, seed: int, device: torch.device) -> list[Tensor]:
    """Eight random directions, (n, 1) each."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(n, 1, generator=generator, dtype=torch.float64) for _ in range(8)]
    return [(v / v.norm()).to(device) for v in noise]


def random_tokens(count: int, spectrum: Tensor, seed: int, device: torch.device) -> Tensor:
    """(count, n) float32, normally distributed with the second moment ``random_matrix(spectrum, seed, device)``."""
    generator = torch.Generator().manual_seed(seed + 100)
    tokens = torch.randn(count, len(spectrum), generator=generator, dtype=torch.float64) * spectrum.sqrt()
    tokens = tokens.to(device)
    for v in reflections(len(spectrum), seed, device):
        tokens -= 2 * (tokens @ v) @ v.T
    return tokens.float()


def with_new_tokens(matrix: Tensor, spectrum: Tensor, seed: int, share: float = 0.01, count: int = 1000) -> Tensor:
    """The moment after new tokens: half of them distributed as the old, half with the spectrum in another basis."""
    tokens = torch.cat([random_tokens(count // 2, spectrum, s, matrix.device) for s in (seed, seed + 10)])
    return torch.addmm(matrix, tokens.T, tokens, beta=1 - share, alpha=share / count)


def identity_spectrum(alpha: Tensor, beta: Tensor) -> Spectrum:
    """A complete spectrum without bases: for counting only."""
    return Spectrum(
        alpha=alpha,
        beta=beta,
        input_basis=torch.empty(len(alpha), len(alpha), device="meta"),
        output_basis=torch.empty(len(beta), len(beta), device="meta"),
        traces=(float(alpha.sum()), float(beta.sum())),
        residuals=(torch.zeros_like(alpha), torch.zeros_like(beta)),
    )


def counted(alpha: Tensor, beta: Tensor, energy: float) -> dict[str, Any]:
    """What the forms cost at a cut, by counting."""
    spectrum = identity_spectrum(alpha, beta)
    dense, pivot, cross = (Subspace.of(spectrum, energy, form) for form in ("equation6", "pivot", "cross"))
    size = len(alpha) * len(beta)
    return {
        "energy": energy,
        "staircase_pairs": dense.threshold.num_high / size,
        "cross_pairs": cross.threshold.num_high / size,
        "cross": cross.threshold.cross,
        "pivot_flops": pivot.flops / dense.flops,
        "cross_flops": cross.flops / dense.flops,
        "pivot_storage": pivot.num_bytes / dense.num_bytes,
        "cross_storage": cross.num_bytes / dense.num_bytes,
    }


def measured(shape: tuple[int, int], exponent: float, energy: float, device: torch.device) -> dict[str, Any]:
    """Threshold, projections and spectra at one shape, timed."""
    d_out, d_in = shape
    alpha, beta = power_law(d_in, exponent), power_law(d_out, exponent)
    found: dict[str, Any] = {"shape": shape, "exponent": exponent, "energy": energy}
    found["threshold_seconds"] = seconds(lambda: energy_threshold(alpha, beta, energy), torch.device("cpu"))
    found["cross_threshold_seconds"] = seconds(lambda: cross_threshold(alpha, beta, energy), torch.device("cpu"))

    say("making the factors")
    A, G = random_matrix(alpha, 1, device), random_matrix(beta, 2, device)
    _wait(device)
    started = time.perf_counter()
    top = Spectrum.for_cross(A, G, energy)
    _wait(device)
    found["cross_spectrum_seconds"] = time.perf_counter() - started
    cross = Subspace.of(top, energy, "cross")
    found["cross"] = cross.threshold.cross
    found["storage_ratio"] = (top.input_basis.numel() + top.output_basis.numel()) / (d_in**2 + d_out**2)
    say(f"partial spectra: {found['cross_spectrum_seconds']:.1f} s, cross {cross.threshold.cross}")

    A_later, G_later = with_new_tokens(A, alpha, 1), with_new_tokens(G, beta, 2)
    found["warm_seconds"] = seconds(lambda: Spectrum.for_cross(A_later, G_later, energy, start=top), device, repeats=1)
    found["cold_seconds"] = seconds(lambda: Spectrum.for_cross(A_later, G_later, energy), device, repeats=1)
    say(f"after new tokens: warm {found['warm_seconds']:.1f} s, cold {found['cold_seconds']:.1f} s")

    # the dense diagonalisation in float32, the cheaper one; ours works in float64
    started = time.perf_counter()
    bases = [torch.linalg.eigh(M)[1].flip(1) for M in (A, G)]
    _wait(device)
    found["dense_spectrum_seconds"] = time.perf_counter() - started
    say(f"dense spectra: {found['dense_spectrum_seconds']:.1f} s")
    whole = Spectrum(
        alpha=alpha, beta=beta, input_basis=bases[0].contiguous(), output_basis=bases[1].contiguous(),
        traces=top.traces, residuals=(0 * alpha, 0 * beta),
    )  # fmt: skip
    X = torch.randn(shape, device=device)
    results = {}
    for form, spectrum in (("equation6", whole), ("pivot", whole), ("cross", top)):
        subspace = Subspace.of(spectrum, energy, form)
        results[form] = subspace.project(X)
        found[f"{form}_seconds"] = seconds(lambda s=subspace: s.project(X), device)
        say(f"one projection, {form}: {found[f'{form}_seconds']:.2f} s")
    found["pivot_error"] = float((results["pivot"] - results["equation6"]).norm() / X.norm())
    found["projection_speedup"] = found["equation6_seconds"] / found["pivot_seconds"]
    found["spectrum_speedup"] = found["dense_spectrum_seconds"] / found["cross_spectrum_seconds"]
    found["warm_speedup"] = found["cold_seconds"] / found["warm_seconds"]
    found["warm_speedup_over_dense"] = found["dense_spectrum_seconds"] / found["warm_seconds"]
    return found


def bundled_factors(energies: list[float]) -> list[dict[str, Any]]:
    """The same counts for the bundled model's real factors."""
    loaded = load_model("bundled")
    curvature = Curvature.estimate(loaded.model, loaded.tokenizer, corpus.capability_texts())
    rows = []
    for name in curvature.factors:
        spectrum = curvature.spectrum(name)
        rows += [{"matrix": name, **counted(spectrum.alpha, spectrum.beta, energy)} for energy in energies]
    return rows


def factor_pass() -> dict[str, float]:
    """A factor pass over the bundled texts against a plain forward and backward pass over the same."""
    loaded = load_model("bundled")
    model = loaded.model
    batches = text_batches(model, loaded.tokenizer, corpus.capability_texts())
    matrices = edit_matrices(model)

    def plain() -> None:
        for batch in batches:
            logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), next_tokens(batch).flatten())
            torch.autograd.grad(loss, list(model.parameters()))

    cpu = torch.device("cpu")
    pairs = [
        (seconds(lambda: estimate_factors(model, matrices, batches), cpu, 1), seconds(plain, cpu, 1)) for _ in range(3)
    ]
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    return {"factor_pass_ratio": ratio, "factor_pass_seconds": pairs[0][0]}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shape", nargs=2, type=int, default=[4096, 14336], help="d_out d_in")
    parser.add_argument("--energy", type=float, default=0.8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    shape = (arguments.shape[0], arguments.shape[1])
    energies = [0.5, 0.8, 0.9, 0.99]
    found = measured(shape, 1.0, arguments.energy, torch.device(arguments.device)) | factor_pass()
    found["counts"] = [
        {"exponent": p, **counted(power_law(shape[1], p), power_law(shape[0], p), energy)}
        for p in (0.8, 1.0, 1.2, 1.5)
        for energy in energies
    ]
    found["bundled"] = bundled_factors(energies)
    print(json.dumps({k: v for k, v in found.items() if k not in ("counts", "bundled")}, indent=1))
    print("| spectrum | γ | staircase | cross | pivot: flops | cross: flops | pivot: storage | cross: storage |")
    print("|---|---|---|---|---|---|---|---|")
    for row in [*found["counts"], *found["bundled"]]:
        name = f"1/j^{row['exponent']}" if "exponent" in row else row["matrix"]
        shares = ("staircase_pairs", "cross_pairs", "pivot_flops", "cross_flops", "pivot_storage", "cross_storage")
        print(f"| {name} | {row['energy']} | " + " | ".join(f"{100 * row[share]:.1f} %" for share in shares) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
