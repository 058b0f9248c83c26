"""Diffusion of what a regression leaves, with half of the sampling steps, beside the demo's plain diffusion.

    edm2 demo --forecast --out runs/demo-forecast
    python benchmarks/forecast_residual.py runs/demo-forecast

Trains a regression and a diffusion of its residuals, with as many images in all as the demo's network saw, and
forecasts the demo's films. Prints CRPS over that of the exact law, spread over skill, and the test of the ranks.
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from common import machine

from edm2.forecast import Forecast, Torus, make_forecast, past_frames, read_cases, read_forecast
from edm2.forecast.demo import ForecastDemo
from edm2.generate import ImageGenerator
from edm2.metrics.ensemble import score_ensemble
from edm2.train import train

REGRESSION = 1 / 4  # share of the images
# Residuals have mean 0: no high noise levels are needed to hide a mean.
SAMPLER: dict[str, Any] = {"sampler": "dpmpp-2m", "num_steps": 8, "sigma_min": 0.05, "sigma_max": 10.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="folder of `edm2 demo --forecast`")
    parser.add_argument("--images", type=int, default=ForecastDemo().num_images)
    parser.add_argument("--ema", type=float, default=0.1)
    given = parser.parse_args()
    start = time.process_time()
    size = ForecastDemo(num_images=round(given.images * REGRESSION))
    regression = dataclasses.replace(size.config(given.demo / "pairs.npz"), objective="mean")
    train(regression, given.demo / "mean")
    size = ForecastDemo(num_images=given.images - size.num_images)
    plain = size.config(given.demo / "pairs.npz")
    # Residuals have the standard deviation of the data after coding, so their waves lie at higher noise levels.
    _, std = Torus().law(torch.zeros(1, 2, 16, 16), 1)
    loss = dataclasses.replace(plain.loss, p_mean=plain.loss.p_mean - math.log(float(std[0])))
    run = given.demo / "residual"
    train(dataclasses.replace(plain, loss=loss, residual=str(given.demo / "mean")), run)
    generator = ImageGenerator.load(run, given.ema)
    cases = read_cases(given.demo / "films.npz", frames=past_frames(generator), channels=1)
    before = read_forecast(given.demo / "forecast.npz")
    members, leads = before.members.shape[1:3]
    made = make_forecast(
        generator, cases, given.demo / "residual.npz", steps=leads, members=members, **SAMPLER
    )
    print(f"{machine(torch.device('cpu'))}; {time.process_time() - start:.0f} s of CPU time")
    show(f"plain, {before.settings['sampler']['num_steps']} steps", before)
    show(f"residual, {SAMPLER['num_steps']} steps", made)


def show(name: str, forecast: Forecast) -> None:
    """Print the scores by lead time."""
    assert forecast.truth is not None
    assert forecast.start is not None
    scores = score_ensemble(forecast.members, forecast.truth, climate=False, quantiles=(), resamples=0)
    law = Torus().law_score(*(torch.from_numpy(x[:, :, 0]) for x in (forecast.start, forecast.truth)))
    rows = {
        "CRPS / law's": scores.crps_fair.value[:, 0] / law,
        "spread / skill": scores.spread_skill.value[:, 0],
        "ranks, p": scores.ranks_p[:, 0],
    }
    print(name)
    for label, values in rows.items():
        print(f"  {label:<15} {' '.join(f'{v:.3f}' for v in values)}")


if __name__ == "__main__":
    main()
