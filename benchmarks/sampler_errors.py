"""Error against evaluations: samplers on a trained model, as distance from the converged solution, and their speed.

    python benchmarks/sampler_errors.py runs/demo/run --ema 0.07
    python benchmarks/sampler_errors.py runs/demo/run --ema 0.07 --guidance 1.7 --guide-ema 0.05 --guide-images 16000
    python benchmarks/sampler_errors.py runs/demo/run --commands 5    # whole commands, start-up included

Errors are root mean squares over the pixels, in levels of 255, from Heun with 200 levels in float64 between steps.
Paths take turns; speeds are medians of ratios to Heun with 32 levels, the published default.
"""

import argparse
import functools
import statistics
from pathlib import Path

import torch
from common import commands_in_turns, in_turns, machine

from edm2.diffusion import sample_heun
from edm2.generate import ImageGenerator

# Sampler, noise levels, rho, precision.
PATHS = [
    ("heun", 32, 7.0, "float32"),
    ("heun", 16, 7.0, "float32"),
    ("euler", 32, 7.0, "float32"),
    *(("dpmpp-2m", steps, 7.0, "float32") for steps in (32, 24, 16)),
    *(("dpmpp-3m", steps, 7.0, "float32") for steps in (32, 28, 24)),
    *(("dpmpp-3m", steps, 10.0, "float32") for steps in (28, 24, 22, 20, 16)),
    ("heun", 32, 7.0, "bfloat16"),
    ("dpmpp-3m", 24, 10.0, "bfloat16"),
]
DEFAULTS = {"heun": ["--sampler", "heun"], "default": [], "default, bf16": ["--dtype", "bfloat16"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="run, or model file")
    parser.add_argument("--ema", type=float, help="EMA length, for a run")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--guide-ema", type=float)
    parser.add_argument("--guide-images", type=float)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commands", type=int, default=0, help="rounds of whole commands, 0 for none")
    arguments = parser.parse_args()
    print(machine(torch.device("cpu")))
    if arguments.commands:
        whole_commands(arguments)
    else:
        errors(arguments)


def errors(arguments: argparse.Namespace) -> None:
    """Print error and speed of each path."""
    generators = {
        dtype: ImageGenerator.load(arguments.model, arguments.ema, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    }
    guide = None
    if arguments.guide_ema is not None:
        guide = ImageGenerator.load(arguments.model, arguments.guide_ema, num_images=arguments.guide_images)
    main = generators["float32"]
    ends = main.coding.values.encode(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
    level = float(ends[1] - ends[0]) / 255
    seeds = range(arguments.images)
    common = dict(guide=guide, guidance=arguments.guidance)

    def sampled(sampler: object, num_steps: int, rho: float, dtype: str, **extra: object) -> torch.Tensor:
        return generators[dtype].latents(
            seeds, sampler=sampler, num_steps=num_steps, rho=rho, **common, **extra
        )

    exact = sampled(functools.partial(sample_heun, dtype=torch.float64), 200, 7.0, "float32")
    out: dict[str, torch.Tensor] = {}

    def path(name: str, options: tuple[str, int, float, str]):
        return lambda: out.__setitem__(name, sampled(*options))

    names = {f"{s}, {n} levels, rho {rho:g}, {dtype}": (s, n, rho, dtype) for s, n, rho, dtype in PATHS}
    times = in_turns({name: path(name, options) for name, options in names.items()},
                     torch.device("cpu"), arguments.rounds)  # fmt: skip
    base = times[next(iter(names))]
    print(f"{arguments.model}, {arguments.images} images, guidance {arguments.guidance:g}")
    print(f"{'path':<40} {'evaluations':>11} {'RMS':>6} {'largest':>8} {'speed':>7}")
    for name, (sampler, steps, _, _) in names.items():
        difference = (out[name].double() - exact) / level
        speed = statistics.median(a / b for a, b in zip(base, times[name], strict=True))
        print(
            f"{name:<40} {2 * steps - 1 if sampler == 'heun' else steps:>11} {rms(difference):>6.2f} "
            f"{float(difference.abs().max()):>8.1f} {speed:>6.2f}x"
        )


def rms(x: torch.Tensor) -> float:
    """Root mean square."""
    return float(x.square().mean().sqrt())


def whole_commands(arguments: argparse.Namespace) -> None:
    """Print the processor seconds of `edm2 sample` with the published sampler and with the default one."""
    ema = [] if arguments.ema is None else ["--ema", str(arguments.ema)]
    common = [str(arguments.model), *ema, "--seeds", f"0-{arguments.images - 1}"]
    seconds = commands_in_turns(
        {name: [*common, *options] for name, options in DEFAULTS.items()}, arguments.commands
    )
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["heun"], values, strict=True))
        print(f"{name:<16} {statistics.median(values):>6.1f} s for {arguments.images} images, {ratio:.2f}x")


if __name__ == "__main__":
    main()
