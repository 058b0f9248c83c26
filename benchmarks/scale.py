"""Memory, checkpoints, traffic and efficiency of sharded runs on clusters, computed from a few constants.

    python benchmarks/scale.py                       # the table of docs/reproducing.md
    python benchmarks/scale.py --network-gbytes 25   # another network between machines
    python benchmarks/scale.py --check               # bytes of a process against gloo processes on this machine

A model, not a measurement. Each process holds its part of weights, gradients, moments and averages in float32;
activations are not counted. A step gathers the weights twice and scatters the gradients once; machines of eight GPUs
talk over the slower network. Efficiency is given with all of that hidden behind the arithmetic, and with none of it.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
from checkpoint_memory import measure, network_width
from paper_cost import multiply_accumulates

from edm2.diffusion import build_denoiser
from edm2.ema.maths.plans import memory_bytes
from edm2.presets import get_preset

GPUS_OF_A_MACHINE = 8


@dataclasses.dataclass(frozen=True)
class Constants:
    """What the table rests on; bytes and operations a second.

    Attributes:
        peak: Of one GPU in bfloat16; 989e12 is an H100's.
        utilisation: Share of it that is reached, assumed.
        link: Between the GPUs of a machine, for each, one way; 450e9 is NVLink 4's.
        network: Between machines, for each GPU; 50e9 is a 400 Gbit/s adapter for each.
        disk: Of one machine, to storage that all share.
    """

    peak: float
    utilisation: float
    link: float
    network: float
    disk: float


def state_bytes(num_params: float, tracks: int, updates: int = 10_000) -> float:
    """Weights, Adam's moments, and averages with their base and windows."""
    return 3 * 4 * num_params + memory_bytes(int(num_params), tracks, updates=updates)


def row(name: str, gpus: int, batch: int, tracks: int, constants: Constants) -> str:
    """One line of the table."""
    num_params, flops = multiply_accumulates(name)
    state = state_bytes(num_params, tracks)
    part = (state + 4 * num_params) / gpus
    machines = -(-gpus // GPUS_OF_A_MACHINE)
    traffic = 3 * 4 * num_params * (gpus - 1) / gpus
    arithmetic = 6 * flops * batch / gpus / (constants.peak * constants.utilisation)
    talking = traffic / (constants.link if machines == 1 else constants.network)
    hidden, open_ = arithmetic / max(arithmetic, talking), arithmetic / (arithmetic + talking)
    return (
        f"| {name.removeprefix('edm2-')} | {gpus} | {part / 1e9:.2f} | {state / 1e9:.1f} | "
        f"{state / constants.disk:.0f} | {state / machines / constants.disk:.1f} | {traffic / 1e9:.1f} | "
        f"{open_:.0%} to {hidden:.0%} |"
    )


def table(batch: int, constants: Constants) -> str:
    """Markdown table."""
    lines = [
        "| network | GPUs | state of a process, GB | checkpoint, GB | seconds by one machine | seconds in parts | "
        "traffic of a step, GB | efficiency |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size in ("s", "xl", "xxl"):
        name = f"edm2-img512-{size}"
        tracks = len(get_preset(name).ema.sigma_rels)
        lines += [row(name, gpus, batch, tracks, constants) for gpus in (8, 64, 512)]
    return "\n".join(lines)


def check(million: int) -> None:
    """Compare computed bytes with those of processes that train here."""
    with torch.device("meta"):
        width = network_width(million)
        net = build_denoiser(8, 1, 0, model_channels=width, attn_resolutions=(), channels_per_head=16)
    wanted = state_bytes(sum(p.numel() for p in net.parameters()), 8, updates=1)
    for size in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), size, million)
        parts = [process["part"] for process in found]
        print(
            f"{size} processes: computed {wanted / size / 1e6:.1f} MB each, found {[p / 1e6 for p in parts]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--utilisation", type=float, default=0.35)
    parser.add_argument("--link-gbytes", type=float, default=450.0)
    parser.add_argument("--network-gbytes", type=float, default=50.0)
    parser.add_argument("--disk-gbytes", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--million", type=int, default=10, help="parameters of the check")
    chosen = parser.parse_args()
    if chosen.check:
        check(chosen.million)
        return
    giga = 1e9
    print(
        table(
            chosen.batch,
            Constants(
                chosen.peak_tflops * 1e12, chosen.utilisation, chosen.link_gbytes * giga,
                chosen.network_gbytes * giga, chosen.disk_gbytes * giga,
            ),
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
