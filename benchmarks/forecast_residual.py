"""Diffusion of what a regression leaves, with half of the sampling steps, beside plain diffusion.

    edm2 demo --forecast --out runs/demo-forecast
    python benchmarks/forecast_residual.py runs/demo-forecast
    python benchmarks/forecast_residual.py runs/demo-forecast --sweep 32:0.02 16:0.02 32:0.04 16:0.04

Trains a regression and a diffusion of its residuals, with as many images in all as the demo's network saw, and plain
diffusion with the same optimiser, and forecasts the demo's films with each. Prints CRPS over that of the exact law,
spread over skill, the test of the ranks, and the difference of CRPS to the demo's forecast with its 95% interval over
films. The same command continues after an interruption.

With --sweep: the error of the mean of regressions, by batch, rate and number of images.
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import scoringrules
import torch
from common import machine

from edm2.forecast import Forecast, Torus, make_forecast, past_frames, read_cases, read_forecast
from edm2.forecast.demo import ForecastDemo
from edm2.generate import ImageGenerator
from edm2.metrics.ensemble import score_ensemble
from edm2.train import TrainConfig, train

# Residuals have mean 0, so no high noise levels are needed to hide a mean. With the exact denoiser, the spread is 1.035
# of the exact law's (forecast_spread.py --residual), as with 16 steps of plain diffusion: both are on equal terms.
FEW: dict[str, Any] = {
    "sampler": "dpmpp-2m",
    "num_steps": 8,
    "sigma_min": 0.05,
    "sigma_max": 10.0,
    "rho": 5.0,
}
PLAIN: dict[str, Any] = {"sampler": "dpmpp-2m", "sigma_min": 0.05, "sigma_max": 160.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="folder of `edm2 demo --forecast`")
    parser.add_argument("--images", type=int, default=ForecastDemo().num_images)
    parser.add_argument("--share", type=float, default=0.75, help="share of the images for the regression")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.04)
    parser.add_argument("--ema", type=float, default=0.1)
    parser.add_argument("--sweep", nargs="+", metavar="BATCH:RATE", help="regressions to compare instead")
    given = parser.parse_args()
    if given.sweep:
        return sweep(given)
    start = time.process_time()
    regression = settings(given, given.share, objective="mean")
    train(regression, given.demo / "mean")
    rest = settings(given, 1 - given.share, residual=str(given.demo / "mean"))
    # Residuals have the standard deviation of the data after coding, so their waves lie at higher noise levels.
    _, std = Torus().law(torch.zeros(1, 2, 16, 16), 1)
    loss = dataclasses.replace(rest.loss, p_mean=rest.loss.p_mean - math.log(float(std[0])))
    train(dataclasses.replace(rest, loss=loss), given.demo / "residual")
    train(settings(given, 1), given.demo / "plain")
    print_mean_error(given.demo, given.ema)
    demo = read_forecast(given.demo / "forecast.npz")
    made = {f"the demo's, {demo.settings['sampler']['num_steps']} steps": demo}
    for run, options in (
        ("residual", FEW),
        ("plain", {**PLAIN, "num_steps": 16}),
        ("plain", {**PLAIN, "num_steps": 8}),
    ):
        generator = ImageGenerator.load(given.demo / run, given.ema)
        steps, (members, leads) = options["num_steps"], demo.members.shape[1:3]
        made[f"{run}, {steps} steps"] = make_forecast(
            generator,
            read_cases(given.demo / "films.npz", frames=past_frames(generator), channels=1),
            given.demo / f"{run}-{steps}.npz",
            steps=leads,
            members=members,
            **options,
        )
    print(f"{machine(torch.device('cpu'))}; {time.process_time() - start:.0f} s of CPU time")
    for name, forecast in made.items():
        show(name, forecast, made)


def settings(given: argparse.Namespace, share: float, **changes: Any) -> TrainConfig:
    """The demo's settings for a share of the images, with the batch and the rate of the command line."""
    config = ForecastDemo(num_images=round(given.images * share)).config(given.demo / "pairs.npz")
    optimizer = dataclasses.replace(config.optimizer, ref_lr=given.rate)
    return dataclasses.replace(config, batch_size=given.batch, optimizer=optimizer, **changes)


def sweep(given: argparse.Namespace, images: int = 36_864) -> None:
    """Train regressions, and print the error of their mean at quarters of the run, with EMA length 0.05."""
    frames = Torus().frames(torch.arange(512), 3, seed=77)
    mean, std = Torus().law(frames[:, :2], 1)
    for choice in given.sweep:
        batch, rate = choice.split(":")
        given.batch, given.rate = int(batch), float(rate)
        config = settings(given, images / given.images, objective="mean")
        run = given.demo / f"mean-{batch}-{rate}"
        train(dataclasses.replace(config, snapshot_images=images // 4), run, quiet=True)
        errors = []
        for count in range(images // 4, images + 1, images // 4):
            generator = ImageGenerator.load(run, 0.05, num_images=count)
            made = torch.from_numpy(generator.images(range(512), conditions=frames[:, :2].numpy()))
            errors.append(float((made - mean).square().mean().sqrt() / std[0]))
        print(f"batch {batch}, rate {rate}: {' '.join(f'{e:.3f}' for e in errors)}", flush=True)


def print_mean_error(demo: Path, ema: float, films: int = 512) -> None:
    """Error of the regression, and of the mean of 16 members of the others, one step ahead of new films.

    In units of the law's standard deviation. A mean that is off by d raises the CRPS by the share d^2 / 2.
    """
    torus = Torus()
    frames = torus.frames(torch.arange(films), 3, seed=77)
    mean, std = torus.law(frames[:, :2], 1)
    for run, options, members in (("mean", {}, 1), ("residual", FEW, 16), ("plain", PLAIN, 16)):
        generator, count = ImageGenerator.load(demo / run, ema), films if members == 1 else 128
        options = {"num_steps": 16, **options} if members > 1 else {}
        given = frames[:count, :2].repeat_interleave(members, 0).numpy()
        made = generator.images(range(len(given)), conditions=given, **options)
        found = torch.from_numpy(made).reshape(count, members, 16, 16)
        square = (found.mean(1) - mean[:count, 0]).square().mean()
        if members > 1:
            square -= found.var(1).mean() / members
        print(f"{run}: mean off by {math.sqrt(max(float(square), 0)) / float(std[0]):.3f} deviations")


def show(name: str, forecast: Forecast, others: dict[str, Forecast]) -> None:
    """Print the scores by lead time, and the paired difference to the other forecasts."""
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
    for other, second in others.items():
        if other == name:
            break
        difference = (by_film(forecast) - by_film(second)) / law
        error = 1.96 * difference.std(0, ddof=1) / math.sqrt(len(difference))
        told = zip(difference.mean(0), error, strict=True)
        print(f"  minus {other}, %: {', '.join(f'{100 * d:+.1f} +- {100 * e:.1f}' for d, e in told)}")


def by_film(forecast: Forecast) -> np.ndarray:
    """Fair CRPS of each film and lead, `[N, T]`."""
    truth, members = (np.asarray(x, np.float64) for x in (forecast.truth, forecast.members))
    score: np.ndarray = scoringrules.crps_ensemble(truth, members, m_axis=1, estimator="fair")
    means: np.ndarray = score.mean(axis=(2, 3, 4))
    return means


if __name__ == "__main__":
    main()
