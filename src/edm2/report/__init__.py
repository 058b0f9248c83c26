"""Pictures of a run, and the self-contained page that shows them.

matplotlib is imported when the first figure is drawn, and never through pyplot.
"""

from edm2.report.figures import loss_curve, score_curve, uncertainty_curve
from edm2.report.grids import image_grid, png_bytes, save_png
from edm2.report.page import Page
from edm2.report.style import add_legend, figure_png, figure_svg, new_figure

__all__ = [
    "Page",
    "add_legend",
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
