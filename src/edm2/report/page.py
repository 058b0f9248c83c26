"""A report in one HTML file: no script, no request, light and dark, phone and paper."""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image

from edm2.files import write_atomic
from edm2.report.grids import png_bytes
from edm2.report.style import figure_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The browser itself then refuses whatever would leave the file.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CONTENTS_FROM = 4  # sections from which a list of them helps
NUMBER = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?\s*%?|[-–—]?|nan|inf", re.IGNORECASE)


class Page:
    """A page built from top to bottom, then written to one file.

    Texts are plain text: whatever HTML they hold is shown, never obeyed.

    Args:
        title: Name of the page.
        lead: What the page shows, in a sentence or two under the title.

    Raises:
        ValueError: The title is empty.
    """

    def __init__(self, title: str, *, lead: str = "") -> None:
        if not title.strip():
            raise ValueError("the title of a page is empty: browsers show it as the name of the tab")
        self._title = title
        self._lead = lead
        self._blocks: list[str] = []
        self._headings: list[str] = []

    def section(self, heading: str, text: str = "") -> None:
        """Begin a section; it lasts to the next one.

        Args:
            heading: Its name.
            text: Its first paragraphs, as in `text`.
        """
        close = "</section>\n" if self._headings else ""
        self._headings.append(heading)
        name = f"section-{len(self._headings)}"
        self._blocks.append(
            f'{close}<section aria-labelledby="{name}">\n<h2 id="{name}">{_escape(heading)}</h2>'
        )
        if text:
            self.text(text)

    def text(self, text: str) -> None:
        """Add paragraphs.

        Args:
            text: Plain text; an empty line begins a new paragraph.
        """
        self._blocks.append(_paragraphs(text))

    def figure(self, picture: bytes | Figure, caption: str, alt: str) -> None:
        """Add a picture drawn for reading: a matplotlib figure, or a PNG or SVG file.

        Args:
            picture: A figure (embedded as SVG by `figure_svg`) or the bytes of a file.
            caption: Text under it.
            alt: What it shows, for those who cannot see it.

        Raises:
            ValueError: The bytes are neither PNG nor SVG, or there is no alt text.
        """
        data = picture if isinstance(picture, bytes) else figure_svg(picture)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            kind = "png"
        elif b"<svg" in data[:4096]:
            kind = "svg+xml"
        else:
            raise ValueError(f"the picture begins with {data[:8]!r}: give the bytes of a PNG or SVG file")
        self._blocks.append(_figure(data, f"image/{kind}", 'class="plot"', caption, alt))

    def image(self, image: PIL.Image.Image, caption: str, alt: str, *, scale: int = 1) -> None:
        """Add an image made of pixels that shall stay crisp, such as an `image_grid`.

        Args:
            image: The image, embedded as PNG, its pixels repeated `scale` times.
            caption: Text under it.
            alt: What it shows, for those who cannot see it.
            scale: Screen pixels for a pixel of the image, at least 1; fewer where the screen is narrow.

        Raises:
            ValueError: The scale is below 1, or there is no alt text.
        """
        if scale < 1:
            raise ValueError(f"scale is {scale}; it must be at least 1")
        # Enlarged here too: printing and PDF viewers blur small images, whatever the style sheet says.
        large = image.resize((image.width * scale, image.height * scale), PIL.Image.Resampling.NEAREST)
        shape = f'class="pixels" width="{large.width}" height="{large.height}"'
        self._blocks.append(_figure(png_bytes(large), "image/png", shape, caption, alt))

    @contextmanager
    def columns(self) -> Iterator[None]:
        """Put what is added inside the `with` side by side; one below the other where it is narrow."""
        outside, self._blocks = self._blocks, []
        sections = len(self._headings)
        try:
            yield
            if len(self._headings) > sections:
                raise ValueError(f"section {self._headings[-1]!r} begins inside columns: end them first")
            outside.append('<div class="columns">\n' + "\n".join(self._blocks) + "\n</div>")
        finally:
            self._blocks = outside

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str = "") -> None:
        """Add a table; a column of numbers is set flush right.

        Args:
            headers: Names of the columns.
            rows: Cells; floats are written with six significant digits, all else by `str`.
            caption: Text above it.

        Raises:
            ValueError: There are no headers, or a row has more or fewer cells than them.
        """
        if not headers:
            raise ValueError("a table needs at least one header")
        for index, row in enumerate(rows):
            if len(row) != len(headers):
                raise ValueError(f"row {index} has {len(row)} cells for {len(headers)} headers: {row!r}")
        cells = [[_write_out(cell) for cell in row] for row in rows]
        numeric = [bool(cells) and all(map(NUMBER.fullmatch, column)) for column in zip(*cells, strict=True)]
        marks = [' class="number"' if flag else "" for flag in numeric] or [""] * len(headers)
        head = "".join(f'<th scope="col"{m}>{_escape(h)}</th>' for m, h in zip(marks, headers, strict=True))
        body = "\n".join(
            "<tr>" + "".join(f"<td{m}>{_escape(c)}</td>" for m, c in zip(marks, row, strict=True)) + "</tr>"
            for row in cells
        )
        label = _escape(caption or " / ".join(headers))
        title = f"<caption>{_escape(caption)}</caption>" if caption else ""
        # A wide table scrolls in its own box; the focus lets the keyboard scroll it.
        self._blocks.append(
            f'<div class="table" role="region" tabindex="0" aria-label="{label}">\n<table>{title}\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
        )

    def code(self, text: str) -> None:
        """Add lines to copy, such as commands: one click selects them all.

        Args:
            text: The lines.
        """
        self._blocks.append(f"<pre><code>{_escape(text.strip(chr(10)))}</code></pre>")

    def facts(self, facts: Mapping[str, object]) -> None:
        """Add headline numbers, shown large.

        Args:
            facts: Name to value, written as in `table`.

        Raises:
            ValueError: There are none.
        """
        if not facts:
            raise ValueError("there are no facts to show: give at least one")
        pairs = "\n".join(
            f"<div><dt>{_escape(name)}</dt><dd>{_escape(_write_out(value))}</dd></div>"
            for name, value in facts.items()
        )
        self._blocks.append(f'<dl class="facts">\n{pairs}\n</dl>')

    def render(self) -> str:
        """The whole page as HTML."""
        css = resources.files("edm2.report").joinpath("page.css").read_text("utf-8")
        lead = f'<div class="lead">{_paragraphs(self._lead)}</div>\n' if self._lead else ""
        close = "\n</section>" if self._headings else ""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
            f"<title>{_escape(self._title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
            f"<header>\n<h1>{_escape(self._title)}</h1>\n{lead}</header>\n{self._contents()}"
            + "\n".join(self._blocks)
            + f"{close}\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to one file, whole or not at all.

        Args:
            path: The file; missing parent folders are created.

        Returns:
            The path written.
        """
        return write_atomic(path, self.render().encode("utf-8"))

    def _contents(self) -> str:
        if len(self._headings) < CONTENTS_FROM:
            return ""
        items = "".join(
            f'<li><a href="#section-{number}">{_escape(heading)}</a></li>'
            for number, heading in enumerate(self._headings, start=1)
        )
        return f'<nav aria-label="Contents"><ul>{items}</ul></nav>\n'


def _escape(text: str) -> str:
    # File names may hold bytes that are no UTF-8 (surrogates here), which no file could be written with.
    return html.escape(text.encode("utf-8", "backslashreplace").decode("utf-8"), quote=True)


def _write_out(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _paragraphs(text: str) -> str:
    return "\n".join(f"<p>{_escape(part.strip())}</p>" for part in re.split(r"\n\s*\n", text) if part.strip())


def _figure(data: bytes, kind: str, attributes: str, caption: str, alt: str) -> str:
    if not alt.strip():
        raise ValueError("alt is empty: say in words what the picture shows")
    source = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
    # An SVG inside <img> can neither run scripts nor load anything, whoever wrote it.
    picture = f'<img {attributes} alt="{_escape(alt)}" src="{source}">'
    below = f"\n<figcaption>{_escape(caption)}</figcaption>" if caption else ""
    return f"<figure>\n{picture}{below}\n</figure>"
