"""How much memory a run takes."""

import os
import resource
import sys

import torch


def used_bytes(device: torch.device) -> int:
    """Memory worth watching: of the process now on a CPU, the most that tensors took so far on a GPU.

    Where the system does not tell what a process has now (outside Linux), the most that it had.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: of the process on a CPU, of tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def size_text(num_bytes: float) -> str:
    """Bytes for people: `1.5 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
