"""Shared by the speed benchmarks: taking turns in one run, medians, and the machine's own peak."""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from edm2.diffusion import Denoiser, build_denoiser


def options(description: str, **defaults: object) -> argparse.Namespace:
    """Command-line options; every default can be changed: --batch 32."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, value in defaults.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value)
        elif isinstance(value, tuple):
            parser.add_argument(flag, type=int, nargs="+", default=value)
        else:
            parser.add_argument(flag, type=type(value), default=value)
    return parser.parse_args()


def machine(device: torch.device) -> str:
    """The machine in one line."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads of {os.cpu_count()} processors"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def timed(
    function: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def in_turns(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time every function once a round, A B C A B C ..., after one call of each to warm up."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(timed(function, device, clock))
    return times


def commands_in_turns(commands: dict[str, list[str]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of `edm2 sample WORDS --out FILE`, start-up included, every command once a round.

    Other work on the machine changes them less than the time on the clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for number, (name, words) in enumerate(commands.items()):
                out = str(Path(folder) / f"{turn}-{number}.npz")
                command = [sys.executable, "-m", "edm2", "sample", *words, "--out", out]
                before = _used_by_children()
                subprocess.run(command, check=True, capture_output=True)
                seconds[name].append(_used_by_children() - before)
    return seconds


def _used_by_children() -> float:
    used = os.times()
    return used.children_user + used.children_system


def convolution_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """A convolution large enough to run at the machine's best; `CONVOLUTION_FLOPS` operations a call."""
    x = torch.randn(8, 256, 32, 32, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def run() -> object:
        with torch.no_grad():
            return torch.nn.functional.conv2d(x, w, padding=1)

    return run


CONVOLUTION_FLOPS = 2 * 8 * 256 * 32 * 32 * 256 * 9


def table(
    times: dict[str, list[float]],
    images: int,
    flops_per_image: float | dict[str, float],
    peak: list[float],
    notes: dict[str, str],
) -> str:
    """Medians, and ratios to the first row taken round by round. Two operations a multiply-accumulate."""
    first = next(iter(times))
    best = CONVOLUTION_FLOPS / statistics.median(peak) / 1e9
    lines = [
        f"convolution peak in the same run: {best:.0f} GFLOP/s in float32",
        f"{'path':<34} {'images/s':>9} {'GFLOP/s':>8} {'of peak':>8} {'ratio':>7}  difference",
    ]
    for name, seconds in times.items():
        rate = images / statistics.median(seconds)
        flops = flops_per_image[name] if isinstance(flops_per_image, dict) else flops_per_image
        speed = rate * flops / 1e9
        ratio = statistics.median(a / b for a, b in zip(times[first], seconds, strict=True))
        lines.append(
            f"{name:<34} {rate:>9.1f} {speed:>8.1f} {100 * speed / best:>7.0f}% {ratio:>6.2f}x  {notes.get(name, '')}"
        )
    return "\n".join(lines)


def make_denoiser(arguments: argparse.Namespace, **extra: object) -> Denoiser:
    """The network described by the options, with weights from seed 0 and gains above 0."""
    torch.manual_seed(0)
    denoiser = build_denoiser(
        arguments.resolution,
        arguments.channels,
        10,
        model_channels=arguments.model_channels,
        channel_mult=tuple(arguments.channel_mult),
        num_blocks=arguments.num_blocks,
        attn_resolutions=tuple(arguments.attention),
        channels_per_head=min(64, arguments.model_channels),
        **extra,
    )
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.5)
    return denoiser
