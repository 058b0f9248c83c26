"""The curves of a run: training loss, learned uncertainty, and score against EMA length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from edm2.report.style import FAINT, FONT_SIZE, HEIGHT, LIGHT, SERIES, add_legend, length_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Floats = np.ndarray[tuple[int], np.dtype[np.float64]]

# Twice as many points as a wide figure has pixels add nothing but bytes.
MOST_POINTS = 1000
SMOOTHING = 1 / 40  # width of the running mean, as a share of all points
LOG_FROM_RATIO = 8.0  # scores spread wider than this are drawn on a logarithmic axis


def loss_curve(
    num_images: Sequence[float], loss: Sequence[float], *, learning_rate: Sequence[float] | None = None
) -> Figure:
    """Training loss against images seen: every value, and a running mean over a fortieth of them.

    The vertical axis is linear, as the loss falls below zero once the uncertainty is learned. It leaves out
    the extreme one percent of the values where they would squeeze the rest; the figure then says how many.

    Args:
        num_images: Training images seen, increasing.
        loss: Training loss at those moments.
        learning_rate: Learning rate at those moments; drawn on a small axis below.

    Returns:
        The figure.
    """
    seen, values = _floats(num_images), _floats(loss)
    mean = _running_mean(values)
    rows = (1.0,) if learning_rate is None else (1.0, 0.28)
    figure, axes = new_figure(rows=rows, height=HEIGHT if learning_rate is None else HEIGHT * 1.2)
    top = axes[0]
    x, y = _thin(seen, values)
    top.plot(x, y, color=FAINT[0], linewidth=0.9, label="each value logged")
    top.plot(*_thin(seen, mean), color=SERIES[0], linewidth=1.8, label="running mean")
    top.set_ylabel("training loss")
    _limit_to_bulk(top, values, mean)
    add_legend(top)
    if learning_rate is not None:
        axes[1].plot(*_thin(seen, _floats(learning_rate)), color=SERIES[1], linewidth=1.5)
        axes[1].set_ylim(bottom=0.0)
        axes[1].set_ylabel("learning\nrate")
        axes[1].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes[1].locator_params(axis="y", nbins=2)
        figure.align_ylabels(axes)
    count_images(axes[-1])
    return figure


def uncertainty_curve(
    sigma: ArrayLike,
    uncertainty: ArrayLike | None,
    measured: ArrayLike | None = None,
    density: ArrayLike | None = None,
) -> Figure:
    """Learned uncertainty u(sigma) against the noise level, with what it should have learned.

    Args:
        sigma: Noise levels, positive and increasing.
        uncertainty: Learned log variance u at those levels; None where the network learns none.
        measured: Logarithm of the weighted error measured at those levels: where training has converged,
            the minimum of the loss over u.
        density: Density of the training noise over ln(sigma), in any unit; shaded in the background.

    Returns:
        The figure.

    Ref: EDM2 Eq. 21.
    """
    levels = _floats(sigma)
    figure, (ax,) = new_figure()
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if uncertainty is not None:
        ax.plot(levels, _floats(uncertainty), color=SERIES[0], linewidth=1.9, label="learned u(σ)", zorder=3)
    if measured is not None:
        ring: dict[str, Any] = dict(linestyle="none", marker="o", markersize=4.5, markeredgewidth=1.4)
        ring.update(color=SERIES[1], markerfacecolor=LIGHT["paper"], zorder=4)
        ax.plot(levels, _floats(measured), label="measured log error", **ring)
    if density is not None:
        _shade(ax, levels, _floats(density))
    ax.set_xlabel("noise level σ")
    ax.set_ylabel("log variance")
    add_legend(ax)
    return figure


def _shade(ax: Axes, levels: Floats, density: Floats) -> None:
    from matplotlib.transforms import blended_transform_factory

    # Height in parts of the axes: its unit would tell the reader nothing, its place does.
    place = blended_transform_factory(ax.transData, ax.transAxes)
    height = 0.45 * density / density.max()
    shade: dict[str, Any] = dict(color=LIGHT["shade"], linewidth=0.0, zorder=0.5, label="training noise")
    ax.fill_between(levels, 0.0, height, transform=place, **shade)


def score_curve(
    sigma_rel: Sequence[float],
    scores: Sequence[float],
    *,
    best: float,
    tracked: Sequence[float] = (),
    reference: float | None = None,
    label: str = "Frechet distance",
) -> Figure:
    """Score against EMA length, lower being better.

    The vertical axis is logarithmic where the scores are positive and spread over more than a factor of 8.

    Args:
        sigma_rel: Relative EMA lengths, increasing; written in percent as in the paper.
        scores: Score of each.
        best: The length to mark, one of `sigma_rel`.
        tracked: Lengths that were tracked during training; marked on the horizontal axis.
        reference: Score that real images reach, drawn as a line.
        label: Name of the score, any text.

    Returns:
        The figure.

    Ref: EDM2 Sec. 3.3.
    """
    lengths, values = _floats(sigma_rel), _floats(scores)
    figure, (ax,) = new_figure()
    drawn = values if reference is None else np.append(values, reference)
    if drawn.min() > 0 and drawn.max() > LOG_FROM_RATIO * drawn.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.plot(100 * lengths, values, color=SERIES[0], linewidth=1.7, marker="o", markersize=3.2, zorder=3)
    where = int(np.argmin(abs(lengths - best)))
    x, y = 100 * lengths[where], values[where]
    ring: dict[str, Any] = dict(linestyle="none", marker="o", markersize=10, markeredgewidth=1.7)
    ring.update(color=SERIES[1], markerfacecolor="none", zorder=4, label=f"best: {y:.3g} at {x:.3g}%")
    ax.plot([x], [y], **ring)
    if reference is not None:
        name = f"real images: {reference:.3g}"
        ax.axhline(reference, color=SERIES[2], linestyle=(0, (5, 3)), linewidth=1.4, label=name, zorder=2)
    if len(tracked):
        places, bottom = 100 * _floats(tracked), ax.get_xaxis_transform()
        mark: dict[str, Any] = dict(
            linestyle="none", marker="^", markersize=7, color=LIGHT["muted"], zorder=5
        )
        ax.plot(places, np.full_like(places, 0.03), transform=bottom, label="tracked", **mark)
    length_axis(ax)
    ax.set_ylabel(label, parse_math=False)
    add_legend(ax)
    return figure


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, np.float64).reshape(-1)


def _running_mean(values: Floats) -> Floats:
    """Mean over a centred window, cut at both ends to what exists."""
    half = max(1, round(len(values) * SMOOTHING / 2))
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    start, stop = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    mean: Floats = (total[stop] - total[start]) / (stop - start)
    return mean


def _thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Keep the lowest and the highest point of each of many bins: the drawn outline stays the same."""
    if len(x) <= MOST_POINTS:
        return x, y
    bins = np.array_split(np.arange(len(x)), MOST_POINTS // 2)
    keep = np.unique([b[pick(y[b])] for b in bins for pick in (np.argmin, np.argmax)])
    keep = np.unique(np.concatenate([[0], keep, [len(x) - 1]]))
    return x[keep], y[keep]


def _limit_to_bulk(ax: Axes, values: Floats, mean: Floats) -> None:
    low, high = np.quantile(values, [0.005, 0.995])
    low, high = min(low, mean.min()), max(high, mean.max())
    margin = 0.06 * (high - low)
    outside = int(np.sum((values < low - margin) | (values > high + margin)))
    if not outside or values.max() - values.min() < 1.5 * (high - low):
        return
    ax.set_ylim(low - margin, high + margin)
    note = f"{outside} of {len(values)} values outside"
    corner: dict[str, Any] = dict(transform=ax.transAxes, ha="right", va="top")
    ax.text(0.99, 0.97, note, color=LIGHT["muted"], fontsize=FONT_SIZE - 1.5, **corner)


def count_images(ax: Axes) -> None:
    """Label a horizontal axis of images seen: 20k, 3M. Curves of one record, which no line would show, get a dot."""
    from matplotlib.ticker import EngFormatter

    for line in (line for each in ax.figure.axes for line in each.lines):
        if np.size(line.get_xdata()) == 1:
            line.set_marker("o")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel("training images")
