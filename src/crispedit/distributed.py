"""Several processes as one: sums, exchanges, and work that one of them does. On one process all of it does nothing.

Every process runs the same program on the same input, in step: each function here is called by all of them, in the same
order (but within :func:`on_main`). Numbers are summed on the devices where they are, with NCCL on GPUs and gloo on
CPUs; what is small or of odd shape, JSON and files of tensors, goes as bytes between CPUs. Nothing is pickled.

What fails on one process ends all of them: it says why, and exits; the launcher, or the connection that breaks, ends
the others, which say nothing then. Where nothing could be said, after a SIGKILL, one of the others says that a process
is gone.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from . import artifacts, errors, ranks
from .errors import ArtifactError, ConfigError, CrispEditError, LostRank
from .heartbeat import Heartbeat, beat_key

Item = TypeVar("Item")
Value = TypeVar("Value")

TIMEOUT = 1800.0
"""Seconds that a process waits for the others in a collective; ``CRISPEDIT_TIMEOUT`` says otherwise. Whether they are
alive is known after seconds (:mod:`crispedit.heartbeat`); this ends those that are alive and stuck."""
LAST_SECONDS = 3.0
"""Seconds that a process which ends has for telling the others why."""
POLL = 0.02
"""Seconds between two looks at whether the main process is done with what it does alone."""

_heartbeat: Heartbeat | None = None
_calls = count()
_told_to_end = False


class _Ended(KeyboardInterrupt):
    """The launcher ends this process: it unwinds as after Ctrl-C, so that nothing is left half-written."""


def _timeout() -> float:
    given = os.environ.get("CRISPEDIT_TIMEOUT", "")
    try:
        return float(given) if given else TIMEOUT
    except ValueError:
        raise ConfigError(f"CRISPEDIT_TIMEOUT is '{given}'; it must be a number of seconds") from None


def start() -> None:
    """Joins the processes that were launched together, if there are several; until :func:`stop`. In the main thread.

    Raises:
        ConfigError: There are more processes on this host than it has GPUs, or it has no time-out to go by.
        LostRank: The others do not come.
    """
    global _heartbeat
    ranks.join()
    if ranks.size() == 1:
        return
    timeout = timedelta(seconds=_timeout())
    signal.signal(signal.SIGTERM, _end)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if ranks.local_rank() >= torch.cuda.device_count():
            raise ConfigError(
                f"there are {ranks.local_size()} processes on this host, which has {torch.cuda.device_count()} GPUs: "
                "launch one for each"
            )
        torch.cuda.set_device(ranks.local_rank())
    with _together("start"):
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)
        store = _connect(timeout.total_seconds())
        store.set(beat_key(ranks.rank()), "0")
        dist.all_reduce(torch.zeros(1))  # until all have counted once
    others = [other for other in range(ranks.size()) if other != ranks.rank()]
    _heartbeat = Heartbeat(store, ranks.rank(), others, _lost)
    _heartbeat.start()


def stop() -> None:
    """Leaves the others, who may still be busy."""
    global _heartbeat
    if _heartbeat is not None:
        with suppress(Exception):
            _heartbeat.end()
            meet()  # the store may go with rank 0: all have stopped looking at it
        _heartbeat = None
    if ranks.joined() and dist.is_initialized():
        with suppress(Exception):
            dist.destroy_process_group()
    ranks.leave()


def _connect(seconds: float) -> Any:
    """A connection of its own to the launcher's store."""
    return dist.TCPStore(  # type: ignore[attr-defined]  # it is documented
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=seconds),
    )


def _end(signum: int, frame: Any) -> None:
    global _told_to_end
    _told_to_end = True
    raise _Ended


def interruption() -> str:
    """What to say of an interruption: by Ctrl-C, or by the launcher, which ends all processes when one has ended."""
    if not _told_to_end:
        return "interrupted; no result was written"
    return _gone("the launcher ends this run, as it does when a process of it has ended")


def _lost(what: str) -> None:
    """Ends this process from the thread that watches the others: the main thread may wait for ever."""
    # a store that does not answer is not asked who may speak
    if "store" in what or may_speak():
        print(f"crispedit: {_gone(what)}", file=sys.stderr, flush=True)
    os._exit(LostRank.exit_status)


def _gone(what: str) -> str:
    return f"{what}; nothing was written, and the same command goes on with what was saved"


def may_speak() -> bool:
    """Whether this process is the first to say why the run ends; asked once, when it does."""
    if not ranks.joined():
        return True
    if _heartbeat is not None:
        _heartbeat.halt()
    try:
        store, me = _connect(LAST_SECONDS), os.environ["RANK"]
        key = f"crispedit/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # torchrun can start all again
        first = bool(store.compare_set(key, "", me) == me.encode())
        store.add(f"{key}/asked", 1)
        if ranks.is_main() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _until(store, f"{key}/asked", int(os.environ["WORLD_SIZE"]))  # the store goes with this process
        return first
    except Exception:  # the store went with its host
        return True


