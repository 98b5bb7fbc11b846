"""How much memory there is, and how much this process takes."""

import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

from . import ranks


def free_memory(device: torch.device) -> int:
    """What a device can still give.

    Args:
        device: A GPU or the CPU.

    Returns:
        Bytes; of the CPU, what the system can hand out, caches that it would give up included, to each of the
        processes that share the host.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for tensors to come
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // ranks.local_size()
    except OSError:
        pass
    return (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // ranks.local_size()
    )  # no Linux: half of what is there


def resident_bytes() -> int:
    """What this process takes of main memory.

    Returns:
        Bytes; 0 where the system does not say.
    """
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def peak_bytes() -> int:
    """The most main memory that this process has taken so far.

    Returns:
        Bytes. On Linux that is not what ``getrusage`` says, which counts what the process was before it became this
        program: a child would begin with its parent's peak.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back() -> None:
    """Gives the system the pages that malloc keeps of what was freed, where it is glibc's: a stage leaves gigabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
