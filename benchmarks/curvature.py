"""What the forms of the subspace and the partial eigensolver save, at a large model's shape and on real factors.

    python benchmarks/curvature.py --json curvature.json
    python benchmarks/curvature.py --parts full --shape 512 1792 --json small.json

``full``: matrices with spectra that fall like 1/j in a random basis (a product of reflections, so that making them
costs little), at LLaMA-3-8B's shape (4096 × 14336); the dense diagonalisations take some minutes on two cores.
``scan``: a quarter of that shape at several exponents and energies. ``bundled``: the bundled model's real factors.
``counts``: flops and storage by counting. ``pass``: the price of factors. ``sketch``: sketched factors of the bundled
model against dense ones. ``memory``: ``crispedit curvature`` as a process, dense and sketched, on a random model of
hidden width 2048 and intermediate width 8192 with five blocks.

Ratios are of times taken in one run, one after the other; short ones are medians of three.

``spectrum_speedup`` is dense diagonalisation of both factors in float32, the cheaper precision, over the partial
spectrum for the cross. New tokens, 1 % of all (1,000 to 100,000), come half from the distribution of the old, half from
one with another basis. ``warm_speedup`` is the partial spectrum of the new factors from nothing over an update of the
old one (:meth:`crispedit.subspace.Spectrum.updated`): both give a cross that holds γ for certain; what they hold, and
how many directions that takes, is printed. The update's vectors are leading ones to second order in energy only;
``warm_eigenvectors_speedup`` is for the same accuracy of the vectors themselves.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crispedit.bundled import corpus
from crispedit.curvature import Curvature
from crispedit.description import held
from crispedit.estimation import estimate_factors
from crispedit.factors import Factors
from crispedit.merging import merge
from crispedit.models import edit_matrices, load_model
from crispedit.spectrum import Spectrum
from crispedit.subspace import Subspace, cross_overlap
from crispedit.texts import next_tokens, text_batches
from crispedit.threshold import cross_threshold, energy_threshold


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


def measured(A: Tensor, G: Tensor, later: tuple[Tensor, Tensor], energy: float) -> dict[str, Any]:
    """Threshold, projections and spectra of two factors, timed; ``later`` are the factors after new tokens."""
    device, shape = A.device, (len(G), len(A))
    one, other = (Factors(A=a, G=g, num_tokens=1) for a, g in ((A, G), later))
    found: dict[str, Any] = {"shape": shape, "energy": energy}
    spectra = {}
    for name, solve in (
        ("cross", lambda: Spectrum.for_cross(A, G, energy)),
        ("cold", lambda: Spectrum.for_cross(*later, energy)),
        ("warm", lambda: spectra["cross"].updated(*later, energy)),
        ("warm_eigenvectors", lambda: Spectrum.for_cross(*later, energy, start=spectra["cross"])),
    ):
        _wait(device)
        started = time.perf_counter()
        spectra[name] = solve()
        _wait(device)
        found[f"{name}_seconds"] = time.perf_counter() - started
        cross = Subspace.of(spectra[name], energy, "cross")
        found[f"{name}_cross"] = cross.threshold.cross
        found[f"{name}_directions"] = cross.threshold.num_high
        found[f"{name}_held"] = held(cross, one if name == "cross" else other)
        say(f"{name}: {found[f'{name}_seconds']:.2f} s, {cross.threshold.cross} holds {found[f'{name}_held']:.6f}")
    top = spectra["cross"]
    found["storage_ratio"] = (top.input_basis.numel() + top.output_basis.numel()) / (shape[0] ** 2 + shape[1] ** 2)

    _wait(device)
    started = time.perf_counter()
    values, bases = zip(*(torch.linalg.eigh(M) for M in (A, G)), strict=True)  # in float32; ours works in float64
    _wait(device)
    found["dense_seconds"] = time.perf_counter() - started
    say(f"dense: {found['dense_seconds']:.2f} s")
    alpha, beta = (v.flip(0).clamp(min=0).double().cpu() for v in values)
    found["threshold_seconds"] = seconds(lambda: energy_threshold(alpha, beta, energy), torch.device("cpu"))
    found["cross_threshold_seconds"] = seconds(lambda: cross_threshold(alpha, beta, energy), torch.device("cpu"))
    whole = Spectrum(
        alpha=alpha,
        beta=beta,
        input_basis=bases[0].flip(1).contiguous(),
        output_basis=bases[1].flip(1).contiguous(),
        traces=(float(alpha.sum()), float(beta.sum())),
        residuals=(0 * alpha, 0 * beta),
    )
    X = torch.randn(shape, device=device)
    results = {}
    for form, spectrum in (("equation6", whole), ("pivot", whole), ("cross", top)):
        subspace = Subspace.of(spectrum, energy, form)  # type: ignore[arg-type]
        results[form] = subspace.project(X)
        found[f"{form}_projection_seconds"] = seconds(lambda s=subspace: s.project(X), device)
    found["pivot_error"] = float((results["pivot"] - results["equation6"]).norm() / X.norm())
    projections = [found[f"{form}_projection_seconds"] for form in ("equation6", "pivot", "cross")]
    found["projection_speedup"] = projections[0] / projections[1]
    found["cross_projection_speedup"] = projections[0] / projections[2]
    found["spectrum_speedup"] = found["dense_seconds"] / found["cross_seconds"]
    found["warm_speedup"] = found["cold_seconds"] / found["warm_seconds"]
    found["warm_eigenvectors_speedup"] = found["cold_seconds"] / found["warm_eigenvectors_seconds"]
    found["warm_speedup_over_dense"] = found["dense_seconds"] / found["warm_seconds"]
    return found


def synthetic(shape: tuple[int, int], exponent: float, energy: float, device: torch.device) -> dict[str, Any]:
    """:func:`measured` for spectra that fall like 1/j ** exponent."""
    say(f"{shape[0]} × {shape[1]}, 1/j^{exponent}, γ = {energy}: making the factors")
    alpha, beta = power_law(shape[1], exponent), power_law(shape[0], exponent)
    A, G = random_matrix(alpha, 1, device), random_matrix(beta, 2, device)
    later = with_new_tokens(A, alpha, 1), with_new_tokens(G, beta, 2)
    return {"exponent": exponent, **measured(A, G, later, energy)}


def bundled_factors(energies: Sequence[float]) -> dict[str, Any]:
    """Counts for the bundled model's real factors, and :func:`measured` for those of the middle block."""
    loaded = load_model("bundled")
    texts = corpus.capability_texts(1200)
    first, more = (Curvature.estimate(loaded.model, loaded.tokenizer, part) for part in (texts[:400], texts[400:]))
    later = merge([first, more], weights=[0.99, 0.01])
    counts = []
    for name in first.factors:
        spectrum = first.spectrum(name)
        counts += [{"matrix": name, **counted(spectrum.alpha, spectrum.beta, energy)} for energy in energies]
    name = list(first.factors)[len(first.factors) // 2]
    (A, G), new = (c.factors[name].dense or () for c in (first, later))
    return {"bundled_counts": counts, "bundled": {"matrix": name, **measured(A, G, new, 0.8)}}


def sketched() -> list[dict[str, Any]]:
    """Sketches of the bundled model's factors against the dense ones: crosses of γ = 0.8 and 0.9.

    Principal angles are between the input directions of the dense cross and those of the sketch's; *held* is what the
    sketch's cross holds of the dense factors, of which it claims γ.
    """
    loaded = load_model("bundled")
    texts = corpus.capability_texts()
    dense, sketch = (
        Curvature.estimate(loaded.model, loaded.tokenizer, texts, factors=kind) for kind in ("dense", "sketch")
    )
    rows = []
    for name, factors in dense.factors.items():
        for energy in (0.8, 0.9):
            one, other = (c.subspace(name, energy, "cross") for c in (dense, sketch))
            columns = [s.spectrum.input_basis[:, : (s.threshold.cross or (0, 0))[1]] for s in (one, other)]
            cosines = torch.linalg.svdvals(columns[0].T @ columns[1]).clamp(max=1)
            angles = torch.rad2deg(torch.arccos(cosines))
            size = math.prod(one.shape)
            rows.append(
                {
                    "matrix": name,
                    "energy": energy,
                    "dense_cross": one.threshold.cross,
                    "sketch_cross": other.threshold.cross,
                    "dense_share": one.threshold.num_high / size,
                    "sketch_share": other.threshold.num_high / size,
                    "median_angle": float(angles.median()),
                    "largest_angle": float(angles.max()),
                    "overlap": cross_overlap(one, other),
                    "held": held(other, factors),
                }
            )
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
        (seconds(lambda: estimate_factors(model, matrices, batches), cpu, 1), seconds(plain, cpu, 1)) for _ in range(5)
    ]
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    return {"factor_pass_ratio": ratio, "factor_pass_seconds": statistics.median(ours for ours, _ in pairs)}


