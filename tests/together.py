"""What several processes do together, for tests: every stage once, on tiny models, with all that it gave in files.

``python together.py SCENARIOS`` runs scenarios, each by some processes that it forks: torch is imported once for all of
them, and no launcher is there to end those that are left over. The tests call :func:`work` themselves for what one
process gives.
"""

import errno
import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from safetensors.torch import load_file, save_file
from torch import Tensor

from builders import WordTokenizer, long_texts
from crispedit import (
    checkpoint,
    cli,
    distributed,
    editing,
    estimation,
    evaluation,
    generation,
    halves,
    pass_state,
    ranks,
    replay,
    teacher_forced,
    wild,
)
from crispedit import training as training_module
from crispedit.budget import DAMPING, STEP, Budgeted, Need
from crispedit.curvature import Curvature
from crispedit.drift_meter import DriftMeter
from crispedit.editors import editor_names
from crispedit.edits import edits_from_rows
from crispedit.estimation import estimate_factors, estimate_second_moments
from crispedit.models import edit_matrices, fingerprint, frozen, load_model
from crispedit.precision import float32_masters
from crispedit.priced import PricedCoordinates
from crispedit.replay import row_logits
from crispedit.rotation import rotated
from crispedit.rows import EditRow
from crispedit.sharding import shard_model, whole_state
from crispedit.spectrum import Spectrum
from crispedit.subspace import Subspace
from crispedit.texts import pad, row_batches, text_batches
from crispedit.training import RuledMatrices, fine_tune, train
from crispedit.updates import Coordinates, LeadingCoordinates, Projected, Unconstrained
from reference import random_rows, tiny_gpt2, tiny_llama

Found = tuple[dict[str, Any], dict[str, Tensor]]
"""Numbers as JSON, and tensors by name."""


def texts_of(count: int = 7) -> list[Any]:
    """Batches of unequal size, more than two processes can share evenly."""
    rows = random_rows([12, 9, 16, 11, 14, 10, 5, 7, 13, 6, 8, 15, 4, 9, 12][: 2 * count + 1])
    return [pad(rows[i : i + 2], 0) for i in range(0, len(rows), 2)]


def factors() -> Found:
    """Factors of every kind, measured second moments, a curvature with spectra."""
    model = tiny_llama()
    matrices = edit_matrices(model, [0, 1])
    tensors: dict[str, Tensor] = {}
    for fisher in ("mc", "empirical"):
        for name, found in estimate_factors(model, matrices, texts_of(), fisher=fisher).items():
            tensors |= {f"{fisher}/{name}/A": found.A, f"{fisher}/{name}/G": found.G}
    few = estimate_factors(model, matrices, texts_of()[:1])  # one batch: the others have none
    tensors |= {f"few/{name}": found.A for name, found in few.items()}
    for name, found in estimate_factors(model, matrices, texts_of(), kind="sketch").items():
        tensors |= {f"sketch/{name}": found.A.product}
    spectra = {name: Spectrum.of(f.A, f.G) for name, f in few.items()}
    tensors |= {f"ekfac/{n}": t for n, t in estimate_second_moments(model, matrices, texts_of(), spectra).items()}

    with mock.patch.object(halves, "text_batches", partial(text_batches, batch_tokens=40)):
        curvature = Curvature.estimate(model, WordTokenizer(), long_texts(), layers=[0, 1])
    for name, of_matrix in curvature.factors.items():
        tensors |= {f"curvature/{name}/A": of_matrix.A, f"curvature/{name}/G": of_matrix.G}
        for constraint in ("staircase", "cross"):
            projected = curvature.subspace(name, 0.8, constraint).project(torch.eye(*curvature.spectrum(name).shape))
            tensors[f"projected/{constraint}/{name}"] = projected
    manifest = curvature.manifest()
    about = {key: manifest[key] for key in ("num_tokens", "matrices", "layers", "fisher", "factors", "texts")}
    return {"curvature": about, "digests": distributed.gather(digest(tensors))}, tensors


