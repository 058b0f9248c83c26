"""How magnitudes move over training: one curve per resolution, or one per layer.

Ref: EDM2 Fig. 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edm2.report.figures import count_images
from edm2.report.page import Page
from edm2.report.style import LIGHT, SERIES, add_legend, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {
    "activations": ("Activations", "RMS of block outputs"),
    "weights": ("Weights", "RMS of weights"),
    "gradients": ("Gradients", "RMS of gradients"),
    "updates": ("Updates", "relative change per step"),
}
Records = Sequence[Mapping[str, Any]]

_LEVEL = re.compile(r"(?:^|\.)(enc|dec)\.(\d+x\d+)_")
_PART_NAMES = {"enc": "encoder", "dec": "decoder"}
MOST_CURVES = 12
LEAST_SPAN = 2.0  # factor above and below the middle that an axis covers at least


def level_of(name: str) -> str | None:
    """Level of a U-Net that a block or weight belongs to, `encoder 32x32` and so on; None without a resolution."""
    found = _LEVEL.search(name)
    return f"{_PART_NAMES[found[1]]} {found[2]}" if found else None


def by_resolution(values: Mapping[str, float]) -> dict[str, float]:
    """Root mean square over the blocks of each resolution of a U-Net, encoder and decoder apart.

    Args:
        values: Magnitude by name of block or weight.

    Returns:
        Magnitude by `encoder 32x32` and so on, in the order of the network. Names without a resolution are left
        out, unless no name has one: then `values` itself.
    """
    squares: dict[str, list[float]] = {}
    for name, value in values.items():
        if level := level_of(name):
            squares.setdefault(level, []).append(value**2)
    if not squares:
        return dict(values)
    return {name: float(np.sqrt(np.mean(group))) for name, group in squares.items()}


def limits_of(records: Iterable[Mapping[str, float]]) -> tuple[float, float] | None:
    """The lowest and the highest value that a logarithmic axis can show, of one run or several to compare.

    Args:
        records: Magnitudes by name.

    Returns:
        What `magnitude_curve` takes as `limits`; None where no value is above 0 and finite.
    """
    shown = [value for record in records for value in record.values() if 0 < value < np.inf]
    return (min(shown), max(shown)) if shown else None


def magnitude_curve(
    num_images: Sequence[float],
    values: Sequence[Mapping[str, float]],
    *,
    label: str,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Curves of magnitudes against images seen, on a logarithmic axis.

    Encoder levels are drawn solid and decoder levels dashed, one colour per resolution. Where there are more
    names than a reader can tell apart, the median and the range are drawn instead.

    Args:
        num_images: Training images seen, increasing.
        values: Magnitudes by name at each of those moments; the same names every time.
        label: Name of the vertical axis.
        limits: Lowest and highest value that the axis must show; default: those of `values`.

    Returns:
        The figure.
    """
    names = list(values[0])
    table = np.array([[record[name] for name in names] for record in values], dtype=np.float64)
    # Nothing can be drawn at zero or infinity on a logarithmic axis.
    table[~np.isfinite(table) | (table <= 0)] = np.nan
    figure, (ax,) = new_figure()
    limits = limits_of(values) if limits is None else limits
    if limits is not None:
        log_scale(ax, *limits)
    if len(names) > MOST_CURVES:
        seen = np.isfinite(table).any(axis=1)
        low, middle, high = np.full((3, len(table)), np.nan)
        low[seen], middle[seen], high[seen] = np.nanquantile(table[seen], [0.0, 0.5, 1.0], axis=1)
        ax.fill_between(num_images, low, high, color=LIGHT["shade"], linewidth=0.0, label="range")
        ax.plot(num_images, middle, color=SERIES[0], linewidth=1.8, label=f"median of {len(names)} layers")
    else:
        levels = list(dict.fromkeys(name.split()[-1] for name in names))
        for name, curve in zip(names, table.T, strict=True):
            color = SERIES[levels.index(name.split()[-1]) % len(SERIES)]
            dashed = name.startswith("decoder")
            ax.plot(num_images, curve, color=color, linestyle="--" if dashed else "-", label=name)
    count_images(ax)
    ax.set_ylabel(label, parse_math=False)
    add_legend(ax)
    return figure


def log_scale(ax: Axes, low: float, high: float) -> None:
    """A logarithmic axis from `low` to `high`, and further where that is a narrow span."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_yscale("log")
    # Values that do not move should look so, not fill the height with their rounding.
    middle = np.sqrt(low * high)
    ax.set_ylim(min(low / 1.1, middle / LEAST_SPAN), max(high * 1.1, middle * LEAST_SPAN))
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if high < 100 * low else LogLocator())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def add_magnitudes(
    page: Page, runs: Sequence[tuple[str, Records]], *, kinds: Sequence[str] = tuple(KINDS)
) -> None:
    """Add curves of magnitudes by resolution; those of several runs side by side, on comparable axes.

    Args:
        page: Page to add to.
        runs: Name and lines of `magnitudes.jsonl` of each run.
        kinds: Keys of `KINDS`.

    Ref: EDM2 Fig. 3.
    """
    if len(runs) == 1:
        with page.columns():
            for kind in kinds:
                _add_kind(page, runs, kind)
        return
    for kind in kinds if runs else ():
        with page.columns():
            _add_kind(page, runs, kind)


def _add_kind(page: Page, runs: Sequence[tuple[str, Records]], kind: str) -> None:
    title, label = KINDS[kind]
    grouped = [[by_resolution(record[kind]) for record in records] for _, records in runs]
    limits = limits_of(record for values in grouped for record in values)
    for (name, records), values in zip(runs, grouped, strict=True):
        images = [record["num_images"] for record in records]
        figure = magnitude_curve(images, values, label=label, limits=limits)
        whose = f" of {name}" if len(runs) > 1 else ""
        caption = f"{title}{whose}: {label} by resolution, on a logarithmic scale"
        page.figure(figure, caption, f"Curves of {label} by resolution{whose}")
