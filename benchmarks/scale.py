"""The tables of docs/scale.md that are arithmetic: what plan says of four public shapes, for every method.

    python benchmarks/scale.py > scale.txt

No weight is loaded and nothing is run: 1,000 edits of 24 tokens and 1,000 texts of 512 (:mod:`crispedit.typical`), five
blocks, 25 epochs, bfloat16, on GPUs. It takes some minutes.
"""

import argparse
from typing import Any

from crispedit.plan_job import PlanJob

SHAPES = ("Qwen-2.5-1.5B", "Llama-3-8B", "Llama-3-70B", "Llama-3-405B")
DEVICES = "24GB,80GB,141GB"
STAGES = ("curvature", "diagonalise", "edit", "proof", "save")
SEVERAL: tuple[tuple[str, int, bool, str | None], ...] = (
    ("Llama-3-8B", 8, False, None),
    ("Llama-3-8B", 8, True, None),
    ("Llama-3-70B", 8, True, None),
    ("Llama-3-405B", 32, True, None),
    ("Llama-3-405B", 32, True, "94"),
)
"""Shape, processes, whether the model is divided among them, and the blocks that are edited, five by default."""


def methods(shape: str, processes: int = 1, shard: bool = False, layers: str | None = None) -> dict[str, Any]:
    """The methods of a plan, as its JSON has them."""
    job = PlanJob(model=shape, devices=DEVICES, processes=processes, shard=shard, layers=layers)
    found: dict[str, Any] = job.run().record()["methods"]
    return found


def smallest(fits: dict[str, bool]) -> str:
    """The smallest device that is large enough."""
    return next((device for device, enough in fits.items() if enough), "–")


def gigabytes(num_bytes: int) -> str:
    """Three digits."""
    return f"{num_bytes / 1e9:,.1f}" if num_bytes < 1e11 else f"{num_bytes / 1e9:,.0f}"


def teraflops(flops: float) -> str:
    """Three digits or more."""
    return f"{flops / 1e12:,.1f}" if flops < 1e14 else f"{flops / 1e12:,.0f}"


def one_process() -> None:
    """Prints memory and flops by stage, all of the model in one process."""
    names = [*(f"GB {stage}" for stage in STAGES), *(f"TFLOP {stage}" for stage in STAGES[:-1])]
    print("| shape | method | " + " | ".join(names) + " | fits |")
    print("|---" * (len(names) + 3) + "|")
    for shape in SHAPES:
        for name, method in methods(shape).items():
            memory = [gigabytes(method["stages"][stage]["bytes"]) for stage in STAGES]
            flops = [teraflops(method["stages"][stage]["flops"]) for stage in STAGES[:-1]]
            print(f"| {shape} | {name} | " + " | ".join([*memory, *flops, smallest(method["fits"])]) + " |", flush=True)


def several_processes() -> None:
    """Prints what one of several processes takes."""
    print("| shape | processes | method | GB peak | in stage | TFLOP of one | of all | GB moved | fits |")
    print("|---" * 9 + "|")
    for shape, processes, shard, layers in SEVERAL:
        count = f"{processes}{', sharded' if shard else ''}{f', block {layers}' if layers else ''}"
        for name, method in methods(shape, processes, shard, layers).items():
            keys = ("flops", "flops_of_all", "moved_bytes")
            one, of_all, moved = (sum(stage[key] for stage in method["stages"].values()) for key in keys)
            cells = [shape, count, name, gigabytes(method["peak_bytes"]), method["peak_stage"]]
            cells += [teraflops(one), teraflops(of_all), gigabytes(moved), smallest(method["fits"])]
            print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """The command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    one_process()
    print()
    several_processes()


if __name__ == "__main__":
    main()
