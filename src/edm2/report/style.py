"""One look for all pictures, on light and dark pages, and their encoding to deterministic bytes.

Every picture is drawn once, in the light colours below. `figure_svg` adds a style sheet to the SVG that
swaps each of them for its dark partner where the reader's system asks for dark. The background belongs to the
picture, so a viewer that ignores the style sheet still shows dark lines on a light ground.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from edm2.extras import needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT = {"paper": "#fcfcfb", "ink": "#24292f", "muted": "#5b646e", "rule": "#d8dce1", "shade": "#e9ecf1"}
DARK = {"paper": "#15181c", "ink": "#e3e7eb", "muted": "#9ba5af", "rule": "#363c44", "shade": "#252b33"}

# Series of a plot in order; the lists run in parallel.
SERIES = ("#1f5fbf", "#c2571a", "#2b8a57", "#7a4fb5", "#b3305c", "#157f8c", "#8a6d1c")
SERIES_DARK = ("#7fb0ff", "#ff9d5c", "#6fcf97", "#b899f0", "#f285aa", "#5cc8d6", "#d9b95c")
FAINT = ("#bccde9", "#efcdb8", "#bfdccb")
FAINT_DARK = ("#2f4a73", "#6b4429", "#2d5740")

# Small on purpose: scaled to a phone's width the text stays near ten pixels.
WIDTH, HEIGHT = 5.0, 3.0
FONT_SIZE = 10.0
LEGEND_LETTERS = 58  # what fits in one line, each line or mark taking the room of four


def new_figure(*, rows: tuple[float, ...] = (1.0,), height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
    """A figure in the house style, with no part in matplotlib's global state.

    Args:
        rows: Relative heights of the axes, from top to bottom; they share one horizontal axis.
        height: Height of the whole figure in inches; its width is the same for all figures.

    Returns:
        The figure and its axes.
    """
    with needed("a figure"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=LIGHT["paper"])
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=rows)
    axes = list(grid[:, 0])
    for ax in axes:
        _dress(ax)
    return figure, axes


def _dress(ax: Axes) -> None:
    ax.set_facecolor(LIGHT["paper"])
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(LIGHT["rule"])
    ax.grid(visible=True, color=LIGHT["rule"], linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", length=0, labelsize=FONT_SIZE - 0.5, labelcolor=LIGHT["muted"])
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set_color(LIGHT["ink"])
        axis.label.set_fontsize(FONT_SIZE)


def add_legend(ax: Axes) -> None:
    """Name the series above the axes, where that can hide no data, in one line or two columns.

    Args:
        ax: Axes whose artists carry labels.
    """
    names = ax.get_legend_handles_labels()[1]
    legend = ax.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=len(names) if sum(len(name) + 4 for name in names) <= LEGEND_LETTERS else 2,
        frameon=False,
        borderaxespad=0.2,
        borderpad=0.2,
        handlelength=1.4,
        columnspacing=1.3,
        fontsize=FONT_SIZE - 0.5,
        labelcolor=LIGHT["ink"],
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def length_axis(ax: Axes) -> None:
    """Label a horizontal axis of relative EMA lengths in percent, written as in the paper.

    Args:
        ax: Axes whose horizontal values are percentages.
    """
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    ax.set_xlabel("EMA length σ_rel, share of training")


def figure_png(figure: Figure, *, dpi: int = 160) -> bytes:
    """Encode a figure as PNG in its light colours; the same figure gives the same bytes.

    Args:
        figure: Any matplotlib figure.
        dpi: Pixels per inch.

    Returns:
        The bytes of the PNG file.
    """
    buffer = io.BytesIO()
    # The Software entry would put matplotlib's version, thus the machine, into the file.
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def figure_svg(figure: Figure) -> bytes:
    """Encode a figure as SVG that turns dark with the reader's system; same figure, same bytes.

    A figure that does not come from `new_figure` keeps its own colours and background.

    Args:
        figure: Any matplotlib figure.

    Returns:
        The bytes of the SVG file, without date, version or external reference to load.
    """
    from matplotlib import colors, rc_context

    buffer = io.BytesIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    # Text stays text: half the size of outlines, and the reader's own screen font.
    with rc_context({"svg.hashsalt": "edm2", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    if colors.to_hex(figure.get_facecolor()) != LIGHT["paper"]:
        return svg
    at = svg.index(b">", svg.index(b"<svg")) + 1
    return svg[:at] + f"\n <style>{_svg_style()}</style>".encode() + svg[at:]


def _svg_style() -> str:
    """Select elements by the light colour written in them, so that the SVG is complete without this."""
    light = (*LIGHT.values(), *SERIES, *FAINT)
    dark = (*(DARK[role] for role in LIGHT), *SERIES_DARK, *FAINT_DARK)
    rules = "".join(
        f'[style*="{kind}: {old}"]{{{kind}:{new}!important}}'
        for old, new in zip(light, dark, strict=True)
        for kind in ("fill", "stroke")
    )
    fonts = "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans',sans-serif!important}"
    return f"{fonts}@media (prefers-color-scheme:dark){{{rules}}}"
