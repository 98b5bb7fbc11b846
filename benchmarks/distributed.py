"""What several processes of one thread gain over one: seconds of every stage, and the share that is communication.

    python benchmarks/distributed.py --sizes 1,2 --repeats 3 --json distributed.json

A Llama of random parameters (by default 16 blocks, hidden 768, intermediate 3072), blocks 9 to 12 edited: the curvature
of random token rows, all eigenproblems of its factors, an edit of random rows (batch 32) and the evaluation of as many
questions token by token. Every run is a group of processes of its own, each with one thread; runs of different sizes
take turns, and ratios are of medians.

Keys, by stage (``curvature``, ``eigenproblems``, ``edit``, ``evaluation``) and number of processes: ``seconds`` of the
slowest process, ``speedup`` over one process, ``communication`` the share of these seconds that this process spends
in collectives, waiting for the others included.
"""

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from crispedit import distributed
from crispedit.artifacts import write_json
from crispedit.curvature import Curvature
from crispedit.estimation import estimate_factors
from crispedit.models import edit_matrices, frozen
from crispedit.precision import float32_masters
from crispedit.rows import EditRow
from crispedit.teacher_forced import read_rows
from crispedit.texts import row_batches
from crispedit.training import fine_tune
from crispedit.updates import Unconstrained

STAGES = ("curvature", "eigenproblems", "edit", "evaluation")
VOCABULARY = 4096


class Clock:
    """Seconds of a stage, and how many of them went into collectives."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}
        self.inside = 0.0

    def watch(self) -> None:
        """Counts from now on what collectives take."""
        for name in ("all_reduce", "reduce", "broadcast"):
            setattr(dist, name, self._timed(getattr(dist, name)))

    def _timed(self, function: Any) -> Any:
        def timed(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            asked = named.pop("async_op", False)
            function(*given, **named)  # waited for at once: gloo on CPUs has nothing to overlap with
            self.inside += time.perf_counter() - started
            return _Done() if asked else None

        return timed

    def measure(self, stage: str, work: Any) -> Any:
        """Runs a stage, all processes beginning together."""
        distributed.meet()
        self.inside, started = 0.0, time.perf_counter()
        result = work()
        self.found[stage] = (time.perf_counter() - started, self.inside)
        return result


class _Done:
    def wait(self) -> None:
        """It has been waited for."""


def curvature_of(factors: Any) -> Curvature:
    """A curvature with these factors and nothing else."""
    about: dict[str, Any] = {
        "layers": (), "fisher": "mc", "model_name": "", "model_revision": None, "model_fingerprint": "", "dtype": "",
        "tokenizer": "", "chat_template": None, "held_out": (), "texts": {}, "seed": 0,
    }  # fmt: skip
    return Curvature(factors=factors, **about)


def work(settings: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """All stages once, in this process, as one of those that were launched."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = dict(zip(("num_hidden_layers", "hidden_size", "intermediate_size"), settings["shape"], strict=True))
    heads = {"num_attention_heads": 12, "num_key_value_heads": 12}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=512, **shape, **heads)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    matrices = edit_matrices(model)
    rng = random.Random(0)

    def row(length: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(length)]

    texts = row_batches(model, [row(rng.randint(64, 128)) for _ in range(settings["texts"])], batch_tokens=1024)
    rows = [EditRow(tuple(row(rng.randint(10, 16))), 8) for _ in range(settings["edits"])]
    clock = Clock()
    clock.watch()
    factors = clock.measure("curvature", lambda: estimate_factors(model, matrices, texts))
    curvature = curvature_of(factors)
    clock.measure("eigenproblems", lambda: [curvature.subspace(m.name, 0.9, "staircase") for m in matrices])

    def train() -> None:
        rules = [Unconstrained(matrix.shape, matrix.parameter.device) for matrix in matrices]
        with frozen(model), float32_masters(matrices):
            fine_tune(model, matrices, rules, rows, lr=1e-4, epochs=settings["epochs"], batch_size=32, stop_loss=0.0)

    clock.measure("edit", train)
    clock.measure("evaluation", lambda: read_rows(model, rows))
    return clock.found


def launch(size: int, settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Runs a group of processes; of every stage the seconds of the slowest, and its share of communication."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        processes = []
        for rank in range(size):
            env = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            out = Path(directory) / f"{rank}.json"
            command = [sys.executable, __file__, "--worker", json.dumps(settings), "--json", str(out)]
            processes.append(subprocess.Popen(command, env=os.environ | {k: str(v) for k, v in env.items()}))
        statuses = [process.wait() for process in processes]
        if any(statuses):
            raise SystemExit("a process failed")
        found = [json.loads((Path(directory) / f"{rank}.json").read_text()) for rank in range(size)]
    slowest = {stage: max((one[stage] for one in found), key=lambda pair: pair[0]) for stage in STAGES}
    return {stage: {"seconds": s, "communication": inside / s} for stage, (s, inside) in slowest.items()}


def main() -> None:
    """Parses the command line, measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,2", help="numbers of processes, 1 among them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", default="16,768,3072", help="blocks, hidden width, intermediate width")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--edits", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        distributed.start()
        found = work(json.loads(arguments.worker))
        arguments.json.write_text(json.dumps(found))
        distributed.stop()
        return
    settings = {"shape": [int(part) for part in arguments.shape.split(",")], "texts": arguments.texts}
    settings |= {"edits": arguments.edits, "epochs": arguments.epochs}
    sizes = [int(size) for size in arguments.sizes.split(",")]
    runs: dict[int, list[dict[str, dict[str, float]]]] = {size: [] for size in sizes}
    for _ in range(arguments.repeats):
        for size in sizes:
            runs[size].append(launch(size, settings))
    medians = {
        size: {
            stage: {key: statistics.median(run[stage][key] for run in of_size) for key in ("seconds", "communication")}
            for stage in STAGES
        }
        for size, of_size in runs.items()
    }
    for size, stages in medians.items():
        for stage, values in stages.items():
            values["speedup"] = medians[1][stage]["seconds"] / values["seconds"]
            share = f"{values['communication']:.0%} communication"
            print(f"{size} processes, {stage:<14}{values['seconds']:8.2f} s{values['speedup']:6.2f} ×  {share}")
    if arguments.json:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
        write_json(arguments.json, {"settings": settings, **machine, "sizes": medians})


if __name__ == "__main__":
    main()
