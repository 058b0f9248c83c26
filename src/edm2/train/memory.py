"""Memory use of a run, and what the sensors of its GPU say."""

import os
import resource
import sys

import torch


def used_bytes(device: torch.device) -> int:
    """Return the memory to watch: of the process now on a CPU, the peak of tensors on a GPU.

    Outside Linux, where the system does not tell the current use, it is the peak of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of the process on a CPU, of tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_sensors(device: torch.device) -> dict[str, float]:
    """Return the load (percent) and temperature (degrees Celsius) of a GPU.

    Empty on a CPU, without the package nvidia-ml-py, and where the driver does not tell.
    """
    if device.type != "cuda":
        return {}
    try:
        return {
            "gpu_load": float(torch.cuda.utilization(device)),
            "gpu_celsius": float(torch.cuda.temperature(device)),
        }
    except Exception:  # the driver's errors have no common class, and no sensor is worth a run
        return {}


def size_text(num_bytes: float) -> str:
    """Format a number of bytes: `1.5 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
