"""Figure of a search: score against one knob."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edm2.report.style import LIGHT, SERIES, add_legend, new_figure

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