@contextmanager
def _together(what: str) -> Iterator[None]:
    """Within, what breaks is the connection to the others."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError is one too
        said = " ".join(str(error).split())
        if "imed out" in said or "imeout" in said:
            why = f"a process of this run did not come to '{what}' within {_timeout():.0f} seconds"
        else:
            why = f"a process of this run has ended ('{what}' of rank {ranks.rank()} lost it)"
        raise LostRank(_gone(why)) from error


def share(items: Sequence[Item]) -> list[Item]:
    """This process's part of items: every size-th. All of them on one process."""
    return list(items[ranks.rank() :: ranks.size()])


def owners(costs: Sequence[float], size: int | None = None) -> list[int]:
    """Which process does which piece of work: the longest first, each to the one with the least to do.

    Args:
        costs: Of the pieces, in any unit.
        size: How many processes there are; those of this run when omitted.

    Returns:
        A rank per piece.
    """
    loads = [0.0] * (ranks.size() if size is None else size)
    found = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        found[piece] = loads.index(min(loads))
        loads[found[piece]] += costs[piece]
    return found


def sum_tensors(tensors: Sequence[Tensor], at: Sequence[int] | None = None) -> None:
    """Sums tensors over all processes, in place; every process gets the same bits.

    Args:
        tensors: Contiguous; of the same shapes, dtypes and kind of device everywhere.
        at: For each the rank of the only process that gets its sum; what the others are left with is of no use.
    """
    if ranks.size() == 1:
        return
    with _together("sum"):
        if at is None:
            pending = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        else:
            pending = [dist.reduce(tensor, owner, async_op=True) for tensor, owner in zip(tensors, at, strict=True)]
        for work in pending:
            work.wait()


def broadcast_tensors(tensors: Sequence[Tensor], owners: Sequence[int] | None = None) -> None:
    """Gives every process the tensors of one of them, in place.

    Args:
        tensors: Contiguous; of the same shapes, dtypes and kind of device everywhere.
        owners: For each the rank of the process that has it; rank 0 for all when omitted.
    """
    if ranks.size() == 1:
        return
    with _together("broadcast"):
        pending = [
            dist.broadcast(tensor, owner, async_op=True)
            for tensor, owner in zip(tensors, owners or [0] * len(tensors), strict=True)
        ]
        for work in pending:
            work.wait()


def _from_owner(content: bytes | None, owner: int) -> bytes:
    """The bytes that one process has."""
    mine = ranks.rank() == owner
    length = torch.tensor([len(content) if mine and content is not None else 0])
    dist.broadcast(length, owner)
    if mine:
        assert content is not None
        whole = (
            torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
        )
    else:
        whole = torch.empty(int(length), dtype=torch.uint8)
    if int(length):
        dist.broadcast(whole, owner)
    return whole.numpy().tobytes()


