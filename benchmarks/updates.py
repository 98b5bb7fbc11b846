"""What an update rule adds to a step: gradient, Adam and delta of matrices with spectra that fall like 1/j.

    python benchmarks/updates.py --json updates.json
    python benchmarks/updates.py --shape 1024 3584 --energy 0.9

A plain step is counted, not run: its flops at the speed that the products of such a matrix reach here (forward, input
gradient and weight gradient of --tokens tokens), and a plain Adam. A rule's time is what its gradient, Adam's step and
its delta take more than those of plain fine-tuning; bases that turn tokens are timed forward and back. Times are the
processor's for one thread, the least of several: other work on the machine does not count, and thin products are
compared with thick ones at the same number of cores.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crispedit.rule_choice import step_flops, update_rule
from crispedit.spectrum import Spectrum
from crispedit.subspace import Form, Subspace
from crispedit.updates import Unconstrained, Update, UpdateRule

CASES: tuple[tuple[Update, Form], ...] = (
    ("coordinates", "pivot"),
    ("projected", "pivot"),
    ("update-projected", "pivot"),
    ("projected", "cross"),
    ("update-projected", "cross"),
    ("leading", "cross"),
)


def spectrum_of(d_out: int, d_in: int) -> Spectrum:
    """1/j twice, in random bases."""
    alpha, beta = (torch.arange(1, n + 1, dtype=torch.float64) ** -1.0 for n in (d_in, d_out))
    bases = [torch.linalg.qr(torch.randn(n, n)).Q for n in (d_in, d_out)]
    return Spectrum(
        alpha=alpha,
        beta=beta,
        input_basis=bases[0],
        output_basis=bases[1],
        traces=(float(alpha.sum()), float(beta.sum())),
        residuals=(0 * alpha, 0 * beta),
    )


def milliseconds(work: Callable[[], Any], repeats: int) -> float:
    """The least processor time of some work in this thread."""
    work()
    times = []
    for _ in range(repeats):
        started = time.thread_time()
        work()
        times.append(time.thread_time() - started)
    return 1e3 * min(times)


def of_rule(rule: UpdateRule, gradient: Tensor, tokens: int, fused: bool, repeats: int) -> float:
    """Milliseconds of a step's gradient, Adam and delta, and of turning its tokens."""
    optimizer = torch.optim.Adam([rule.parameter], lr=1e-3, fused=fused)

    def step() -> None:
        rule.parameter.grad = rule.gradient(gradient)
        optimizer.step()
        rule.delta()

    total = milliseconds(step, repeats)
    if (frame := rule.frame) is not None:
        a, y = torch.randn(tokens, gradient.shape[1]), torch.randn(tokens, gradient.shape[0])

        def turn() -> None:
            for basis, x in ((frame.inputs, a), (frame.outputs, y)):
                basis.times(x)
                basis.times(x, transposed=True)

        total += milliseconds(turn, repeats)
    return total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=2, type=int, default=[768, 3072], metavar=("D_OUT", "D_IN"))
    parser.add_argument("--energy", type=float, default=0.8)
    parser.add_argument("--tokens", type=int, default=450)
    parser.add_argument("--matrices", type=int, default=4)
    parser.add_argument("--plain", type=float, default=125e9, help="flops of a plain step")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    d_out, d_in = arguments.shape
    spectrum, gradient = spectrum_of(d_out, d_in), torch.randn(d_out, d_in)
    a, g = torch.randn(arguments.tokens, d_in), torch.randn(arguments.tokens, d_out)
    products = milliseconds(lambda: (a @ gradient.T, g @ gradient, g.T @ a), arguments.repeats)
    speed = 6 * d_out * d_in * arguments.tokens / products  # flops in a millisecond
    found: dict[str, Any] = {"gflops_per_second": speed / 1e6}
    for fused in (False, True):
        plain = of_rule(
            Unconstrained((d_out, d_in), gradient.device), gradient, arguments.tokens, fused, arguments.repeats
        )
        step = arguments.plain / speed + arguments.matrices * plain
        found[f"plain, fused Adam {fused}"] = {"adam_ms": plain, "step_ms": step}
        for name, form in CASES:
            subspace = Subspace.of(spectrum, arguments.energy, form)
            rule = update_rule(name, subspace)
            more = of_rule(rule, gradient, arguments.tokens, fused, arguments.repeats) - plain
            found[f"{name} {form}, fused Adam {fused}"] = {
                "gflop": step_flops(name, subspace, arguments.tokens) / 1e9,
                "more_ms": more,
                "step_ratio": 1 + arguments.matrices * more / step,
            }
    for name, values in found.items():
        print(name, values if isinstance(values, float) else {k: round(v, 3) for k, v in values.items()})
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
