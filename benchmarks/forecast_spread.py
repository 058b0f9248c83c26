"""What samplers do to an ensemble's spread: the exact denoiser of the closed-form case, sampled in several ways.

    python benchmarks/forecast_spread.py

Prints, for each sampler and number of evaluations, the standard deviation of members around the exact mean over that of
the exact law, and the error of their mean in units of the law's variance. A perfect sampler gives 1 and 0.
"""

import argparse

import torch

from edm2.diffusion import SAMPLERS, time_steps
from edm2.forecast import Torus
from edm2.nn import keyed_normal

SCHEDULES = ((0.002, 80.0), (0.02, 40.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 12, 16, 24, 32])
    chosen = parser.parse_args()
    torus = Torus()
    frames = torus.frames(torch.arange(chosen.cases), 2, seed=0).repeat_interleave(chosen.members, 0)
    mean, std = torus.law(frames, 1)
    index = torch.arange(len(frames))
    noise = keyed_normal(index, mean.shape[1:], seed=1)

    # Networks see data of standard deviation 0.5, which the usual schedule is made for.
    def denoiser(x: torch.Tensor, sigma: torch.Tensor, labels: object = None) -> torch.Tensor:
        return 0.5 * torus.denoise(2 * x.float(), 2 * float(sigma), frames)

    print(
        f"{'sampler':<14} {'sigma':>12} {'steps':>5} {'evaluations':>11} {'std / law':>9} {'mean error':>10}"
    )
    for name, sampler in SAMPLERS.items():
        for low, high in SCHEDULES:
            for steps in chosen.steps:
                torch.manual_seed(0)
                made = 2 * sampler(denoiser, noise, time_steps(steps, low, high), None)
                off = (made - mean).reshape(chosen.cases, chosen.members, -1)
                spread = float(off.std() / std[0])
                bias = off.mean(1).square().mean() - off.var(1).mean() / chosen.members
                count = 2 * steps - 1 if name == "heun" else steps
                print(
                    f"{name:<14} {f'{low:g}-{high:g}':>12} {steps:>5} {count:>11} {spread:>9.3f} "
                    f"{float(bias / std[0] ** 2):>10.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
