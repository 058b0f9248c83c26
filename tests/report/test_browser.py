"""Pages in a real browser: light and dark, wide and on a phone."""

import shutil
import subprocess

import numpy as np
import PIL.Image
import pytest

from edm2.report import Page, image_grid, loss_curve
from edm2.report.style import DARK, LIGHT
from edm2.run_page import write_run_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt install chromium"),
]
QUIET = (
    "--headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars --disable-background-networking "
    "--disable-component-update --disable-sync --disable-quic"
)
NARROWEST = 500  # that a window can be


@pytest.fixture(scope="module")
def run_page(tmp_path_factory, digits_run):
    """The report of two tiny runs side by side."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [folder / "a-run-with-a-rather-long-name-without-any-space-in-it", folder / "other"]
    for run in runs:
        shutil.copytree(digits_run, run)
    return write_run_report(runs, folder / "report.html", quiet=True)


@pytest.fixture(scope="module")
def plain_page(tmp_path_factory):
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
    """The page in a window of that width, or in a frame where no window can be so narrow."""
    out, shown = page.parent / f"{scheme}{width}.png", page
    if width < NARROWEST:
        shown = page.parent / "frame.html"
        shown.write_text(
            f"<body style='margin:0'><iframe src='{page.name}' width={width} height={height} style='border:0'>"
        )
    subprocess.run(
        [
            BROWSER, *QUIET.split(), f"--user-data-dir={page.parent / 'profile'}",
            f"--window-size={max(width, NARROWEST)},{height}",
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", f"--screenshot={out}",
            shown.as_uri(),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return np.asarray(PIL.Image.open(out).convert("RGB"))[:, :width]


def color(text):
    return [int(text[i : i + 2], 16) for i in (1, 3, 5)]


@pytest.mark.parametrize("width", [1200, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["plain_page", "run_page"])
def test_page_fits_and_follows_the_readers_colours(name, width, scheme, request):
    shot = screenshot(request.getfixturevalue(name), width, 6000 if name == "run_page" else 900, scheme)
    paper = color((DARK if scheme == "dark" else LIGHT)["paper"])
    assert shot[5, 5].tolist() == paper
    # What sticks out of the window would cross its right edge.
    assert (shot[:, -6:] == paper).all()
    assert (shot != paper).any(axis=2).mean() > 0.01
