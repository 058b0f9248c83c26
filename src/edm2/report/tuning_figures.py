"""Figures of searches: score against one knob, and against the EMA length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edm2.report.style import LIGHT, SERIES, add_legend, length_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def knob_figure(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    knob: str,
    label: str,
    reference: float | None = None,
    scatter: float | None = None,
) -> Figure:
    """Score against one knob.

    Args:
        curves: Name of a series to pairs of knob and score, in any order. A nameless series has no legend.
        knob: Name of the horizontal axis.
        label: Name of the vertical axis.
        reference: Score before this knob was moved, drawn as a line.
        scatter: Standard deviation of a score, drawn as a bar at each point.

    Returns:
        The figure.
    """
    figure, (ax,) = new_figure()
    for i, (name, pairs) in enumerate(curves.items()):
        x, y = zip(*sorted(pairs), strict=True)
        ax.errorbar(
            x, y, scatter, fmt="o-", markersize=3.5, elinewidth=0.8, color=SERIES[i % len(SERIES)],
            label=name or None,
        )  # fmt: skip
    if reference is not None:
        ax.axhline(reference, color=LIGHT["muted"], linestyle=(0, (5, 3)), linewidth=1.2, label="before")
    ax.set_xlabel(knob, parse_math=False)
    ax.set_ylabel(label, parse_math=False)
    if any(curves) or reference is not None:
        add_legend(ax)
    return figure


def lengths_figure(curves: Mapping[str, Sequence[Sequence[float]]], *, label: str) -> Figure:
    """Score against EMA length, one curve for each name with a ring at its lowest point.

    Args:
        curves: Name of a curve to its pairs of length and score.
        label: Name of the score.

    Returns:
        The figure, on logarithmic axes where the scores are positive.

    Ref: EDM2 Fig. 5.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (ax,) = new_figure()
    for i, (name, pairs) in enumerate(curves.items()):
        lengths, scores = zip(*pairs, strict=True)
        x, color = [100 * length for length in lengths], SERIES[i % len(SERIES)]
        ax.plot(x, scores, color=color, marker=".", markersize=4, label=name)
        low = scores.index(min(scores))
        ax.plot(x[low], scores[low], "o", color=color, markersize=8, markerfacecolor="none")
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    if all(score > 0 for pairs in curves.values() for _, score in pairs):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    length_axis(ax)
    ax.set_ylabel(label, parse_math=False)
    add_legend(ax)
    return figure
