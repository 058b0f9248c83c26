"""What samplers do to an ensemble's spread: the exact denoiser of the closed-form case, sampled in several ways.

    python benchmarks/forecast_spread.py
    python benchmarks/forecast_spread.py --leads 6 --steps 8 12 24 --sigmas 0.05:160 --rho 10
    python benchmarks/forecast_spread.py --leads 6 --residual --steps 6 8 12 --sigmas 0.05:20
    python benchmarks/forecast_spread.py --leads 6 --chance 32 128 256 2048

Prints, for each sampler, schedule and number of steps, the spread of members over that of the exact law, for each step
of a roll-out. A perfect sampler gives 1. The numbers are exact: sampler and roll-out are linear here, and the same at
every pixel, so the variance is the sum of squares of the response to the noise of one pixel.

With --chance: the measured spread / skill of 16 members of the exact law, mean and standard deviation over groups of so
many cases.
"""

import argparse

import torch
from torch import Tensor

from edm2.diffusion import SAMPLERS, time_steps
from edm2.forecast import Torus
from edm2.metrics.ensemble import score_ensemble

SCHEDULES = ["0.002:80", "0.02:40", "0.02:80", "0.05:160"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leads", type=int, default=1, help="steps of the roll-out")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 12, 16, 24, 32], help="noise levels")
    parser.add_argument("--sigmas", nargs="+", default=SCHEDULES, metavar="LOW:HIGH")
    parser.add_argument("--rho", type=float, nargs="+", default=[7.0])
    parser.add_argument("--samplers", nargs="+", default=["heun", "euler", "dpmpp-2m", "dpmpp-3m"])
    parser.add_argument("--residual", action="store_true", help="sample what the expected frame leaves")
    parser.add_argument("--chance", type=int, nargs="+", metavar="CASES", help="cases in a group")
    chosen = parser.parse_args()
    torus = Torus()
    if chosen.chance:
        return print_chance(torus, chosen.chance, chosen.leads)
    _, law = torus.law(torch.zeros(1, 2, torus.side, torus.side), chosen.leads)
    # Networks see data of standard deviation 0.5, which the usual schedule is made for.
    scale = 0.5 / float(law[0]) if chosen.residual else 0.5
    print(f"{'sampler':<10} {'sigma':>10} {'rho':>4} {'steps':>5}  spread / law, by steps ahead")
    for name in chosen.samplers:
        for schedule in chosen.sigmas:
            low, high = map(float, schedule.split(":"))
            for rho in chosen.rho:
                for steps in chosen.steps:
                    sampler = _Sampler(torus, name, time_steps(steps, low, high, rho), scale, chosen.residual)
                    ratios = " ".join(f"{r:.3f}" for r in (sampler.spreads(chosen.leads) / law).tolist())
                    print(f"{name:<10} {f'{low:g}-{high:g}':>10} {rho:>4g} {steps:>5}  {ratios}", flush=True)


def print_chance(torus: Torus, sizes: list[int], leads: int, members: int = 16) -> None:
    """Print what the ratio of spread and skill is for honest ensembles, by the number of cases."""
    cases = max(sizes)
    films = torus.frames(torch.arange(cases), 2 + leads, seed=11)
    start = films[:, :2].repeat_interleave(members, 0)
    made = torus.members(start, torch.arange(len(start)), leads, seed=12)
    made = made.reshape(cases, members, leads, 1, torus.side, torus.side)
    for size in sizes:
        ratios = []
        for first in range(0, cases - size + 1, size):
            some = slice(first, first + size)
            scores = score_ensemble(
                made[some].numpy(), films[some, 2:, None].numpy(), climate=False, quantiles=(), resamples=0
            )
            ratios.append(torch.from_numpy(scores.spread_skill.value[:, 0]))
        found = torch.stack(ratios)
        print(f"{size:>5} cases, mean:    {' '.join(f'{x:.3f}' for x in found.mean(0).tolist())}")
        if len(found) > 1:
            print(f"{'':>5}  deviation:    {' '.join(f'{x:.3f}' for x in found.std(0).tolist())}")


class _Sampler:
    """Draws the next frame with the exact denoiser; `scale` is the network's unit of a unit of the field."""

    def __init__(self, torus: Torus, name: str, sigmas: Tensor, scale: float, residual: bool) -> None:
        self._torus, self._name, self._sigmas = torus, name, sigmas
        self._scale, self._residual = scale, residual

    def spreads(self, leads: int) -> Tensor:
        """Standard deviation of a pixel after 1 to `leads` steps, `[leads]`."""
        side = self._torus.side
        frames, noise = torch.zeros(1, 2, side, side), torch.zeros(1, 1, side, side)
        noise[0, 0, 0, 0] = 1.0
        squares = []
        for _ in range(leads):
            made = self._next(frames, noise)
            squares.append(made.square().sum())
            frames, noise = torch.cat([frames[:, 1:], made], dim=1), torch.zeros_like(noise)
        return torch.stack(squares).cumsum(0).sqrt()

    def _next(self, frames: Tensor, noise: Tensor) -> Tensor:
        given = torch.zeros_like(frames) if self._residual else frames

        def denoiser(x: Tensor, sigma: Tensor, labels: object = None) -> Tensor:
            expected = self._torus.denoise(x.float() / self._scale, float(sigma) / self._scale, given)
            return self._scale * expected

        made = SAMPLERS[self._name](denoiser, noise, self._sigmas, None) / self._scale
        return made + self._torus.law(frames, 1)[0] if self._residual else made


if __name__ == "__main__":
    main()
