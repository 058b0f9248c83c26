"""The drawing kit: figures, grids of images, and the self-contained page that shows them.

Modules:
    page: `Page`, one HTML file that opens offline.
    style: The look of all figures, and their encoding to PNG and SVG.
    figures: Loss, uncertainty and score against EMA length.
    ema_figures, tuning_figures, ladder_figures, magnitudes: Figures of one subject each.
    grids: Images on a grid, and PNG files.

matplotlib is imported when the first figure is drawn, and never through pyplot.
"""

from edm2.report.figures import loss_curve, score_curve, uncertainty_curve
from edm2.report.grids import case_grid, class_grid, image_grid, png_bytes, save_png
from edm2.report.page import Page
from edm2.report.style import add_legend, figure_png, figure_svg, new_figure

__all__ = [
    "Page",
    "add_legend",
    "case_grid",
    "class_grid",
    "figure_png",
    "figure_svg",
    "image_grid",
    "loss_curve",
    "new_figure",
    "png_bytes",
    "save_png",
    "score_curve",
    "uncertainty_curve",
]