MEASURED_PROCESS = """
import json, resource, sys
from crispedit import cli
try:
    cli.main(sys.argv[2:])
finally:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    json.dump({"peak": usage.ru_maxrss * 1024, "seconds": usage.ru_utime + usage.ru_stime}, open(sys.argv[1], "w"))
"""


def memory(samples: int) -> dict[str, Any]:
    """Peak memory of ``crispedit curvature`` as a whole process, dense and sketched, and of loading the model alone."""
    import transformers

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        model, usage = Path(directory) / "model", Path(directory) / "usage.json"
        tokenizer = load_model("bundled").tokenizer
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=5, num_attention_heads=16,
            num_key_value_heads=4, vocab_size=len(tokenizer), max_position_embeddings=512, bos_token_id=0,
            eos_token_id=1, pad_token_id=None,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(model)
        tokenizer.save_pretrained(model)
        texts = Path(directory) / "texts.json"
        texts.write_text(json.dumps(corpus.capability_texts()[:samples]))
        for name, arguments in {
            "model": ["ask", str(model), "a"],
            **{
                kind: ["curvature", str(model), "--texts", str(texts), "--layers", "0-4", "--factors", kind,
                       "--out", str(Path(directory) / kind)]
                for kind in ("sketch", "dense")
            },
        }.items():  # fmt: skip
            environment = {**os.environ, "CRISPEDIT_CACHE": directory}
            command = [sys.executable, "-c", MEASURED_PROCESS, str(usage), *arguments]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
            found[f"{name}_memory"], found[f"{name}_cpu_seconds"] = json.loads(usage.read_text()).values()
            say(f"{name}: {found[f'{name}_memory'] / 1e9:.2f} GB, {found[f'{name}_cpu_seconds']:.0f} s of CPU time")
        for kind in ("sketch", "dense"):
            stored = (Path(directory) / kind / "factors.safetensors").stat().st_size
            found[f"{kind}_stored"] = stored
    above = [found[f"{kind}_memory"] - found["model_memory"] for kind in ("sketch", "dense")]
    return {**found, "sketch_memory_ratio": above[0] / above[1]}


