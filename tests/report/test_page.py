"""The page is valid, closed in itself, and shows hostile texts as texts."""

import base64
import errno
import io
import os
import re
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import PIL.Image
import pytest

from edm2.files import write_atomic
from edm2.report import Page, figure_png, figure_svg, image_grid, loss_curve, style

HOSTILE = "\"'><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>&amp;"
VOID = {"meta", "img", "br", "hr"}


class Reader(HTMLParser):
    """Collects elements and texts, and checks that every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def find(self, wanted):
        return [attributes for tag, attributes in self.elements if tag == wanted]


def small_image():
    return image_grid(np.zeros((2, 1, 3, 3), np.uint8), columns=2)


def full_page(word="word"):
    page = Page(f"title {word}", lead=word)
    page.facts({word: word, "number": 1.5})
    for index in range(4):
        page.section(f"{word} {index}", f"one\n\ntwo {word}")
    with page.columns():
        page.image(small_image(), word, f"alt {word}", scale=4)
        page.figure(loss_curve([1, 2], [2, 1]), word, f"alt {word}")
    page.figure(figure_png(loss_curve([1, 2], [2, 1])), word, f"alt {word}")
    page.table([word, "x"], [[word, 1], ["b", 2.5]], caption=word)
    page.code(f"edm2 train --out {word}")
    return page


def test_nothing_is_loaded_from_anywhere():
    page = full_page().render()
    reader = Reader(page)
    assert {tag for tag, _ in reader.elements}.isdisjoint(
        {"script", "link", "iframe", "object", "base", "form"}
    )
    for tag, attributes in reader.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "srcset", "poster", "data"}:
                assert value.startswith("data:image/"), (tag, name, value[:40])
            if name == "href":
                assert value.startswith("#")
    assert "//" not in re.sub(r'src="data:[^"]*"', "", page)
    assert "url(" not in page
    assert "@import" not in page
    (policy,) = [m["content"] for m in reader.find("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_document_has_what_a_reader_and_a_phone_need():
    reader = Reader(full_page().render())
    assert reader.find("html") == [{"lang": "en"}]
    names = {meta.get("name"): meta.get("content") for meta in reader.find("meta")}
    assert names["viewport"] == "width=device-width, initial-scale=1"
    assert names["color-scheme"] == "light dark"
    assert len(reader.find("h1")) == len(reader.find("main")) == len(reader.find("title")) == 1
    assert all(image["alt"] for image in reader.find("img"))
    identities = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(set(identities)) == len(identities) == 4
    assert [link["href"] for link in reader.find("a")] == [f"#{name}" for name in identities]
    assert [section["aria-labelledby"] for section in reader.find("section")] == identities


def test_hostile_texts_are_shown_and_never_obeyed():
    plain, hostile = Reader(full_page().render()), Reader(full_page(HOSTILE).render())
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert [sorted(a) for _, a in hostile.elements] == [sorted(a) for _, a in plain.elements]
    # title, h1, lead, fact twice, 4 headings, 4 links, 4 texts, 3 captions, table: head, cell, caption; code
    assert "".join(hostile.texts).count(HOSTILE) == 3 + 2 + 12 + 3 + 3 + 1
    assert hostile.find("img")[0]["alt"] == f"alt {HOSTILE}"


def test_file_names_that_are_no_utf8_can_be_written(tmp_path):
    page = Page("names")
    page.code(os.fsdecode(b"edm2 sample --model \xff.safetensors"))
    assert "\\udcff.safetensors" in page.write(tmp_path / "page.html").read_text("utf-8")


def test_same_page_same_bytes_written_whole(tmp_path):
    path = full_page().write(tmp_path / "new" / "page.html")
    assert path.read_text("utf-8") == full_page().render()
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomic(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_are_embedded_unchanged():
    figure = loss_curve([1, 2], [2, 1])
    page = Page("pictures")
    page.figure(figure, "", "a curve")
    page.figure(figure_png(figure), "", "a curve")
    page.image(small_image(), "", "two images", scale=4)
    svg, png, grid = Reader(page.render()).find("img")
    assert svg["src"].startswith("data:image/svg+xml;base64,")
    assert base64.b64decode(svg["src"].split(",")[1]) == figure_svg(figure)
    assert base64.b64decode(png["src"].split(",")[1]) == figure_png(figure)
    assert (grid["class"], grid["width"], grid["height"]) == ("pixels", "28", "12")
    with PIL.Image.open(io.BytesIO(base64.b64decode(grid["src"].split(",")[1]))) as shown:
        expected = np.asarray(small_image()).repeat(4, 0).repeat(4, 1)
        np.testing.assert_array_equal(np.asarray(shown), expected)
    assert "image-rendering: pixelated" in page.render()


def test_columns_hold_what_is_added_inside_them():
    page = Page("columns")
    with page.columns():
        page.text("left")
        page.text("right")
    page.text("below")
    assert '<div class="columns">\n<p>left</p>\n<p>right</p>\n</div>\n<p>below</p>' in page.render()


def test_numbers_stand_flush_right_and_words_do_not():
    page = Page("table")
    page.table(["n", "share", "word"], [[1, "98.5%", "a"], [1_000, "−3.1e-5", "2nd"], [0.1 + 0.2, "–", ""]])
    rendered = page.render()
    assert '<td class="number">0.3</td><td class="number">–</td><td></td>' in rendered
    assert '<th scope="col" class="number">n</th>' in rendered


def test_few_sections_need_no_contents_and_empty_tables_are_fine():
    page = Page("short")
    page.section("only")
    page.table(["a"], [])
    assert not Reader(page.render()).find("nav")


def test_css_and_figures_share_their_colours():
    css = resources.files("edm2.report").joinpath("page.css").read_text("utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    for text, roles, accent in ((light, style.LIGHT, style.SERIES), (dark, style.DARK, style.SERIES_DARK)):
        colours = dict(re.findall(r"--(\w+): (#\w+);", text))
        assert colours["accent"] == accent[0]
        for role in ("paper", "ink", "muted", "rule"):
            assert colours[role] == roles[role]


def test_a_row_with_a_missing_cell_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        Page("title").table(["a", "b"], [[1, 2], [1]])


@pytest.mark.parametrize(
    "build",
    [
        lambda page: Page(" "),
        lambda page: page.figure(b"GIF89a...", "", "alt"),
        lambda page: page.image(PIL.Image.new("L", (1, 1)), "", " "),
    ],
)
def test_what_only_we_can_get_wrong(build):
    with pytest.raises(AssertionError):
        build(Page("title"))


def test_a_section_inside_columns_is_refused():
    page = Page("title")
    with pytest.raises(AssertionError, match="begins inside columns"), page.columns():
        page.section("inner")
