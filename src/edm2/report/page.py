"""A report in one HTML file: no script, no request, light and dark, phone and paper."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from edm2.files import write_atomic
from edm2.report.grids import png_bytes
from edm2.report.style import figure_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUMBER = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?\s*%?|[-–—]?|nan|inf", re.IGNORECASE)


class Page:
    """A page built from top to bottom, then written to one file.

    All texts are plain text: HTML in them is shown, never obeyed.

    Args:
        title: Name of the page, also that of the browser's tab.
        lead: What the page shows, in a sentence or two under the title.
    """

    def __init__(self, title: str, *, lead: str = "") -> None:
        assert title.strip(), "a page needs a title"
        self._title, self._lead = title, lead
        self._opening: list[dict[str, Any]] = []  # what comes before the first section
        self._sections: list[dict[str, Any]] = []
        self._blocks = self._opening  # where the next block goes

    def section(self, heading: str, text: str = "") -> None:
        """Begin a section, which lasts to the next one.

        Args:
            heading: Its name.
            text: Its first paragraphs, as in `text`.
        """
        self._blocks = []
        self._sections.append({"heading": heading, "blocks": self._blocks})
        if text:
            self.text(text)

    def text(self, text: str) -> None:
        """Add paragraphs.

        Args:
            text: Plain text; an empty line begins a new paragraph.
        """
        self._add("text", paragraphs=_paragraphs(text))

    def figure(self, picture: bytes | Figure, caption: str, alt: str) -> None:
        """Add a picture drawn for reading: a matplotlib figure, or a PNG or SVG file.

        Args:
            picture: A figure (embedded as SVG by `figure_svg`) or the bytes of a file.
            caption: Text under it.
            alt: What it shows, for readers who cannot see it.
        """
        data = picture if isinstance(picture, bytes) else figure_svg(picture)
        kind = "png" if data.startswith(b"\x89PNG\r\n\x1a\n") else "svg+xml"
        assert kind == "png" or b"<svg" in data[:4096], f"neither PNG nor SVG: {data[:8]!r}"
        self._picture(data, kind, {"class": "plot"}, caption, alt)

    def image(self, image: PIL.Image.Image, caption: str, alt: str, *, scale: int = 1) -> None:
        """Add an image whose pixels stay crisp, such as an `image_grid`.

        Args:
            image: The image, embedded as PNG, its pixels repeated `scale` times.
            caption: Text under it.
            alt: What it shows, for readers who cannot see it.
            scale: Screen pixels per pixel of the image, at least 1; fewer where the screen is narrow.
        """
        # Enlarged here too: printing and PDF viewers blur small images, whatever the style sheet says.
        large = image.resize((image.width * scale, image.height * scale), PIL.Image.Resampling.NEAREST)
        shape = {"class": "pixels", "width": large.width, "height": large.height}
        self._picture(png_bytes(large), "png", shape, caption, alt)

    def film(
        self, pictures: Sequence[PIL.Image.Image], caption: str, alt: str, *, seconds: float = 0.8
    ) -> None:
        """Add pictures of one size that play in turn, for ever; the last one is shown twice as long.

        Readers whose system asks for little motion see the last picture. It plays without a script, as animated PNG.

        Args:
            pictures: At least one.
            caption: Text under it.
            alt: What it shows, for readers who cannot see it.
            seconds: How long each is shown.
        """
        buffer = io.BytesIO()
        times = [round(1000 * seconds)] * (len(pictures) - 1) + [round(2000 * seconds)]
        first, *rest = pictures
        first.save(buffer, format="PNG", save_all=True, append_images=rest, duration=times, loop=0)
        shape = {"class": "pixels", "width": first.width, "height": first.height}
        self._picture(buffer.getvalue(), "png", shape, caption, alt, still=png_bytes(pictures[-1]))

    @contextmanager
    def columns(self) -> Iterator[None]:
        """Put what is added inside the `with` side by side, or one below the other on a narrow screen."""
        outside, inside = self._blocks, list[dict[str, Any]]()
        self._blocks = inside
        yield
        assert self._blocks is inside, "a section begins inside columns"
        self._blocks = outside
        self._add("columns", blocks=inside)

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str = "") -> None:
        """Add a table; columns of numbers are set flush right.

        Args:
            headers: Names of the columns.
            rows: Cells; floats are written with six significant digits, all else by `str`.
            caption: Text above it.
        """
        cells = [[_write_out(cell) for cell in row] for row in rows]
        columns = list(zip(headers, *cells, strict=True))
        marks = [
            {"class": "number"} if cells and all(map(_NUMBER.fullmatch, column)) else {}
            for _, *column in columns
        ]
        self._add("table", headers=headers, rows=cells, marks=marks, caption=caption)

    def code(self, text: str) -> None:
        """Add lines to copy, such as commands; one click selects them all.

        Args:
            text: The lines.
        """
        self._add("code", text=text.strip("\n"))

    def facts(self, facts: Mapping[str, object]) -> None:
        """Add headline numbers, shown large.

        Args:
            facts: Name to value, written as in `table`.
        """
        self._add("facts", facts={name: _write_out(value) for name, value in facts.items()})

    def render(self) -> str:
        """The whole page as HTML."""
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("edm2", "report"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            undefined=jinja2.StrictUndefined,
        )
        page = environment.get_template("page.html").render(
            title=self._title, lead=_paragraphs(self._lead), opening=self._opening, sections=self._sections
        )
        # File names may hold bytes that are not UTF-8, surrogates here, which no file could hold.
        return page.encode("utf-8", "backslashreplace").decode("utf-8")

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to one file, whole or not at all.

        Args:
            path: The file; missing parent folders are created.

        Returns:
            The path written.
        """
        return write_atomic(path, self.render().encode("utf-8"))

    def _add(self, kind: str, **content: object) -> None:
        self._blocks.append({"kind": kind, **content})

    def _picture(
        self,
        data: bytes,
        kind: str,
        attributes: Mapping[str, object],
        caption: str,
        alt: str,
        still: bytes = b"",
    ) -> None:
        assert alt.strip(), "say in words what the picture shows"
        content, calm = (base64.b64encode(part).decode("ascii") for part in (data, still))
        self._add(
            "picture",
            base64=content,
            still=calm,
            format=kind,
            attributes=attributes,
            caption=caption,
            alt=alt,
        )


def _write_out(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