def tensors_of(owner: int, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Tensors by name that one process has.

    Args:
        owner: Its rank.
        tensors: There; not looked at elsewhere.

    Returns:
        The same everywhere, on the CPU; on one process as they are.
    """
    if ranks.size() == 1:
        return dict(tensors or {})
    content = None
    if ranks.rank() == owner:
        content = save({name: tensor.cpu().contiguous() for name, tensor in (tensors or {}).items()})
    with _together("exchange"):
        return load(_from_owner(content, owner))


def gather_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of all processes, by names that only one of them uses; on the CPU, on one process as they are."""
    if ranks.size() == 1:
        return dict(tensors)
    found: dict[str, Tensor] = {}
    for owner in range(ranks.size()):
        found |= tensors_of(owner, tensors)
    return found


def spread(items: Sequence[Item], work: Callable[[Item], Tensor]) -> Iterator[tuple[Item, Tensor]]:
    """What a function makes of items, each done by one of the processes.

    Args:
        items: The same everywhere, in the same order.
        work: From an item to a tensor.

    Yields:
        Every item with its tensor, in order; on several processes all come when all are done, on the CPU.
    """
    if ranks.size() == 1:
        yield from ((item, work(item)) for item in items)
        return
    mine = {str(number): work(items[number]) for number in share(range(len(items)))}
    found = gather_tensors(mine)
    for number, item in enumerate(items):
        yield item, found[str(number)]


def gather(value: Value) -> list[Value]:
    """What every process has, in the order of ranks.

    Args:
        value: JSON-ready.

    Returns:
        The values, as JSON gives them back; on one process the value itself.
    """
    if ranks.size() == 1:
        return [value]
    with _together("gather"):
        content = json.dumps(value).encode()
        return [json.loads(_from_owner(content, owner)) for owner in range(ranks.size())]


def meet() -> None:
    """Waits for all processes, and fails where one is gone."""
    with ranks.sharing():
        sum_tensors([torch.zeros(1)])


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which every process may hold a part (:mod:`crispedit.sharding`), on each of them."""
    gather_parts = getattr(tensor, "full_tensor", None)
    return tensor if gather_parts is None else gather_parts()


def every_nth(tensor: Tensor, step: int) -> Tensor:
    """Every so many-th number of a tensor of which every process may hold a part; only these move between them.

    Args:
        tensor: Whole, or divided by its rows as FSDP2 divides (``torch.chunk``); the same on all processes.
        step: 1 or more.

    Returns:
        Numbers 0, step, 2 step, … in row-major order, float32, on the CPU; the same everywhere.
    """
    part = getattr(tensor, "to_local", None)
    if part is None:
        return tensor.reshape(-1)[::step].float().cpu()
    mine = part().reshape(-1)
    per_row = tensor.shape[1:].numel()
    found = torch.zeros(-(-tensor.numel() // step), device=mine.device)
    with ranks.sharing():
        begin = min(ranks.rank() * -(-len(tensor) // ranks.size()), len(tensor)) * per_row
        first = -(-begin // step)
        values = mine[first * step - begin :: step].float()
        found[first : first + len(values)] = values
        sum_tensors([found.view(torch.int32)])  # of bits, one process's and zeros: -0.0 stays what it is
    return found.cpu()


def write_directory(directory: Path, fill: Callable[[Path], None], *, overwrite: bool = False) -> None:
    """A directory that the main process fills, and that takes its name when all processes are still there.

    Args:
        directory: The final name.
        fill: Fills the temporary directory that it is given; the main process works alone then.
        overwrite: Whether a directory that is not empty is replaced.

    Raises:
        ArtifactError: The place cannot be written to, or the disk is full; nothing was written.
    """
    with ExitStack() as stack:
        building = directory
        if ranks.is_main():
            building = stack.enter_context(artifacts.write_directory(directory, overwrite=overwrite))
        on_main(lambda: _filled(fill, building, directory))
        meet()


def _filled(fill: Callable[[Path], None], building: Path, directory: Path) -> None:
    """Fills a directory; what the system says of a full disk is told to the others too."""
    try:
        fill(building)
    except OSError as error:
        raise ArtifactError(f"cannot write '{directory}': {error.strerror or error}") from error


def check_equal(values: Mapping[str, str]) -> None:
    """Refuses processes that were not given the same.

    Args:
        values: By what they are ("the edits"), hashes or other short texts.

    Raises:
        ConfigError: One differs; the first is named, with the hosts.
    """
    here = os.uname().nodename
    with ranks.sharing():
        found: list[dict[str, Any]] = gather({"host": here, "values": dict(values)})
    for other, theirs in enumerate(found):
        for what, value in found[0]["values"].items():
            if theirs["values"].get(what) != value:
                raise ConfigError(
                    f"{what} of rank {other} (on {theirs['host']}) differ from those of rank 0 (on "
                    f"{found[0]['host']}): {theirs['values'].get(what)!s:.12} and {value!s:.12}; all "
                    "processes need the same files"
                )


def from_main(work: Callable[[], Value]) -> Value:
    """What the main process finds, working alone; the others wait, for as long as it lives.

    Args:
        work: Run by the main process only; gives something JSON-ready.

    Returns:
        Its value everywhere; on one process as it is.

    Raises:
        CrispEditError: What it raised, everywhere.
    """
    if ranks.count() == 1:
        return work()
    store, key = dist.distributed_c10d._get_default_store(), f"crispedit/main/{next(_calls)}"
    if ranks.is_main():
        try:
            with ranks.alone():
                value = work()
        except CrispEditError as error:
            store.set(key, json.dumps({"error": type(error).__name__, "message": str(error)}))
            _until(store, f"{key}/read", ranks.count() - 1)
            raise
        store.set(key, json.dumps({"value": value}))
        return value
    while True:
        with _together("wait for rank 0"):
            if store.check([key]):
                outcome = json.loads(store.get(key))
                break
        time.sleep(POLL)
    if "error" in outcome:
        store.add(f"{key}/read", 1)
        raise cast(type[CrispEditError], getattr(errors, outcome["error"]))(outcome["message"])
    return cast(Value, outcome["value"])


def _until(store: Any, key: str, count: int) -> None:
    """Waits a little, until the others have learnt why the run ends."""
    end = time.monotonic() + LAST_SECONDS
    while store.add(key, 0) < count and time.monotonic() < end:
        time.sleep(POLL)


def on_main(work: Callable[[], Value]) -> Value | None:
    """As :func:`from_main`, of work whose result is of no use to the others: they get ``None``."""
    if ranks.count() == 1:
        return work()
    found: list[Value] = []
    from_main(lambda: found.append(work()))
    return found[0] if found else None
