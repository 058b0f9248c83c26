"""Speed and memory of reconstruction, relative to reading and summing the same files; eight targets relative to one.

    python benchmarks/ema_reconstruct_speed.py                  # 5M parameters, 0.6 GB of files
    python benchmarks/ema_reconstruct_speed.py --million 100    # 16 times x 2 tracks, 12.8 GB in --folder

The sum reads every file with safetensors and adds it to a running total. A reconstruction also checks every
byte, estimates how the weights moved and solves for the coefficients. Peak memory is that of a fresh
process beyond what it holds after its imports, in models of float32 (Linux only). On a busy machine, --cpu-time counts
the time of the processor instead of the clock on the wall.
"""

import multiprocessing
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import in_turns, machine, options
from safetensors.torch import load_file
from torch import nn

from edm2.ema import PowerEMA, reconstruct_many

EIGHT = (0.03, 0.04, 0.06, 0.075, 0.12, 0.15, 0.2, 0.25)


def write_snapshots(folder: Path, num_params: int, times: int) -> None:
    """Snapshots of a random walk."""
    generator = torch.Generator().manual_seed(0)
    # Matrices of 4M, as large layers are, and the rest in one.
    sizes = [4 << 20] * (num_params // (4 << 20)) + [num_params % (4 << 20)]
    model = nn.ParameterList([torch.randn(size, generator=generator) for size in sizes if size])
    ema = PowerEMA(model)
    for step in range(1, times + 1):
        with torch.no_grad():
            for parameter in model:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
        ema.update(step)
        ema.snapshot(folder)


def read_and_sum(folder: Path) -> dict[str, torch.Tensor]:
    """The same files, all summed up."""
    total: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name in total:
                total[name] += tensor
            else:
                total[name] = tensor
    return total


def peak_models(folder: Path, num_targets: int, threads: int) -> float:
    """Peak memory of a reconstruction in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_here, (folder, num_targets, threads))


def _peak_here(folder: Path, num_targets: int, threads: int) -> float:
    torch.set_num_threads(threads)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = _peak_kilobytes()
    (first, *_) = results = reconstruct_many(folder, EIGHT[:num_targets], warn_above=10)
    after = _peak_kilobytes()
    assert len(results) == num_targets
    return 1024 * (after - before) / sum(4 * x.numel() for x in first.tensors.values())


def _peak_kilobytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main():
    arguments = options(__doc__, million=5, times=16, rounds=5, folder=tempfile.gettempdir(), cpu_time=False)
    folder = Path(tempfile.mkdtemp(prefix="ema_speed_", dir=arguments.folder))
    try:
        write_snapshots(folder, arguments.million * 10**6, arguments.times)
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        methods = {
            "read and sum": lambda: read_and_sum(folder),
            "one target": lambda: reconstruct_many(folder, EIGHT[:1], warn_above=10),
            "eight targets": lambda: reconstruct_many(folder, EIGHT, warn_above=10),
        }
        clock = time.process_time if arguments.cpu_time else time.perf_counter
        times = in_turns(methods, torch.device("cpu"), arguments.rounds, clock)
        peaks = {n: peak_models(folder, n, torch.get_num_threads()) for n in (1, 8)}
    finally:
        shutil.rmtree(folder)
    print(f"{arguments.million}M parameters, {arguments.times} times x 2 tracks, {num_bytes / 1e9:.1f} GB")
    print(machine(torch.device("cpu")))
    for name, seconds in times.items():
        speed = num_bytes / statistics.median(seconds) / 1e9
        ratio = statistics.median(a / b for a, b in zip(times["read and sum"], seconds, strict=True))
        print(
            f"{name:<14} {statistics.median(seconds):>8.2f} s {speed:>6.2f} GB/s  {ratio:>5.0%} of read and sum"
        )
    more = statistics.median(b / a for a, b in zip(times["one target"], times["eight targets"], strict=True))
    print(f"eight targets take {more:.2f} times as long as one")
    for count, peak in peaks.items():
        print(f"peak memory with {count} target{'s' * (count > 1)}: {peak:.2f} models")


if __name__ == "__main__":
    main()
