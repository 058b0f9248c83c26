"""`edm2 forecast`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from edm2.commands.metrics_ensemble import check_scores_file, read_array, report, scores_file
from edm2.commands.sampling import (
    Sampling,
    chosen_cases,
    chosen_path,
    open_guide,
    sampler_options,
    with_saved,
)
from edm2.forecast import Cases, make_forecast, past_frames, read_cases
from edm2.generate import ImageGenerator
from edm2.train.world import join_world


@dataclass(kw_only=True)
class _Forecast(Sampling):
    """Continue films step by step with a model of the next frame, as an ensemble, and write a page that plays it.

    The model was trained with past frames as the condition, the channels of the earliest first, and the next frame as
    the image. Member m of case i depends only on --seed, i and m; under torchrun the processes share the work. Run the
    same command again to continue after an interruption.
    """

    start: Annotated[Path, tyro.conf.arg(aliases=["--from"])]
    """Where to start (under torchrun, which has an option of that name, write --from): .npz, NetCDF or zarr with
    `frames` [N, time, C, H, W], whose later frames are the truth, or with `conditions` as in training, or with `start`
    [N, frames, C, H, W]; optionally `truth` [N, steps, C, H, W], `vectors` [N, steps, V] for a model that is told
    something at each step, and `labels`. Or .npy with frames or conditions."""
    steps: int = 12
    """Frames to forecast."""
    members: int = 16
    """Members of each case."""
    out: Path
    """Forecast to write: .npz, .nc or .zarr. The page, and the scores if the truth is known, are written next to it."""
    truth: Path | None = None
    """.npy file with what followed, [N, steps, C, H, W], missing values NaN. Default: that of --start."""
    cases: str | None = None
    """Which cases: 0-9 or 0,5,7. Default: all."""
    seed: int = 0
    """Seed of the noise."""
    noise: Literal["independent", "common"] = "independent"
    """independent: each case has noise of its own. common: member m has the same noise in all cases, so that cases
    differ by their start alone."""
    page: bool = True
    """Write the page."""


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 forecast`."""
    chosen = tyro.cli(_Forecast, prog=prog, args=list(words))
    check_scores_file(scores_file(chosen.out))
    path = chosen_path(chosen)
    chosen, path = with_saved(chosen, path)
    with join_world(chosen.device) as world:
        common: dict[str, Any] = dict(device=world.device, dtype=chosen.dtype, compile=chosen.compile)
        generator = ImageGenerator.load(path, chosen.ema, num_images=chosen.ema_images, **common)
        made = make_forecast(
            generator,
            _cases(chosen, generator),
            chosen.out,
            steps=chosen.steps,
            members=chosen.members,
            seed=chosen.seed,
            common=chosen.noise == "common",
            guide=open_guide(chosen, path, common, generator),
            batch_size=chosen.batch,
            world=world,
            **sampler_options(chosen),
        )
        if world.is_first:
            report(made, chosen.out, title=f"Forecast by {path.name}", page=chosen.page)


def _cases(chosen: _Forecast, generator: ImageGenerator) -> Cases:
    channels = generator.denoiser.img_shape[0]
    cases = read_cases(chosen.start, frames=past_frames(generator), channels=channels)
    if chosen.truth is not None:
        cases = dataclasses.replace(cases, truth=read_array(chosen.truth))
    if chosen.cases is None:
        return cases
    return cases.take(chosen_cases(chosen.cases, len(cases), chosen.start))
