"""How long the studio takes from a moved slider to new pictures, in a real browser; and a recording of it.

    python benchmarks/studio.py runs/demo/run --out studio.webp

Needs `pip install playwright`, and chromium on the path. The clock runs from the key press to the moment when the
browser shows the new pictures, so it includes the server, the reconstruction of an average that nobody asked for
before, the sampler (16 steps of DPM-Solver++, 16 images), and the encoding of pictures.
"""

import argparse
import io
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from common import machine
from playwright.sync_api import sync_playwright

from edm2.studio.page import build, serve
from edm2.studio.workbench import Workbench

NEW_PICTURES = """([where, old]) => {
  const now = [...document.querySelectorAll(where + ' img')].map(image => image.src)
  return now.length > 0 && JSON.stringify(now) !== JSON.stringify(old)
}"""
WIDTH, HEIGHT, SHOWN = 1200, 1000, 760  # of the window, and the recording's width


class Visitor:
    """Moves controls, waits for pictures, and keeps what it sees."""

    def __init__(self, page: Any) -> None:
        self.page, self.frames, self.seconds = page, [], []

    def pictures(self, where: str = "#images-A") -> list[str]:
        return self.page.eval_on_selector_all(f"{where} img", "found => found.map(image => image.src)")

    def change(self, act: Any, *, hold: int = 350) -> None:
        """Change something, keep what is seen then, and wait until what lies below the images follows."""
        places = ("#images-A", "#path")
        old, start = [self.pictures(where) for where in places], time.perf_counter()
        act()
        for where, before in zip(places, old, strict=True):
            self.page.wait_for_function(NEW_PICTURES, arg=[where, before])
            if where == places[0]:
                self.seconds.append(time.perf_counter() - start)
                self.look(hold)

    def look(self, hold: int) -> None:
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT}
        frame = PIL.Image.open(io.BytesIO(self.page.screenshot(clip=clip))).convert("RGB")
        size = (SHOWN, HEIGHT * SHOWN // WIDTH)
        self.frames.append((frame.resize(size, PIL.Image.Resampling.LANCZOS), hold))

    def slide(self, name: str, key: str, times: int) -> None:
        slider = self.page.locator(f"#{name} input[type=range]")
        slider.focus()
        for _ in range(times):
            self.change(lambda: slider.press(key))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, help="animated WebP")
    parser.add_argument("--changes", type=int, default=12, help="lengths to time")
    chosen = parser.parse_args()
    page = build(Workbench(chosen.run), told="This page is visible only from this machine.")
    address = serve(page, wait=False)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        window.set_default_timeout(120_000)
        window.goto(address)
        window.wait_for_selector("#curves img")
        visitor = Visitor(window)
        visitor.look(1200)
        visitor.slide("ema-A", "ArrowLeft", chosen.changes)
        lengths = sorted(visitor.seconds)
        print(
            f"slider to {len(visitor.pictures())} new images: median {statistics.median(lengths):.2f} s, "
            f"{lengths[0]:.2f} to {lengths[-1]:.2f} s; {machine(torch.device('cpu'))}"
        )
        if chosen.out is not None:
            visitor.slide("ema-A", "ArrowRight", chosen.changes)
            visitor.change(lambda: window.locator("#guide-A").get_by_text("earlier").click(), hold=1200)
            visitor.slide("weight-A", "ArrowRight", 12)
            visitor.look(1500)
            visitor.slide("steps-A", "ArrowLeft", 12)
            visitor.look(2000)
            write(visitor.frames, chosen.out)
        browser.close()
    page.close()


def write(frames: list[tuple[PIL.Image.Image, int]], out: Path) -> None:
    pictures, holds = zip(*frames, strict=True)
    options: dict[str, Any] = dict(save_all=True, append_images=pictures[1:], duration=holds, loop=0)
    pictures[0].save(out, quality=60, method=6, minimize_size=True, **options)
    print(f"{out}: {len(frames)} pictures, {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
