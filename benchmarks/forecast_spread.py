"""What samplers do to an ensemble's spread: the exact denoiser of the closed-form case, sampled in several ways.

    python benchmarks/forecast_spread.py
    python benchmarks/forecast_spread.py --leads 6 --steps 12 24 32

Prints, for each sampler, schedule and number of steps, the spread of members over that of the exact law, for each step
of a roll-out. A perfect sampler gives 1.
"""

import argparse

import torch

from edm2.diffusion import SAMPLERS, time_steps
from edm2.forecast import Torus
from edm2.nn import keyed_normal

SCHEDULES = ((0.002, 80.0), (0.02, 40.0), (0.02, 80.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--leads", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 12, 16, 24, 32])
    parser.add_argument(
        "--samplers", nargs="+", default=["heun", "euler", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m"]
    )
    chosen = parser.parse_args()
    torus = Torus()
    start = torus.frames(torch.arange(chosen.cases), 2, seed=0).repeat_interleave(chosen.members, 0)
    _, std = torus.law(start, chosen.leads)
    index = torch.arange(len(start))
    print(f"{'sampler':<14} {'sigma':>12} {'steps':>5}  spread / law, by steps ahead")
    for name in chosen.samplers:
        for low, high in SCHEDULES:
            for steps in chosen.steps:
                torch.manual_seed(0)
                frames, ratios = start, []
                for lead in range(chosen.leads):
                    noise = keyed_normal(index, (1, torus.side, torus.side), seed=1, stream=lead)
                    made = _next(torus, frames, noise, name, time_steps(steps, low, high))
                    frames = torch.cat([frames[:, 1:], made], dim=1)
                    spread = made.reshape(chosen.cases, chosen.members, -1).var(1).mean().sqrt()
                    ratios.append(f"{float(spread / std[lead]):.3f}")
                print(f"{name:<14} {f'{low:g}-{high:g}':>12} {steps:>5}  {' '.join(ratios)}", flush=True)


def _next(
    torus: Torus, frames: torch.Tensor, noise: torch.Tensor, sampler: str, sigmas: torch.Tensor
) -> torch.Tensor:
    # Networks see data of standard deviation 0.5, which the usual schedule is made for.
    def denoiser(x: torch.Tensor, sigma: torch.Tensor, labels: object = None) -> torch.Tensor:
        return 0.5 * torus.denoise(2 * x.float(), 2 * float(sigma), frames)

    return 2 * SAMPLERS[sampler](denoiser, noise, sigmas, None)


if __name__ == "__main__":
    main()