def print_rows(rows: Sequence[dict[str, Any]], columns: Sequence[str], head: Callable[[dict[str, Any]], str]) -> None:
    """Rows as a Markdown table; shares between 0 and 1 as they are."""
    print("| | " + " | ".join(c.replace("_", " ") for c in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for row in rows:
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row[c] for c in columns)]
        print(f"| {head(row)} | " + " | ".join(cells) + " |")


PARTS = ("full", "scan", "bundled", "counts", "pass", "sketch", "memory")
SPEEDUPS = (
    "storage_ratio", "projection_speedup", "cross_projection_speedup", "spectrum_speedup", "warm_speedup",
    "warm_eigenvectors_speedup", "threshold_seconds", "cross_cross", "cold_directions", "warm_directions", "warm_held",
)  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shape", nargs=2, type=int, default=[4096, 14336], help="d_out d_in")
    parser.add_argument("--energy", type=float, default=0.8)
    parser.add_argument("--samples", type=int, default=60, help="texts of the memory part")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    shape, device, parts = tuple(arguments.shape), torch.device(arguments.device), arguments.parts
    energies = (0.5, 0.8, 0.9, 0.99)
    found: dict[str, Any] = {"device": str(device), "threads": torch.get_num_threads()}
    if "pass" in parts:
        found |= factor_pass()
    if "full" in parts:
        found |= synthetic(shape, 1.0, arguments.energy, device)
    if "scan" in parts:
        quarter = (shape[0] // 4, shape[1] // 4)
        grid = [(p, energy) for p in (0.8, 1.0, 1.2, 1.5) for energy in (0.5, 0.8, 0.9)]
        found["scan"] = [synthetic(quarter, p, energy, device) for p, energy in grid]
    if "bundled" in parts:
        found |= bundled_factors(energies)
    if "counts" in parts:
        found["counts"] = [
            {"exponent": p, **counted(power_law(shape[1], p), power_law(shape[0], p), energy)}
            for p in (0.8, 1.0, 1.2, 1.5)
            for energy in energies
        ]
    if "sketch" in parts:
        found["sketch"] = sketched()
    if "memory" in parts:
        found |= memory(arguments.samples)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    print(json.dumps({k: v for k, v in found.items() if not isinstance(v, list) and k != "bundled"}, indent=1))

    def spectrum_name(row: dict[str, Any]) -> str:
        return f"{row.get('matrix') or '1/j^' + str(row['exponent'])}, γ {row['energy']}"

    timed = [*found.get("scan", []), *([found["bundled"]] if "bundled" in found else [])]
    if timed:
        print_rows(timed, SPEEDUPS, spectrum_name)
    counts = [*found.get("counts", []), *found.get("bundled_counts", [])]
    if counts:
        columns = ("staircase_pairs", "cross_pairs", "cross", "pivot_flops", "cross_flops", "pivot_storage",
                   "cross_storage")  # fmt: skip
        print_rows(counts, columns, spectrum_name)
    if "sketch" in found:
        columns = ("dense_cross", "sketch_cross", "dense_share", "sketch_share", "median_angle", "largest_angle",
                   "overlap", "held")  # fmt: skip
        print_rows(found["sketch"], columns, spectrum_name)


if __name__ == "__main__":
    main()
