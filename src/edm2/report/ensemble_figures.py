"""Figures of ensembles: scores by lead time, rank histogram, reliability, spectra; and fields in colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from edm2.report.style import FONT_SIZE, LIGHT, SERIES, add_legend, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from edm2.metrics.ensemble import EnsembleScores, Estimate

# Legible on light and on dark pages.
_INK = (125, 135, 146, 255)
_LEAST_POWER = 1e-6  # of the truth's largest; less cannot be seen in a field
_FEWEST = 0.002  # share of the pixels below which a probability's frequency is chance
_HEAD = 18  # pixels for the titles of a row of fields


def crps_figure(scores: EnsembleScores, channel: int, lines: Mapping[str, Sequence[float]]) -> Figure:
    """CRPS of ensemble and baselines by lead time, with 95% intervals.

    Args:
        scores: What to draw.
        channel: Channel to draw.
        lines: Further curves: name -> value of each lead, such as that of an exact law.
    """
    figure, (ax,) = new_figure()
    own = scores.crps_fair if scores.num_members > 1 else scores.crps
    _band(ax, own, channel, SERIES[0], "ensemble")
    for i, (name, base) in enumerate(scores.baselines.items(), 1):
        _band(ax, base.crps, channel, SERIES[i], name)
    leads = np.arange(1, len(own.value) + 1)
    for i, (name, values) in enumerate(lines.items()):
        ax.plot(leads, values, color=SERIES[-1 - i], linestyle=(0, (4, 2)), label=name, zorder=4)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("fair CRPS" if scores.num_members > 1 else "CRPS")
    return _by_lead(figure, ax)


def spread_figure(scores: EnsembleScores, channel: int) -> Figure:
    """Spread over skill by lead time: 1 is honest, below 1 too sure."""
    figure, (ax,) = new_figure()
    ax.axhline(1, color=LIGHT["muted"], linestyle=(0, (5, 3)), linewidth=1.2, label="honest")
    _band(ax, scores.spread_skill, channel, SERIES[0], "ensemble")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.8), max(high, 1.2))
    ax.set_ylabel("spread / skill")
    return _by_lead(figure, ax)


def ranks_figure(scores: EnsembleScores, channel: int, leads: Sequence[int]) -> Figure:
    """Where the truth lies among the members, at some lead times; flat is honest."""
    figure, (ax,) = new_figure()
    for i, lead in enumerate(leads):
        counts = scores.ranks[lead, channel]
        p = scores.ranks_p[lead, channel]
        share = counts / max(counts.sum(), 1) * len(counts)
        ax.step(
            np.arange(len(counts)), share, where="mid", color=SERIES[i],
            label=f"step {lead + 1}" + (f", p = {p:.2f}" if np.isfinite(p) else ""),
        )  # fmt: skip
    ax.axhline(1, color=LIGHT["muted"], linestyle=(0, (5, 3)), linewidth=1.2)
    ax.set_ylim(0, max(2.0, ax.get_ylim()[1]))
    ax.set_xlabel("members below the truth")
    ax.set_ylabel("frequency / expected")
    add_legend(ax)
    return figure


def reliability_figure(scores: EnsembleScores, channel: int, lead: int) -> Figure:
    """How often thresholds were exceeded, against how often the ensemble said so; the diagonal is honest."""
    figure, (ax,) = new_figure()
    ax.plot([0, 1], [0, 1], color=LIGHT["muted"], linestyle=(0, (5, 3)), linewidth=1.2)
    for i, found in enumerate(scores.reliability):
        counts = found.count[lead, channel]
        known = counts >= max(1, _FEWEST * counts.sum())
        threshold = f"above {found.threshold[channel]:.3g}"
        ax.plot(
            found.forecast[lead, channel][known], found.observed[lead, channel][known], "o-", markersize=3.5,
            color=SERIES[i % len(SERIES)], label=threshold,
        )  # fmt: skip
    ax.set_xlabel("forecast probability")
    ax.set_ylabel("observed frequency")
    add_legend(ax)
    return figure


def spectrum_figure(scores: EnsembleScores, channel: int, lead: int) -> Figure:
    """Power by wave number of members, their mean and the truth."""
    found = scores.spectrum
    assert found is not None
    figure, (ax,) = new_figure()
    ax.set_yscale("log")
    for i, (name, power) in enumerate(
        {"truth": found.truth, "members": found.members, "ensemble mean": found.mean}.items()
    ):
        line: dict[str, Any] = dict(linestyle=(0, (4, 2))) if name == "truth" else {}
        ax.plot(found.wave, power[lead, channel], color=SERIES[(2, 0, 1)[i]], label=name, **line)
    if (most := float(found.truth[lead, channel].max())) > 0:
        ax.set_ylim(bottom=most * _LEAST_POWER)
    ax.set_xlabel("waves across the field")
    ax.set_ylabel("power")
    add_legend(ax)
    return figure


def _band(ax: Axes, found: Estimate, channel: int, color: str, name: str) -> None:
    leads = np.arange(1, len(found.value) + 1)
    ax.plot(leads, found.value[:, channel], "o-", markersize=3.5, color=color, label=name, zorder=3)
    ax.fill_between(
        leads, found.low[:, channel], found.high[:, channel], color=color, alpha=0.18, linewidth=0
    )


def _by_lead(figure: Figure, ax: Axes) -> Figure:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("steps ahead")
    add_legend(ax)
    return figure


def field_picture(field: np.ndarray, low: float, high: float, *, colours: str, scale: int) -> PIL.Image.Image:
    """One field in colours, its missing values transparent.

    Args:
        field: `[H, W]`.
        low: Value of the first colour.
        high: Value of the last colour.
        colours: Name of a colour map of matplotlib.
        scale: Width of a pixel of the field in the picture.
    """
    import matplotlib

    shown = np.clip((field - low) / max(high - low, 1e-30), 0, 1)
    pixels = np.asarray(matplotlib.colormaps[colours](np.nan_to_num(shown), bytes=True))
    pixels[np.isnan(field)] = 0
    return PIL.Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1), "RGBA")


def field_table(
    rows: Sequence[Sequence[PIL.Image.Image | None]],
    titles: Sequence[str],
    *,
    names: Sequence[str] = (),
    gap: int = 4,
) -> PIL.Image.Image:
    """Fields in rows and columns, with a title over each column and a name before each row.

    Args:
        rows: Pictures of one size; None leaves a place empty.
        titles: One for each column.
        names: One for each row, or none.
        gap: Pixels between pictures.

    Returns:
        A picture with a transparent ground, for light and dark pages.
    """
    width, height = next((picture.size for row in rows for picture in row if picture is not None), (1, 1))
    font = PIL.ImageFont.load_default(FONT_SIZE + 3)
    left = round(max(map(font.getlength, names))) + 10 if names else 0
    size = (left + len(titles) * (width + gap) - gap, _HEAD + len(rows) * (height + gap) - gap)
    table = PIL.Image.new("RGBA", size)
    draw = PIL.ImageDraw.Draw(table)
    for c, title in enumerate(titles):
        draw.text((left + c * (width + gap) + width / 2, _HEAD / 2), title, _INK, font, anchor="mm")
    for r, row in enumerate(rows):
        top = _HEAD + r * (height + gap)
        if names:
            draw.text((left - 8, top + height / 2), names[r], _INK, font, anchor="rm")
        for c, picture in enumerate(row):
            if picture is not None:
                table.paste(picture, (left + c * (width + gap), top))
    return table
