"""Pictures of averages: profiles in training time, wanted and made, and the errors of plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from edm2.report.style import FONT_SIZE, HEIGHT, LIGHT, SERIES, add_legend, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PROFILES = len(SERIES)


@dataclass(frozen=True, kw_only=True)
class Profiles:
    """A wanted profile and the one made of snapshots.

    Attributes:
        label: What was wanted, in words.
        wanted: Weight per unit of time at each time.
        made: The same of the combination of snapshots.
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
        ValueError: None, or more than can be told apart.

    Ref: EDM2 Sec. 3.2.
    """
    if not 1 <= len(profiles) <= MOST_PROFILES:
        raise ValueError(f"{len(profiles)} profiles: a picture shows 1 to {MOST_PROFILES} of them")
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


def plan_figure(sigma_rels: ArrayLike, errors: Sequence[tuple[str, ArrayLike]]) -> Figure:
    """Error of plans against the wanted EMA length, on a logarithmic axis.

    Args:
        sigma_rels: Wanted lengths, increasing.
        errors: Name of each plan with its relative errors at those lengths; the first one is drawn boldest.

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
