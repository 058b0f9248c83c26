"""`edm2 metrics ensemble`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from edm2.data.npy import open_array
from edm2.files import read_json, write_json
from edm2.forecast import Forecast, read_forecast
from edm2.forecast.page import write_forecast_page
from edm2.metrics.ensemble import EnsembleScores, score_ensemble
from edm2.progress import Progress, show

_FORMAT = "edm2 ensemble scores 1"


@dataclass(kw_only=True)
class _Ensemble:
    """Score a forecast's ensemble by lead time and channel: CRPS, spread and skill, ranks, reliability, spectra.

    Intervals (95%) come from resampling the cases. Missing values, NaN, are left out.
    """

    forecast: Annotated[Path, tyro.conf.Positional]
    """Forecast of `edm2 forecast` or `edm2 sample --members`: .npz, .nc or .zarr with `members` [case, member, lead,
    channel, y, x], and possibly `truth` and `start`."""
    truth: Path | None = None
    """.npy file with the truth, [case, lead, channel, y, x]. Default: the forecast's own."""
    climate: Path | None = None
    """.npy file of fields of other times, [N, channel, y, x], as the reference "climatology". Default: the truth of
    the other cases."""
    thresholds: tuple[float, ...] = ()
    """Values whose exceedance is judged, in the data's units."""
    quantiles: tuple[float, ...] = (0.5, 0.9)
    """Further thresholds, as quantiles of each channel's truth."""
    resamples: int = 1000
    """Number of times the cases are resampled for the intervals."""
    seed: int = 0
    """Seed of these draws, and of ranks between equal values."""
    out: Path | None = None
    """JSON file for all numbers. Default: next to the forecast."""


def ensemble(prog: str, words: Sequence[str]) -> None:
    """`edm2 metrics ensemble`."""
    chosen = tyro.cli(_Ensemble, prog=prog, args=list(words))
    out = chosen.out or scores_file(chosen.forecast)
    check_scores_file(out)
    if chosen.resamples < 1:
        raise ValueError(f"--resamples {chosen.resamples} must be at least 1")
    found = read_forecast(chosen.forecast)
    truth = found.truth if chosen.truth is None else read_array(chosen.truth)
    if truth is None:
        raise ValueError(f"{chosen.forecast} holds no truth to score against: give it with --truth")
    climate = True if chosen.climate is None else read_array(chosen.climate)
    with Progress("scoring", len(truth), "cases") as progress:
        scores = score_ensemble(
            *_known(found.members, truth),
            start=found.persistence,
            climate=climate,
            thresholds=chosen.thresholds,
            quantiles=chosen.quantiles,
            resamples=chosen.resamples,
            seed=chosen.seed,
            on_case=progress.advance,
        )
    given = {name: getattr(chosen, name) for name in ("thresholds", "quantiles", "resamples", "seed")}
    files = {name: str(getattr(chosen, name)) for name in ("forecast", "truth", "climate")}
    write_scores(out, scores, found, settings=given, files=files)
    for line in score_lines(scores):
        show(line)
    show(f"written to {out}")


def _known(members: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both without the last leads whose truth is not known at all; other shapes as they are, to be refused."""
    if truth.ndim != 5 or members.ndim != 6:
        return members, truth
    known = np.flatnonzero(~np.isnan(truth).all(axis=(0, 2, 3, 4)))
    leads = known[-1] + 1 if len(known) and members.shape[2] == truth.shape[1] else None
    return members[:, :, :leads], truth[:, :leads]


def score_lines(scores: EnsembleScores) -> list[str]:
    """The main numbers as a table: one line for each lead, and channel where there are several."""
    leads, channels = scores.crps.value.shape
    fair = scores.num_members > 1
    crps = scores.crps_fair if fair else scores.crps
    names = list(scores.baselines)
    head = f"{scores.num_cases} cases, {scores.num_members} members"
    titles = [f"{name} CRPS" for name in names] + [f"below {name}" for name in names]
    lines = [
        head,
        " ".join(
            [
                f"{'lead' if channels == 1 else 'lead/channel':>12}",
                f"{'fair CRPS' if fair else 'CRPS':>10}",
                f"{'(95%)':>21}",
                f"{'RMSE':>9}",
                f"{'spread/skill':>12}",
                f"{'flat ranks p':>12}",
                *(f"{title:>18}" for title in titles),
            ]
        ),
    ]
    for t, c in np.ndindex(leads, channels):
        at = (t, c)
        name = str(t + 1) if channels == 1 else f"{t + 1}/{c}"
        bases = [scores.baselines[n] for n in names]
        cells = [f"{_text(base.crps.value[at]):>18}" for base in bases]
        cells += [f"{100 * base.skill.value[at]:>17.1f}%" for base in bases]
        lines.append(
            " ".join(
                [
                    f"{name:>12}",
                    f"{_text(crps.value[at]):>10}",
                    f"({_text(crps.low[at])} to {_text(crps.high[at])})".rjust(21),
                    f"{_text(scores.rmse.value[at]):>9}",
                    f"{scores.spread_skill.value[at]:>12.3f}",
                    f"{scores.ranks_p[at]:>12.3f}",
                    *cells,
                ]
            )
        )
    return lines


def _text(value: float) -> str:
    return f"{value:.4g}"


def report(made: Forecast, out: Path, *, title: str, page: bool = True) -> None:
    """Show and write the scores of a forecast whose truth is known, and write its page.

    Args:
        made: The forecast.
        out: Its file; scores and page are written next to it.
        title: Title of the page.
        page: Whether to write the page.
    """
    cases, members, steps = made.members.shape[:3]
    scores: EnsembleScores | None = None
    if made.truth is not None and not np.isnan(made.truth).all():
        with Progress("scoring", cases, "cases") as progress:
            scores = score_ensemble(
                *_known(made.members, made.truth), start=made.persistence, on_case=progress.advance
            )
        write_scores(scores_file(out), scores, made)
        for line in score_lines(scores):
            show(line)
        if (known := len(scores.crps.value)) < steps:
            show(f"the truth is known up to step {known} of {steps}")
    show(out)
    if page:
        settings = [(n, v) for n, v in made.settings.items() if v is not None and not isinstance(v, dict)]
        written = write_forecast_page(
            made,
            out.with_name(f"{out.name}.html"),
            scores=scores,
            title=title,
            lead=f"{cases} cases, {members} members, {steps} {'steps' if steps > 1 else 'step'}.",
            settings=settings,
        )
        show(f"page: {written}")


def scores_file(forecast: Path) -> Path:
    """Where the scores of a forecast are written."""
    return forecast.with_name(f"{forecast.name}.scores.json")


def write_scores(out: Path, scores: EnsembleScores, forecast: Forecast, **facts: Any) -> None:
    """Write all numbers, with the settings of the forecast."""
    write_json(
        out, {"format": _FORMAT, "made_by": dict(forecast.settings), **facts, "scores": scores.to_json()}
    )


def check_scores_file(out: Path) -> None:
    """Raise ValueError if a file exists that does not hold scores of an ensemble."""
    if not out.exists():
        return
    try:
        content = read_json(out)
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{out} exists and does not hold scores of an ensemble: choose another --out")


def read_array(path: Path) -> np.ndarray:
    """Read a .npy file of numbers.

    Raises:
        ValueError: If it cannot be read, or holds something else.
    """
    try:
        array = open_array(path)
        if not np.issubdtype(array.dtype, np.number):
            raise ValueError("it holds no numbers")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a .npy file of numbers ({error})") from error
    return array