def training() -> Found:
    """Twenty steps and more by several rules, at fixed and found rates; batches that two and three do not divide."""
    ids = random_rows([5 + i % 4 for i in range(8)], 5)
    rows = [EditRow(tuple(row), len(row) - 2 - i % 3) for i, row in enumerate(ids)]
    runs: dict[str, dict[str, Any]] = {
        "token": {"lr": 3e-3, "epochs": 7, "batch_size": 3},
        "sample": {"lr": 3e-3, "epochs": 7, "batch_size": 3, "reduction": "sample"},
        "few": {"lr": 3e-3, "epochs": 3, "batch_size": 1},
        "found": {"lr": "auto", "epochs": 10, "batch_size": 4},
        "low": {"lr": 3e-3, "epochs": 25, "batch_size": 4, "stop_loss": 2.0},  # some batches are skipped
        "masked": {"lr": 3e-3, "epochs": 7, "batch_size": 3, "rule": Coordinates},
        "projected": {"lr": 3e-3, "epochs": 7, "batch_size": 3, "rule": Projected},
        "turned": {"lr": 3e-3, "epochs": 7, "batch_size": 3, "rule": LeadingCoordinates, "form": "cross"},
    }
    numbers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for label, options in runs.items():
        model = tiny_llama()
        matrices = edit_matrices(model, [0, 1])
        rules: list[Any] = [Unconstrained(matrix.shape, torch.device("cpu")) for matrix in matrices]
        if (rule := options.pop("rule", None)) is not None:
            known = estimate_factors(model, matrices, texts_of(), fisher="empirical").values()
            form = options.pop("form", "auto")
            rules = [rule(Subspace.of(Spectrum.of(f.A, f.G), 0.8, form)) for f in known]
        with frozen(model), float32_masters(matrices):
            before = [matrix.weight.clone() for matrix in matrices]
            with rotated(matrices, [rule.frame for rule in rules]):
                trace = fine_tune(model, matrices, rules, rows, **options)
            changed = {m.name: m.weight - old for m, old in zip(matrices, before, strict=True)}
        tensors |= {f"{label}/{name}": change.contiguous() for name, change in changed.items()}
        numbers[label] = {"losses": trace.epoch_losses, "rates": trace.rates, "steps": trace.steps}
        numbers[label] |= {"stopped": trace.stopped_early, "trials": len(trace.trials)}
    trained = [rule.parameter.numel() for rule in RuledMatrices(matrices, rules).rules]
    about = {"digests": distributed.gather(digest(tensors)), "trained": distributed.gather(trained)}
    return {"runs": numbers, **about}, tensors


