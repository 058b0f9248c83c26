"""The page in a real browser: light and dark, wide and on a phone."""

import shutil
import subprocess

import numpy as np
import PIL.Image
import pytest

from edm2.report import Page, image_grid, loss_curve
from edm2.report.style import DARK, LIGHT

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt install chromium")
QUIET = (
    "--headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    page = Page("A page with <everything>", lead="To be looked at.")
    page.facts({"a number": 3.25, "another": "12%"})
    page.section("Curves")
    with page.columns():
        page.figure(loss_curve(range(1, 50), np.linspace(1, 0, 49)), "Loss", "A falling line")
        page.image(
            image_grid(np.full((64, 1, 8, 8), 255, np.uint8), columns=8, scale=6), "Grid", "White squares"
        )
    page.section("Table")
    page.table(["a long header that does not fit", *"bcdefgh"], [["word " * 12, *range(7)]])
    page.code("edm2 train --preset digits --out a/rather/long/path/that/has/to/be/scrolled --images 100000")
    return page.write(tmp_path_factory.mktemp("page") / "report.html")


def screenshot(page, width, height, scheme):
    out = page.parent / f"{scheme}{width}.png"
    subprocess.run(
        [
            BROWSER, *QUIET.split(), f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},{height}",
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", f"--screenshot={out}",
            page.as_uri(),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return np.asarray(PIL.Image.open(out).convert("RGB"))


def color(text):
    return [int(text[i : i + 2], 16) for i in (1, 3, 5)]


@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_and_follows_the_readers_colours(page, width, scheme):
    shot = screenshot(page, width, 900, scheme)
    paper = color((DARK if scheme == "dark" else LIGHT)["paper"])
    assert shot[5, 5].tolist() == paper
    # What sticks out of the window would cross its right edge.
    assert (shot[:, -6:] == paper).all()
    assert (shot != paper).any(axis=2).mean() > 0.01
