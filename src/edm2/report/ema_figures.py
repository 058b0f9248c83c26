"""Figures of averages: their profiles over training time, and the errors of plans."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from edm2.ema import Reconstruction
from edm2.ema.maths.targets import PowerProfile, Target
from edm2.ema.storage.manifest import Manifest
from edm2.report.style import FONT_SIZE, HEIGHT, LIGHT, SERIES, add_legend, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PROFILES = len(SERIES)
# Parts of the training time, dense towards the end, where short averages have their weight.
_PARTS = 1 - np.linspace(1, 0, 2000) ** 2


@dataclass(frozen=True, kw_only=True)
class Profiles:
    """A wanted profile and the one made of snapshots.

    Attributes:
        label: What was wanted, in words.
        wanted: Weight per unit of time at each time.
        made: The same for the combination of snapshots.
    """

    label: str
    wanted: ArrayLike
    made: ArrayLike


def profile_figure(times: ArrayLike, profiles: Sequence[Profiles], *, clock: str) -> Figure:
    """Profiles against training time: wanted (wide and pale) and made (thin); below, their difference.

    Each profile is drawn relative to the highest wanted one, so that the unit of time does not matter.

    Args:
        times: Times in the run's clock, increasing.
        profiles: One to seven of them.
        clock: Unit of time.

    Returns:
        The figure.

    Raises:
        ValueError: There are none, or more than a reader can tell apart.

    Ref: EDM2 Sec. 3.2.
    """
    if not 1 <= len(profiles) <= MOST_PROFILES:
        raise ValueError(
            f"{len(profiles)} EMA lengths: a figure shows 1 to {MOST_PROFILES}; give fewer, or draw several figures"
        )
    figure, (top, bottom) = new_figure(rows=(1.0, 0.45), height=HEIGHT * 1.35)
    peak = max(float(np.max(p.wanted)) for p in profiles)
    for profile, colour in zip(profiles, SERIES, strict=False):
        wanted, made = np.asarray(profile.wanted) / peak, np.asarray(profile.made) / peak
        top.plot(times, wanted, color=colour, alpha=0.3, linewidth=5.0, solid_capstyle="butt")
        top.plot(times, made, color=colour, linewidth=1.2, label=profile.label)
        bottom.plot(times, 100 * (made - wanted), color=colour, linewidth=1.0)
    top.set_ylabel("weight (wide: wanted,\nthin: made)")
    bottom.set_ylabel("difference,\n% of peak")
    figure.align_ylabels([top, bottom])
    _label_clock(bottom, clock)
    add_legend(top)
    return figure


def reconstruction_figure(manifest: Manifest, results: Sequence[Reconstruction]) -> Figure:
    """Profiles of reconstructed power functions, as `profile_figure` draws them.

    Args:
        manifest: What the folder of snapshots holds.
        results: One to seven averages made of them, all for the same time.

    Returns:
        The figure.

    Raises:
        ValueError: There are none, or more than a reader can tell apart.
    """
    start = manifest.run.start
    end = results[0].t if results else start
    times = _PARTS * (end - start)
    profiles = []
    for result in results:
        assert result.sigma_rel is not None
        made = np.zeros_like(times)
        for snapshot in manifest.snapshots:
            if snapshot.file in result.coefficients:
                stored = PowerProfile(snapshot.t - start, snapshot.gamma)
                made += result.coefficients[snapshot.file] * stored.density(times)
        wanted = Target.power(result.sigma_rel).at(end - start).density(times)
        profiles.append(Profiles(label=result.label, wanted=wanted, made=made))
    return profile_figure(start + times, profiles, clock=manifest.run.clock)


def tracked_figure(manifest: Manifest, moments: Sequence[float]) -> Figure:
    """Profiles of the tracked averages at some of the stored moments, each relative to its own peak.

    Args:
        manifest: What the folder of snapshots holds.
        moments: Times of the snapshots to draw.

    Returns:
        The figure.

    Ref: EDM2 Sec. 3.1-3.2.
    """
    figure, (ax,) = new_figure()
    start = manifest.run.start
    shown = [s for s in manifest.snapshots if s.t in moments]
    tracks = sorted({s.sigma_rel for s in shown})
    for track, colour in zip(tracks, itertools.cycle(SERIES), strict=False):
        for i, s in enumerate(s for s in shown if s.sigma_rel == track):
            times = _PARTS * (s.t - start)
            weight = PowerProfile(s.t - start, s.gamma).density(times)
            # The fall to zero at the end shows where an average stops.
            x, y = np.append(start + times, s.t), np.append(weight / weight.max(), 0.0)
            ax.plot(x, y, color=colour, linewidth=1.2, label=None if i else f"{100 * track:.3g}%")
    ax.set_ylabel("weight, relative to its peak")
    _label_clock(ax, manifest.run.clock)
    add_legend(ax)
    return figure


def plan_figure(sigma_rels: ArrayLike, errors: Sequence[tuple[str, ArrayLike]]) -> Figure:
    """Error of plans against the wanted EMA length, on a logarithmic axis.

    Args:
        sigma_rels: Wanted lengths, increasing.
        errors: Name of each plan with its relative errors at those lengths; the first is drawn boldest.

    Returns:
        The figure.
    """
    figure, (ax,) = new_figure()
    ax.set_yscale("log")
    for i, ((name, values), colour) in enumerate(zip(errors, SERIES, strict=False)):
        style = "solid" if i == 0 else (0, (4, 1.5 + i))
        ax.plot(
            100 * np.asarray(sigma_rels),
            np.asarray(values),
            color=colour,
            linewidth=1.4 if i else 2.2,
            linestyle=style,
            label=name,
        )
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    ax.set_xlabel("wanted EMA length σ_rel, share of training")
    ax.set_ylabel("relative error of the profile", fontsize=FONT_SIZE)
    add_legend(ax)
    return figure


def _label_clock(ax: Axes, clock: str) -> None:
    from matplotlib.ticker import EngFormatter

    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel(f"training time in {clock}", color=LIGHT["ink"])
