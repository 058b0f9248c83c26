"""The studio in a real browser: controls moved, pictures changed, the command run to the same bits."""

import base64
import dataclasses
import io
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from edm2.cli import main
from edm2.distill import distill, open_teacher, student_settings
from edm2.ema.storage.manifest import read_manifest, write_manifest
from edm2.generate import read_images

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt install chromium"),
    pytest.mark.filterwarnings("ignore"),  # of gradio, its server and its threads
]
PATIENCE = 120_000  # milliseconds, on a machine that does other work


def served(run):
    """Start a studio; returns its address and what closes it."""
    from edm2.studio.page import build, serve
    from edm2.studio.workbench import Workbench

    page = build(Workbench(run), told="This page is visible only from this machine.")
    return serve(page, wait=False), page.close


@pytest.fixture(scope="module")
def studio(digits_run, tmp_path_factory):
    """A studio of a copy of the tiny run; its address and the run."""
    run = tmp_path_factory.mktemp("studio") / "run"
    shutil.copytree(digits_run, run)
    address, close = served(run)
    yield address, run
    close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, studio):
    """Open a page in a window, with everything that it asks for on record."""
    contexts = []

    def open_page(width=1200, scheme="light", *, address=studio[0]):
        context = browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("#images-A img")
        page.wait_for_selector("#curves img")
        return page

    yield open_page
    for context in contexts:
        context.close()


def sources(page, where="#images-A"):
    return page.eval_on_selector_all(f"{where} img", "found => found.map(image => image.src)")


def changed(page, act, where="#images-A"):
    """The pictures after an action that changes them."""
    before = sources(page, where)
    act()
    page.wait_for_function(
        "([where, old]) => { const now = [...document.querySelectorAll(where + ' img')].map(i => i.src);"
        " return now.length > 0 && JSON.stringify(now) !== JSON.stringify(old) }",
        arg=[where, before],
    )
    return sources(page, where)


def slide(page, name, keys):
    slider = page.locator(f"#{name} input[type=range]")
    slider.focus()
    for key in keys:
        slider.press(key)


def pixels_of(source):
    image = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
    return np.asarray(image)[None, :, :, 0]


