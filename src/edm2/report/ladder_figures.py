"""Figures of the ladder: distance by configuration, distance by EMA length, and growth of magnitudes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edm2.report.figures import count_images
from edm2.report.magnitudes import log_scale
from edm2.report.style import LIGHT, SERIES, add_legend, length_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ABOVE = 4.0  # times the largest median, for a run to be drawn


def ladder_figure(values: Mapping[str, Sequence[float]], published: Mapping[str, float]) -> Figure:
    """Distance of every run by configuration, above the published ones.

    Args:
        values: Configuration to one value per seed, at least one of them finite. Values far above the others, or
            not finite, are named at the top edge.
        published: Configuration to published value, drawn below on an axis of its own.

    Returns:
        The figure.
    """
    letters = list(values)
    finite = {c: [v for v in runs if math.isfinite(v)] for c, runs in values.items()}
    # One run gone wrong must not press the others into a line.
    top = _MOST_ABOVE * max(float(np.median(runs)) for runs in finite.values() if runs)
    figure, (ours, paper) = new_figure(rows=(1.6, 1.0), height=4.2)
    shown = [v for runs in finite.values() for v in runs if v <= top]
    log_scale(ours, min(shown), max(shown))
    log_scale(paper, min(published.values()), max(published.values()))
    for i, letter in enumerate(letters):
        runs = [v for v in finite[letter] if v <= top]
        ours.plot([i] * len(runs), runs, "o", color=SERIES[0], markersize=4.5, alpha=0.7)
        if runs:
            middle = float(np.median(finite[letter]))
            ours.plot([i - 0.22, i + 0.22], [middle] * 2, color=SERIES[1], linewidth=1.8)
        far = [f"{v:.3g}" for v in finite[letter] if v > top]
        diverged = len(values[letter]) - len(finite[letter])
        notes = [f"also {', '.join(far)}"] * bool(far) + [f"{diverged} diverged"] * bool(diverged)
        if notes:
            _note(ours, i, "\n".join(notes))
    known = [(i, published[letter]) for i, letter in enumerate(letters) if letter in published]
    paper.plot(*zip(*known, strict=True), "s-", color=SERIES[2], markersize=4.5)
    paper.set_xticks(range(len(letters)), letters)
    paper.set_xlabel("configuration")
    ours.set_ylabel("Frechet distance")
    paper.set_ylabel("paper, FID")
    # Named once, whichever configurations came out finite.
    ours.plot([], [], "o", color=SERIES[0], markersize=4.5, alpha=0.7, label="a run")
    ours.plot([], [], color=SERIES[1], linewidth=1.8, label="median")
    add_legend(ours)
    return figure


def length_curves(sigma_rels: Sequence[float], scores: Mapping[str, Sequence[float]]) -> Figure:
    """Distance against EMA length, one curve per configuration.

    Args:
        sigma_rels: Relative EMA lengths.
        scores: Configuration to finite scores, one at each length.

    Returns:
        The figure.
    """
    figure, (ax,) = new_figure()
    ax.set_yscale("log")
    order = np.argsort(sigma_rels)
    for i, (letter, curve) in enumerate(scores.items()):
        x, y = 100 * np.asarray(sigma_rels)[order], np.asarray(curve)[order]
        ax.plot(x, y, "o-", markersize=3, color=SERIES[i % len(SERIES)], label=letter)
    length_axis(ax)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    ax.set_ylabel("Frechet distance")
    add_legend(ax)
    return figure


def growth_figure(curves: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]) -> Figure:
    """How activations and weights of each configuration grow in training, on logarithmic axes.

    Args:
        curves: Configuration to images seen, activations and weights, both relative to their start.

    Returns:
        The figure.

    Ref: EDM2 Fig. 3, one curve per configuration.
    """
    figure, axes = new_figure(rows=(1.0, 1.0), height=4.2)
    for i, (letter, (images, *both)) in enumerate(curves.items()):
        for ax, values in zip(axes, both, strict=True):
            ax.plot(images, values, color=SERIES[i % len(SERIES)], linewidth=1.5, label=letter)
    for k, (ax, name) in enumerate(zip(axes, ("activations", "weights"), strict=True), start=1):
        shown = [value for curve in curves.values() for value in curve[k] if 0 < value < math.inf]
        log_scale(ax, min(shown, default=1.0), max(shown, default=1.0))
        ax.set_ylabel(f"{name}, relative")
    add_legend(axes[0])
    count_images(axes[-1])
    return figure


def _note(ax: Axes, x: float, text: str) -> None:
    place = ax.get_xaxis_transform()
    ax.text(x, 0.97, text, transform=place, ha="center", va="top", color=LIGHT["muted"], fontsize=8)
