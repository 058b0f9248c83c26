"""Images and figures as HTML with their bytes inside, so that the page's server has no files to serve."""

import base64
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edm2.report import figure_png, image_grid
from edm2.report.grids import png_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMALL = 64  # pixels; smaller images are enlarged without smoothing


def tiles(images: np.ndarray, captions: Sequence[str], *, kind: str = "images") -> str:
    """Images `[N, C, H, W]` uint8 as a grid that fits any width, each one pixel for pixel.

    Args:
        images: The images.
        captions: A text for each, told by screen readers and when the mouse rests on it.
        kind: Classes of the grid; those of "path" show their captions.
    """
    crisp = " crisp" if images.shape[-1] <= _SMALL else ""
    cells = []
    for image, caption in zip(images, captions, strict=True):
        text = html.escape(caption)
        picture = _image(png_bytes(image_grid(image[None], columns=1)), text)
        label = f"<figcaption>{text}</figcaption>" if "path" in kind else ""
        cells.append(f"<figure>{picture}{label}</figure>")
    return f'<div class="tiles {kind}{crisp}">{"".join(cells)}</div>'


def figures(drawn: Sequence[tuple[str, "Figure"]]) -> str:
    """Figures under each other or side by side, with captions."""
    cells = [
        f"<figure>{_image(figure_png(figure), html.escape(text))}<figcaption>{html.escape(text)}</figcaption></figure>"
        for text, figure in drawn
    ]
    return f'<div class="curves">{"".join(cells)}</div>'


def problem(error: BaseException) -> str:
    """An error's message, where the pictures would be."""
    return f'<p class="problem" role="alert">{html.escape(str(error))}</p>'


def _image(png: bytes, alt: str) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{alt}" title="{alt}">'


STYLE = """
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 4px; max-width: 420px; }
.tiles.path { grid-template-columns: repeat(auto-fill, minmax(64px, 1fr)); max-width: none; }
.tiles.given { display: inline-block; width: 96px; margin-right: 6px; vertical-align: top; }
.tiles figure, .curves figure { margin: 0; }
.tiles img { width: 100%; display: block; }
.tiles.crisp img { image-rendering: pixelated; }
.tiles figcaption, .curves figcaption { font-size: 0.8em; opacity: 0.8; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 12px; }
.curves img { width: 100%; background: #fcfcfb; border-radius: 6px; }
.problem { border-left: 4px solid #c0392b; padding: 0.5em 0.8em; }
"""