def test_what_one_does_in_the_studio(visit, studio, tmp_path):
    _, run = studio
    page = visit()
    assert {url.split("/")[2] for url in page.asked if url.startswith("http")} == {studio[0].split("/")[2]}
    assert "This run is finished after 64 training images" in page.inner_text("body")
    assert len(sources(page)) == 16

    changed(page, lambda: slide(page, "ema-A", ["ArrowLeft"] * 6))  # a shorter average
    changed(page, lambda: page.locator("#guide-A").get_by_text("earlier").click())
    changed(page, lambda: slide(page, "weight-A", ["ArrowRight"] * 5))
    changed(page, lambda: slide(page, "steps-A", ["ArrowLeft"] * 8), "#path")
    changed(page, lambda: page.locator("#seed input").fill("100"))
    page.wait_for_function(
        "() => document.querySelector('#command-A textarea').value.includes('--seeds 100-115')"
    )
    page.wait_for_timeout(1000)
    command = page.input_value("#command-A textarea")
    for part in ("--ema 0.07 ", "--guidance 1.75", "--num-steps 8", "--guide-ema 0.05"):
        assert part in command
    main([*shlex.split(command)[1:-1], str(tmp_path / "made")])  # in place of --out samples
    made = read_images([tmp_path / "made" / f"{seed:06d}.png" for seed in range(100, 116)])
    assert np.array_equal(made, np.stack([pixels_of(source) for source in sources(page)]))

    page.locator("#compare input").check()
    page.wait_for_selector("#images-B img")
    assert len(sources(page, "#path")) == 8
    changed(page, lambda: slide(page, "ema-B", ["ArrowLeft"]), "#images-B")
    assert sources(page, "#images-B") != sources(page)

    page.locator("#seed input").fill("")
    page.wait_for_selector("#images-A .problem")
    assert "fill in a number" in page.inner_text("#images-A")
    page.locator("#seed input").fill("3")
    page.wait_for_selector("#images-A img")

    page.locator("#name input, #name textarea").first.fill("mine")
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Saved.").wait_for()
    assert (run / "studio" / "mine" / "model.safetensors").is_file()
    page.screenshot(path=tmp_path / "studio.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_and_follows_the_readers_colours(visit, scheme, tmp_path):
    page = visit(375, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.screenshot(path=tmp_path / "phone.png")
    brightness = np.asarray(Image.open(tmp_path / "phone.png").convert("L"))[-1].mean()
    assert (brightness < 80) == (scheme == "dark")


def test_files_are_not_served(visit, studio):
    page = visit()
    for path in (
        f"gradio_api/file={studio[1]}/config.json",
        "gradio_api/file=/etc/hostname",
        "../pyproject.toml",
    ):
        assert page.request.get(f"{studio[0]}{path}").status in (403, 404)


def test_a_conditional_run(visit, pixels, tmp_path):
    """Case and dropped picture change the members; the command makes them too."""
    run = shutil.copytree(pixels, tmp_path / "run")
    address, close = served(run)
    try:
        page = visit(address=address)
        assert "Case of the held-out data" in page.inner_text("body")
        captions = page.locator("#given-A figcaption").all_inner_texts()
        assert [text.split(",")[0] for text in captions] == ["given", "mean", "spread", "truth"]
        changed(page, lambda: slide(page, "case", ["ArrowRight"] * 3), "#given-A")
        Image.fromarray(np.full((40, 30, 3), 180, np.uint8)).save(tmp_path / "mine.png")
        changed(
            page, lambda: page.set_input_files("#dropped input[type=file]", tmp_path / "mine.png"), "#given-A"
        )
        # Nobody knows the truth. Pictures of a step of the slider may come before.
        page.wait_for_function("document.querySelectorAll('#given-A figcaption').length === 3")
        page.wait_for_function(
            "() => document.querySelector('#command-A textarea').value.includes('case-3-')"
        )
        page.wait_for_timeout(1000)
        main([*shlex.split(page.input_value("#command-A textarea"))[1:-1], str(tmp_path / "made")])
        made = read_images([tmp_path / "made" / f"{seed:06d}.png" for seed in range(16)])
        assert np.array_equal(made, np.stack([pixels_of(source) for source in sources(page)]))
        page.screenshot(path=tmp_path / "conditional.png", full_page=True)
    finally:
        close()


def test_a_run_that_trains_on(visit, digits_run, tmp_path):
    """A visitor who comes later sees the newest snapshot."""
    run = shutil.copytree(digits_run, tmp_path / "run")
    (run / "model.safetensors").unlink()
    manifest = run / "snapshots" / "manifest.json"
    whole = read_manifest(run / "snapshots")
    first_half = [s for s in whole.snapshots if s.t <= 32]
    write_manifest(run / "snapshots", dataclasses.replace(whole, snapshots=tuple(first_half)))
    address, close = served(run)
    try:
        page = visit(address=address)
        assert "still training: the newest snapshot is of 32 of 64 images" in page.inner_text("body")
        assert "--ema-images 32 " in page.input_value("#command-A textarea")
        manifest.write_bytes((digits_run / "snapshots" / "manifest.json").read_bytes())
        page = visit(address=address)
        page.get_by_text("finished after 64 training images").wait_for()
        page.wait_for_function(
            "() => document.querySelector('#command-A textarea').value.includes('--ema-images 64 ')"
        )
    finally:
        close()


def test_a_lost_connection(visit):
    """A page that loses its connection says so, and starts again when it is back; others are served meanwhile."""
    page = visit()
    page.context.set_offline(True)
    slide(page, "ema-A", ["ArrowLeft"])
    page.get_by_text("Connection to the server was lost").wait_for()
    other = visit()
    changed(other, lambda: other.locator("#seed input").fill("7"))
    with page.expect_navigation():
        page.context.set_offline(False)
    page.wait_for_selector("#images-A img")
    changed(page, lambda: page.locator("#seed input").fill("7"))


def test_visitors_who_leave_in_the_middle_keep_nobody_waiting(visit):
    gone = visit()
    slide(gone, "count", ["End"])
    slide(gone, "steps-A", ["End"])
    gone.close()
    page = visit()
    changed(page, lambda: slide(page, "ema-A", ["ArrowLeft"] * 2))


def test_a_student(visit, digits_run, tmp_path):
    settings = student_settings(open_teacher(digits_run), digits_run, num_images=16)
    distill(open_teacher(digits_run), tmp_path / "student", settings, quiet=True)
    address, close = served(tmp_path / "student")
    try:
        page = visit(address=address)
        assert "--sampler consistency --num-steps 2 " in page.input_value("#command-A textarea")
        assert len(sources(page, "#path")) == 2
    finally:
        close()