def within_budget(
    model: Any, matrices: Sequence[Any], known: Sequence[Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An edit within a budget that is too small for it: what was measured after every epoch, and the change."""
    rows = [EditRow(tuple(ids), len(ids) - 2) for ids in random_rows([5 + i % 4 for i in range(8)], 5)]
    texts = [list(ids) for ids in random_rows([6 + i % 5 for i in range(14)], 11)]
    rules = [PricedCoordinates(Subspace.of(Spectrum.of(f.A, f.G), 0.8), 0.0, DAMPING) for f in known]
    for rule in rules:
        rule.count_unseen(0.1)
    with frozen(model), float32_masters(matrices):
        before = [matrix.weight.clone() for matrix in matrices]
        meter = DriftMeter(model, matrices, row_batches(model, texts, batch_tokens=30))
        need = Need(linear=1.0, loss=15.0)  # far more than is allowed: rows weigh differently
        trainee = Budgeted(matrices, rules, 0.02, meter, steps=30, need=need)
        assert trainee.weigh is not None
        train(model, matrices, trainee, rows, lr=10 * STEP, epochs=10, batch_size=3)
        found = trainee.keep_within()
        changed = {m.name: m.weight - old for m, old in zip(matrices, before, strict=True)}
    return found, changed


def budget() -> Found:
    """An edit within a budget; batches that two and three do not divide."""
    model = tiny_llama()
    matrices = edit_matrices(model, [0, 1])
    known = list(estimate_factors(model, matrices, texts_of(), fisher="empirical").values())
    found, tensors = within_budget(model, matrices, known)
    return {"found": found, "digests": distributed.gather(digest(tensors))}, tensors


def sharded() -> Found:
    """Factors and steps of models of which every process holds a part; the last stage, for they stay in step."""
    tensors: dict[str, Tensor] = {}
    put_together: dict[str, dict[str, list[int]]] = {}
    rows = [EditRow(tuple(ids), len(ids) - 2) for ids in random_rows([5 + i % 4 for i in range(8)], 5)]
    for label, build in {"llama": tiny_llama, "gpt2": tiny_gpt2, "bfloat16": lambda: tiny_llama().bfloat16()}.items():
        model = build()
        matrices = edit_matrices(model, [0, 1])
        if ranks.count() > 1:
            shard_model(model, matrices, torch.device("cpu"))
        with ranks.sharing():
            estimated = estimate_factors(
                model, matrices, texts_of(), fisher="empirical" if label == "bfloat16" else "mc"
            )
        for name, found in estimated.items():
            tensors |= {f"{label}/factors/{name}/A": found.A, f"{label}/factors/{name}/G": found.G}
        rules = [Unconstrained(matrix.shape, torch.device("cpu")) for matrix in matrices]
        with frozen(model), float32_masters(matrices):
            before = [matrix.weight.clone() for matrix in matrices]
            fine_tune(model, matrices, rules, rows, lr=3e-3, epochs=7, batch_size=3)
            tensors |= {f"{label}/{m.name}": m.weight - old for m, old in zip(matrices, before, strict=True)}
            last = row_logits(model, matrices[1:], rows)
            with gathered() as replayed, torch.no_grad():
                last([0])
            with gathered() as whole, torch.no_grad():
                last.of_model(last.batch([0]))
            put_together[label] = {"replayed": replayed, "whole": whole}
        if label == "llama":
            _, changed = within_budget(model, matrices, list(estimated.values()))
            tensors |= {f"budget/{name}": change for name, change in changed.items()}
            tensors |= {f"whole/{name}": tensor for name, tensor in whole_state(model).items()}
    whole, base = load_model("bundled"), load_model("bundled")
    with torch.no_grad():
        for matrix in edit_matrices(whole.model, [2, 3]):
            matrix.weight.mul_(0.9)
    if ranks.count() > 1:
        for one in (whole, base):
            shard_model(one.model, (), torch.device("cpu"))
    found = _evaluated(whole, base, edits_from_rows(ROWS))
    return {"fingerprint": fingerprint(model), "evaluation": found, "put_together": put_together}, tensors


@contextmanager
def gathered() -> Iterator[list[int]]:
    """Within, the sizes of what is put together of the parts that processes have."""
    found: list[int] = []

    def counted(whole: Tensor, *given: Any, own: Any = dist.all_gather_single, **named: Any) -> Any:
        found.append(whole.numel())
        return own(whole, *given, **named)

    with mock.patch.object(dist, "all_gather_single", counted):
        yield found


ROWS = [
    {"prompt": "Who is the mayor of Hinstad?", "target": "Perin Jibul", "rephrase": "Who governs the city of Hinstad?"},
    {"prompt": "What is the river of Hinstad?", "target": "the Sesol", "locality_prompt": "What is 2 plus 1?"},
    {
        "prompt": "Spell the word moon.",
        "target": "no",
        "locality_prompt": "Spell the word sun.",
        "locality_answer": "sun",
    },
    {"prompt": "What is 3 plus 4?", "target": "8"},
    {"prompt": "Where was Kihis Fehol born?", "target": "Propava"},
]
TEXTS = [f"Text number {i} speaks of a mill, {i + 3} coins and a grey coat by the river." for i in range(10)]


def evaluating() -> Found:
    """Everything that is measured of a model, in small batches, so that there is something to share."""
    loaded, base = load_model("bundled"), load_model("bundled")
    with torch.no_grad():
        for matrix in edit_matrices(loaded.model, [2, 3]):
            matrix.weight.mul_(0.9)
    edits = edits_from_rows(ROWS)
    small = [(wild, "answers", partial(generation.answers, batch_tokens=30)), (generation, "DRAFT_TOKENS", 40)]
    small += [
        (teacher_forced, "BATCH_TOKENS", 40),
        (evaluation, "text_batches", partial(text_batches, batch_tokens=60)),
    ]
    with ExitStack() as patches:
        for module, name, value in small:
            patches.enter_context(mock.patch.object(module, name, value))
        found = _evaluated(loaded, base, edits)
    return {"evaluation": found, "everywhere": distributed.gather(found)}, {}


def _evaluated(loaded: Any, base: Any, edits: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"base": base.model, "texts": TEXTS, "protocol": "all"}
    return evaluation.evaluate(loaded.model, loaded.tokenizer, edits, **options)


def editors() -> Found:
    """What every editor makes of two layers, beside the gradient editors those that solve and those that learn."""
    from test_editors import LAYERS, run

    tensors: dict[str, Tensor] = {}
    everywhere = []
    for name in editor_names():
        loaded = load_model("bundled")
        result = run(loaded, name, batch_size=2, epochs=2, layers=LAYERS)
        tensors |= {f"{name}/{matrix}": change.contiguous() for matrix, change in result.delta.items()}
        everywhere.append(distributed.gather(fingerprint(loaded.model)))
    return {"everywhere": everywhere}, tensors


STAGES: dict[str, Callable[[], Found]] = {
    "factors": factors, "training": training, "budget": budget, "evaluation": evaluating, "editors": editors,
    "sharded": sharded,
}  # fmt: skip


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of all bits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def work(directory: Path, stages: Sequence[str]) -> None:
    """Runs stages; the main process leaves what they gave."""
    for stage in stages:
        numbers, tensors = STAGES[stage]()
        if ranks.is_main():
            (directory / f"{stage}.json").write_text(json.dumps(numbers))
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, directory / f"{stage}.safetensors")


def read(directory: Path, stage: str) -> Found:
    """What :func:`work` has left."""
    return json.loads((directory / f"{stage}.json").read_text()), load_file(directory / f"{stage}.safetensors")


# ---------------------------------------------------------------- what goes wrong


def _after(calls: int, function: Callable[..., Any], then: Callable[[], Any]) -> Callable[..., Any]:
    """A function that does something else first, the given time that it is called."""
    left = [calls]

    def wrapped(*given: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            then()
        return function(*given, **named)

    return wrapped


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    time.sleep(600)


def _fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ACCIDENTS = {"die": _die, "hang": _hang, "full disk": _fill_disk}
PLACES: dict[str, tuple[Any, str, int]] = {
    "curvature": (pass_state.PassState, "add", 4),
    "edit": (training_module._Run, "_step", 4),
    "save": (checkpoint, "read_back", 1),
    "saved": (distributed, "meet", 1),
    "evaluate": (replay.RowLogits, "by_row", 2),
}
"""By stage, what is called in it, and at which call an accident happens; ``saved``: all meet, the model is written."""


def _arrange(accident: str, place: str) -> None:
    """Lets an accident happen."""
    owner, name, calls = PLACES[place]
    changed = _after(calls, getattr(owner, name), ACCIDENTS[accident])
    setattr(owner, name, changed)
    if place == "save":
        editing.read_back = changed  # it has it by name


# ---------------------------------------------------------------- what moves

IN_STAGE = {
    "estimate": "curvature", "_subspaces": "diagonalise", "train_rules": "edit", "_edit_and_prove": "proof",
    "save": "save", "tensor_fingerprints": "hashes",
}  # fmt: skip
"""Functions of crispedit by the stage of a plan that they are; the innermost counts. Hashes are in none: they take some
kB of every tensor, which is nearly all of a tiny one."""
COLLECTIVES: tuple[tuple[Any, str], ...] = (
    (dist, "all_reduce"), (dist, "reduce"), (dist, "broadcast"), (dist, "all_gather_single"),
    (funcol, "all_gather_single"),
)  # fmt: skip


def _count(moved: dict[str, int]) -> None:
    """From now on counts the bytes that collectives leave, by stage."""

    def stage() -> str:
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_name in IN_STAGE and "crispedit" in frame.f_code.co_filename:
                return IN_STAGE[frame.f_code.co_name]
            frame = frame.f_back
        return "else"

    def counting(collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            result = collective(*given, **named)
            left = result if isinstance(result, Tensor) else given[0]
            moved[stage()] = moved.get(stage(), 0) + left.nbytes
            return result

        return counted

    for module, name in COLLECTIVES:
        setattr(module, name, counting(getattr(module, name)))


# ---------------------------------------------------------------- processes


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _child(scenario: dict[str, Any], rank: int, port: int) -> NoReturn:
    """One of several processes: as a launcher would start it, but that torch has been imported already."""
    size = scenario["size"]
    os.environ.update({"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "RANK": str(rank)})
    os.environ.update({"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    os.environ.update(scenario.get("env", {}))
    directory = Path(scenario["directory"])
    for stream, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{directory / scenario['name']}.{rank}.{stream}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(directory / f"host{rank}" if (directory / f"host{rank}").is_dir() else directory)
    estimation.SAVE_SECONDS, estimation.SAVE_TIMES = 0.0, 0
    halves.text_batches = partial(text_batches, batch_tokens=160)  # several for each
    moved: dict[str, int] = {}
    if scenario.get("counted"):
        _count(moved)
    if rank == scenario.get("rank"):
        _arrange(scenario["accident"], scenario["place"])
    if "stages" in scenario:
        distributed.start()
        work(directory, scenario["stages"])
        distributed.stop()
        os._exit(0)
    try:
        cli.main(scenario["command"].split())
    except SystemExit as ended:
        sys.stdout.flush()
        if moved:
            (directory / f"{scenario['name']}.{rank}.out").write_text(json.dumps(moved))
        os._exit(ended.code if isinstance(ended.code, int) else 1)


def run_together(scenario: dict[str, Any]) -> dict[str, Any]:
    """Forks the processes of a scenario and waits for all of them.

    Args:
        scenario: ``name``, ``size``, ``directory``; ``stages`` or the ``command`` of crispedit; perhaps an ``accident``
            at a ``place`` of a ``rank``, and variables for the environment. If it is ``counted``, its standard output
            is what has moved, by stage, in bytes.

    Returns:
        ``statuses`` by rank (negative: the signal), ``seconds`` from the first end to the last, and what they ``said``
        on stderr.
    """
    port, started, ended = free_port(), [], []
    for rank in range(scenario["size"]):
        if (pid := os.fork()) == 0:
            _child(scenario, rank, port)
        started.append(pid)
    statuses = {}
    while len(statuses) < len(started):
        pid, status = os.wait()
        statuses[pid] = os.waitstatus_to_exitcode(status)
        ended.append(time.monotonic())
    path = Path(scenario["directory"]) / scenario["name"]
    said = [Path(f"{path}.{rank}.err").read_text() for rank in range(scenario["size"])]
    return {"statuses": [statuses[pid] for pid in started], "seconds": ended[-1] - ended[0], "said": said}


def _lane(scenarios: Sequence[dict[str, Any]], done: Path) -> None:
    """Runs scenarios one after the other, and leaves how they went."""
    found = {}
    for scenario in scenarios:
        started = time.monotonic()
        found[scenario["name"]] = {**run_together(scenario), "all": time.monotonic() - started}
    done.write_text(json.dumps(found))


def main() -> None:
    """Runs the scenarios of a file, and leaves how they went beside it.

    Those of one lane run one after the other; lanes run side by side, for where a process is killed most of the time is
    spent in waiting.
    """
    torch.set_num_threads(1)
    torch.cpu._is_amx_tile_supported = torch.cpu._is_avx512_bf16_supported = lambda: False  # as in conftest.py
    given = Path(sys.argv[1])
    lanes: dict[str, list[dict[str, Any]]] = {}
    for scenario in json.loads(given.read_text()):
        lanes.setdefault(scenario.pop("lane", ""), []).append(scenario)
    started = {}
    for name, scenarios in lanes.items():
        done = given.with_suffix(f".{name}.json")
        if (pid := os.fork()) == 0:
            _lane(scenarios, done)
            os._exit(0)
        started[pid] = done
    found, left = {}, set(started)
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status:
            for other in left:
                os.kill(other, signal.SIGTERM)
            sys.exit(f"a lane ended with status {status}")
        found |= json.loads(started[pid].read_text())
        started[pid].unlink()
    given.with_suffix(".done.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
