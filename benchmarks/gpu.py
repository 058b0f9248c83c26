"""Everything to be known about one GPU in eight minutes: correctness, training step, averages, sampling, memory.

    python benchmarks/gpu.py --out gpu                       # writes gpu.json and gpu.md
    python benchmarks/gpu.py --device cpu --tiny --out tiny  # the same at a tiny size, to try the script

Parts run in the order of their worth; those that no longer fit into --minutes are listed as left out. Operations are
counted as in the paper (App. D.5), two a multiply-accumulate; utilisation is relative to a large convolution in the
same precision, measured in the same run.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import CONVOLUTION_FLOPS, convolution_peak, in_turns, machine, timed
from ema_reconstruct_speed import EIGHT, read_and_sum, write_snapshots
from ema_update_cost import Counter, flat, make_model, peers
from train_step import Step

from edm2.diffusion import Denoiser, build_denoiser, edm2_loss, sample_dpmpp_3m, sample_heun, time_steps
from edm2.diffusion.fixed_weights import SamplingNetwork
from edm2.ema import PowerEMA, plan, reconstruct_many
from edm2.nn import ForcedWeightNorm, count_flops, keyed_normal, use_channels_last

CHANNELS = {"xs": 128, "s": 192, "m": 256, "l": 320}
BATCHES = (256, 128, 64, 32, 16, 8, 4)
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="tiny networks and models, to try the script")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    started, left_out, tables = time.monotonic(), [], {}
    for name, part in {
        "fast paths": fast_paths, "averages": averages, "training step": training_steps, "sampling": sampling,
        "reconstruction": reconstruction, "sharded on one device": sharded, "compiled step": compiled_steps,
    }.items():  # fmt: skip
        rows: list[Row] = []
        for make in part(device, arguments):
            if time.monotonic() - started > 60 * arguments.minutes:
                left_out.append(name)
                break
            rows.append(make())
            print(name, rows[-1], flush=True)
        tables[name] = rows
    result = {"machine": machine(device), "left out": sorted(set(left_out)), "tables": tables}
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(markdown(result))
    wrong = [row for row in tables["fast paths"] if not row["ok"]]
    if wrong:
        raise SystemExit(f"fast paths differ from the CPU's plain path: {wrong}")


def markdown(result: dict[str, Any]) -> str:
    """The tables as a page."""
    lines = [result["machine"], ""]
    for name, rows in result["tables"].items():
        if rows:
            keys = list(rows[0])
            lines += [f"## {name.capitalize()}", "", "| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
            lines += ["| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in rows] + [""]
    if result["left out"]:
        lines += ["Not measured in the time: " + ", ".join(result["left out"]) + "."]
    return "\n".join(lines) + "\n"


Parts = list[Callable[[], Row]]


def fast_paths(device: torch.device, arguments: argparse.Namespace) -> Parts:
    """Loss, gradients and samples on the device against the plain path in float32 on the CPU."""
    torch.manual_seed(0)
    plain = network(16, 3, 32, heads=32)
    images = 0.5 * keyed_normal(torch.arange(4), (3, 16, 16))
    noise, sigma = keyed_normal(torch.arange(4), (3, 16, 16), seed=1), torch.tensor([0.1, 0.5, 2.0, 20.0])
    labels = torch.arange(4)

    def gradients(denoiser: Denoiser, where: torch.device) -> torch.Tensor:
        ForcedWeightNorm(denoiser)()
        denoiser.zero_grad()
        edm2_loss(
            denoiser, images.to(where), labels.to(where), sigma.to(where), noise.to(where)
        ).sum().backward()
        return torch.cat([p.grad.flatten().cpu().double() for p in denoiser.parameters()])

    def samples(denoiser: Any, where: torch.device) -> torch.Tensor:
        return sample_heun(denoiser, noise.to(where), time_steps(8), labels.to(where)).cpu().double()

    def copied(dtype: torch.dtype, tf32: bool) -> Denoiser:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        other = network(16, 3, 32, heads=32, dtype=dtype)
        other.load_state_dict(plain.state_dict())
        use_channels_last(other.to(device))
        return other

    cpu = torch.device("cpu")
    exact_gradients, exact_samples = gradients(plain.train(), cpu), samples(plain.eval(), cpu)

    def compare(name: str, dtype: torch.dtype, tf32: bool, limit: float) -> Row:
        found_gradients = gradients(copied(dtype, tf32).train(), device)
        found_samples = samples(SamplingNetwork(copied(dtype, tf32).eval()), device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        errors = relative(found_gradients, exact_gradients), relative(found_samples, exact_samples)
        return {"path": name, "gradients": f"{errors[0]:.1e}", "samples": f"{errors[1]:.1e}",
                "limit": limit, "ok": max(errors) < limit}  # fmt: skip

    return [
        lambda: compare("float32", torch.float32, False, 1e-4),
        lambda: compare("TF32", torch.float32, True, 1e-2),
        lambda: compare("bfloat16", torch.bfloat16, True, 1e-1),
        lambda: average_error(device),
    ]


def average_error(device: torch.device) -> Row:
    """Averages on the device against the same on the CPU, after 50 updates."""
    found = []
    for where in (device, torch.device("cpu")):
        model = make_model(100_000, 10).to(where)
        start = [p.detach().clone() for p in model.parameters()]
        ema = PowerEMA(model, (0.05, 0.10))
        for step in range(1, 51):
            with torch.no_grad():
                for p, first in zip(model.parameters(), start, strict=True):
                    p.copy_(first * (1 + 0.01 * step))
            ema.update(step)
        found.append(torch.cat([x.flatten().cpu().double() for x in ema.average(0.10).values()]))
    error = relative(*found)
    return {"path": "averages", "gradients": "", "samples": f"{error:.1e}", "limit": 1e-6, "ok": error < 1e-6}


def training_steps(device: torch.device, arguments: argparse.Namespace, *, compiled: bool = False) -> Parts:
    """Images a second, utilisation and peak memory, each at the largest batch that fits."""
    sizes = {"tiny": 16} if arguments.tiny else CHANNELS
    resolution = 16 if arguments.tiny else 64
    dtypes = [torch.bfloat16] if compiled else [torch.float32, torch.bfloat16]
    return [
        lambda name=name, width=width, channels=channels, dtype=dtype: step_row(
            device, arguments, name, width, resolution, channels, dtype, compiled
        )
        for name, width in sizes.items()
        for channels in (4, 3)
        for dtype in dtypes
    ]


def compiled_steps(device: torch.device, arguments: argparse.Namespace) -> Parts:
    """The same, compiled: last, because compiling takes minutes."""
    return training_steps(device, arguments, compiled=True)[:2]


def step_row(
    device: torch.device, arguments: argparse.Namespace, name: str, width: int, resolution: int, channels: int,
    dtype: torch.dtype, compiled: bool,
) -> Row:  # fmt: skip
    """One training step."""
    with torch.device("meta"):
        shape = (channels, resolution, resolution)
        flops = count_flops(
            network(resolution, channels, width).eval(), torch.zeros(1, *shape), torch.ones(1)
        )
    denoiser = network(resolution, channels, width).to(device)
    for batch in (4,) if arguments.tiny else BATCHES:
        index = torch.arange(batch, device=device)
        data = (
            0.5 * keyed_normal(index, shape), index % 10, torch.ones(batch, device=device),
            keyed_normal(index, shape, seed=1),
        )  # fmt: skip
        step = None
        try:
            reset_peak(device)
            step = Step(denoiser, data, quick=True, dtype=dtype, compiled=compiled)
            first = timed(step, device)
            break
        except torch.OutOfMemoryError:
            del step
            torch.cuda.empty_cache()
    peak = convolution_peak(device, dtype)
    times = in_turns({"step": step, "peak": peak}, device, arguments.rounds)
    rate = batch / statistics.median(times["step"])
    best = CONVOLUTION_FLOPS / statistics.median(times["peak"])
    return {
        "network": f"{name} {resolution}x{resolution}x{channels}",
        "precision": str(dtype).removeprefix("torch."),
        "compiled": f"first step {first:.0f} s" if compiled else "no",
        "batch": batch,
        "images/s": round(rate, 1),
        "TFLOP/s": round(rate * 6 * flops / 1e12, 3),
        "of convolution peak": f"{rate * 6 * flops / best:.0%}",
        "peak memory, GB": peak_memory(device),
    }


def averages(device: torch.device, arguments: argparse.Namespace) -> Parts:
    """One update, relative to a flat in-place lerp of the same bytes."""
    million = 0.1 if arguments.tiny else 100

    def row(tracks: int) -> Row:
        model = make_model(int(million * 10**6), 20 if arguments.tiny else 300).to(device)
        ema = PowerEMA(model, (0.05, 0.10) if tracks == 2 else plan(tracks=tracks).sigma_rels)
        ema.update(500)
        methods = {"least": flat(model, tracks), "edm2": Counter(ema.update, 500)}
        with tempfile.TemporaryDirectory() as folder:
            if tracks == 2:
                methods |= peers(model, folder)
            times = in_turns(methods, device, arguments.rounds)
        found = {
            name: statistics.median(a / b for a, b in zip(seconds, times["least"], strict=True))
            for name, seconds in times.items()
        }
        return {"parameters": f"{million:g}M", "tracks": tracks, "ms": round(1e3 * statistics.median(times["edm2"]), 3),
                **{name: f"{ratio:.2f}x" for name, ratio in found.items()}}  # fmt: skip

    return [lambda: row(2), lambda: row(8)]


def sampling(device: torch.device, arguments: argparse.Namespace) -> Parts:
    """Images a second with the published sampler and the default one."""
    resolution, width, batch = (16, 16, 4) if arguments.tiny else (64, CHANNELS["s"], 64)

    def row(name: str, sampler: Callable[..., Any], steps: int, dtype: torch.dtype) -> Row:
        fixed = SamplingNetwork(network(resolution, 4, width, dtype=dtype).eval().to(device))
        noise = keyed_normal(torch.arange(batch, device=device), (4, resolution, resolution))
        labels = torch.arange(batch, device=device) % 10
        run = {"run": lambda: sampler(fixed, noise, time_steps(steps), labels)}
        seconds = statistics.median(in_turns(run, device, min(arguments.rounds, 3))["run"])
        precision = str(dtype).removeprefix("torch.")
        return {
            "sampler": name,
            "levels": steps,
            "precision": precision,
            "images/s": round(batch / seconds, 2),
        }

    return [
        lambda name=name, run=run, steps=steps, dtype=dtype: row(name, run, steps, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for name, run, steps in (("heun", sample_heun, 32), ("dpmpp-3m", sample_dpmpp_3m, 24))
    ]


def reconstruction(device: torch.device, arguments: argparse.Namespace) -> Parts:
    """Reconstruction from files relative to reading and summing them; on the host."""

    def row() -> Row:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_snapshots(folder, 10**5 if arguments.tiny else 50 * 10**6, 4)
            size = sum(path.stat().st_size for path in folder.iterdir())
            times = in_turns(
                {
                    "read and sum": lambda: read_and_sum(folder),
                    "one": lambda: reconstruct_many(folder, EIGHT[:1], warn_above=10),
                    "eight": lambda: reconstruct_many(folder, EIGHT, warn_above=10),
                },
                torch.device("cpu"), 2,
            )  # fmt: skip
        seconds = {name: statistics.median(values) for name, values in times.items()}
        return {
            "GB": round(size / 1e9, 3),
            **{f"{name}, s": round(value, 2) for name, value in seconds.items()},
        }

    return [row]


def sharded(device: torch.device, arguments: argparse.Namespace) -> Parts:
    """A step of the FSDP2 path on one device: loss and peak memory beside the plain path's."""

    def row() -> Row:
        import torch.distributed as dist

        from edm2.train.parallel import shard
        from edm2.train.world import World

        resolution, width, batch = (16, 16, 4) if arguments.tiny else (64, CHANNELS["s"], 32)
        index = torch.arange(batch, device=device)
        data = [0.5 * keyed_normal(index, (4, resolution, resolution)), index % 10, torch.ones(batch, device=device),
                keyed_normal(index, (4, resolution, resolution), seed=1)]  # fmt: skip
        with tempfile.NamedTemporaryFile() as file:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                init_method=f"file://{file.name}.store", rank=0, world_size=1,
            )  # fmt: skip
            try:
                found: Row = {}
                for name in ("plain", "sharded"):
                    reset_peak(device)
                    denoiser = network(resolution, 4, width).train().to(device)
                    if name == "sharded":
                        shard(denoiser, World(rank=0, size=1, device=device))
                    loss = edm2_loss(denoiser, *data).mean()
                    loss.backward()
                    found |= {f"loss, {name}": float(loss.detach()), f"GB, {name}": peak_memory(device)}
                return found
            finally:
                dist.destroy_process_group()

    return [row]


def network(
    resolution: int, channels: int, width: int, *, heads: int = 64, dtype: torch.dtype = torch.float32
) -> Denoiser:
    """Config G with ten classes; its gains are above 0, so that every layer matters."""
    torch.manual_seed(0)
    small = dict(channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,)) if width < 64 else {}
    denoiser = build_denoiser(
        resolution,
        channels,
        10,
        model_channels=width,
        channels_per_head=min(heads, width),
        dtype=dtype,
        **small,
    )
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.5)
    return denoiser


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference relative to the norm."""
    return float((found - exact).norm() / exact.norm())


def reset_peak(device: torch.device) -> None:
    """Start measuring peak memory anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float | str:
    """Peak memory in GB since `reset_peak`."""
    return (
        round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if device.type == "cuda" else "not measured"
    )


if __name__ == "__main__":
    main()
