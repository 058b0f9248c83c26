"""The curves hold their data, are drawn the same every time, and refuse what they cannot draw."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from edm2.report import figure_png, figure_svg, loss_curve, new_figure, score_curve, style, uncertainty_curve
from edm2.report.figures import MOST_POINTS

SIGMA = np.geomspace(0.002, 80, 9)


def line(ax, label):
    (found,) = [artist for artist in ax.lines if artist.get_label() == label]
    return found.get_xydata()


def draw_all():
    return {
        "loss": loss_curve([1, 2, 3, 4], [3.0, 2.0, -1.0, -1.5], learning_rate=[0.0, 1.0, 1.0, 0.5]),
        "uncertainty": uncertainty_curve(SIGMA, -SIGMA, SIGMA - 1, np.exp(-(np.log(SIGMA) ** 2))),
        "score": score_curve(
            [0.05, 0.1], [2.0, 1.0], best=0.1, tracked=[0.05], reference=0.5, label="a$b$<&"
        ),
    }


@pytest.mark.parametrize("name", ["loss", "uncertainty", "score"])
def test_same_figure_same_bytes_and_nothing_to_load(name):
    first, second = draw_all()[name], draw_all()[name]
    svg = figure_svg(first)
    assert svg == figure_svg(second)
    assert figure_png(first) == figure_png(second)
    assert b"<dc:date" not in svg
    assert b"Matplotlib" not in svg
    assert b"Software" not in figure_png(first)
    for element in ET.fromstring(svg).iter():
        assert not element.tag.endswith(("script", "image", "foreignObject"))
        for key, value in element.attrib.items():
            assert not key.endswith("href") or value.startswith("#")


def test_dpi_sets_the_size_of_a_png():
    png = figure_png(new_figure()[0], dpi=100)
    size = [int.from_bytes(png[at : at + 4], "big") for at in (16, 20)]
    assert size == [round(100 * style.WIDTH), round(100 * style.HEIGHT)]


@pytest.mark.parametrize("name", ["loss", "uncertainty", "score"])
def test_every_colour_of_a_house_figure_has_a_dark_partner(name):
    svg = figure_svg(draw_all()[name]).decode()
    sheets = " ".join(re.findall(r"<style>(.*?)</style>", svg, re.DOTALL))
    written = set(re.findall(r"(fill|stroke): (#[0-9a-f]{6})", svg))
    swapped = set(re.findall(r'\[style\*="(fill|stroke): (#[0-9a-f]{6})"\]', sheets))
    assert len(written) > 3
    assert written <= swapped
    # What has no colour is black, which nothing would swap.
    assert not [t for t in re.findall(r"<text [^>]*>", svg) if "fill:" not in t]
    assert "@media (prefers-color-scheme:dark)" in sheets


def test_dark_partners_are_as_readable_as_the_light_colours():
    def luminance(colour):
        channels = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    def contrast(one, other):
        low, high = sorted([luminance(one), luminance(other)])
        return (high + 0.05) / (low + 0.05)

    for roles, series in ((style.LIGHT, style.SERIES), (style.DARK, style.SERIES_DARK)):
        assert contrast(roles["ink"], roles["paper"]) > 12
        assert contrast(roles["muted"], roles["paper"]) > 4.5  # WCAG AA for text
        assert min(contrast(colour, roles["paper"]) for colour in series) > 4
    light = [*style.LIGHT.values(), *style.SERIES, *style.FAINT]
    assert len(set(light)) == len(light)


def test_foreign_figures_keep_their_colours():
    from matplotlib.figure import Figure

    assert b"prefers-color-scheme" not in figure_svg(Figure())
    assert b"prefers-color-scheme" in figure_svg(new_figure()[0])


def test_loss_curve_shows_values_and_their_mean():
    seen, loss = np.arange(1, 201) * 128, np.tile([1.0, 3.0], 100)
    top, below = loss_curve(seen, loss, learning_rate=np.full(200, 0.01)).axes
    np.testing.assert_array_equal(line(top, "each value logged"), np.stack([seen, loss], 1))
    mean = line(top, "running mean")[:, 1]
    # A window of five alternating values: three of one, two of the other.
    np.testing.assert_allclose(mean[2:-2], 2 + np.tile([-0.2, 0.2], 98))
    np.testing.assert_allclose(mean[0], (1 + 3 + 1) / 3)
    np.testing.assert_array_equal(below.lines[0].get_ydata(), 0.01)


def test_long_runs_are_thinned_without_losing_extremes():
    loss = np.sin(np.arange(50_000) / 700.0)
    loss[31_337], loss[4_242] = 2.0, -3.0
    drawn = line(loss_curve(np.arange(50_000), loss).axes[0], "each value logged")
    assert len(drawn) <= MOST_POINTS + 2
    assert [31_337, 2.0] in drawn.tolist()
    assert [4_242, -3.0] in drawn.tolist()
    assert drawn[0, 0] == 0
    assert drawn[-1, 0] == 49_999


def test_values_left_out_of_the_axes_are_counted():
    loss = np.linspace(1.0, 0.0, 1000)
    loss[3], loss[7] = 90.0, -50.0
    ax = loss_curve(np.arange(1000), loss).axes[0]
    assert [text.get_text() for text in ax.texts] == ["2 of 1000 values outside"]
    assert ax.get_ylim()[1] < 5
    calm = loss_curve(np.arange(1000), np.linspace(1.0, 0.0, 1000)).axes[0]
    assert not calm.texts


def test_uncertainty_curve_puts_measured_values_and_noise_beside_it():
    density = np.array([0.0, 1, 2, 4, 8, 4, 2, 1, 0])
    ax = uncertainty_curve(SIGMA, -SIGMA, SIGMA, density).axes[0]
    assert ax.get_xscale() == "log"
    np.testing.assert_array_equal(line(ax, "learned u(σ)"), np.stack([SIGMA, -SIGMA], 1))
    np.testing.assert_array_equal(line(ax, "measured log error"), np.stack([SIGMA, SIGMA], 1))
    outline = ax.collections[0].get_paths()[0].vertices
    assert outline[outline[:, 1].argmax(), 0] == SIGMA[4]
    assert not uncertainty_curve(SIGMA, -SIGMA).axes[0].collections
    assert [a.get_label() for a in uncertainty_curve(SIGMA, None, SIGMA).axes[0].lines] == [
        "measured log error"
    ]


def test_score_curve_marks_best_tracked_and_reference():
    ax = score_curve([0.05, 0.1, 0.2], [2.0, 1.0, 1.5], best=0.1, tracked=[0.05, 0.2], reference=0.5).axes[0]
    np.testing.assert_allclose(line(ax, "best: 1 at 10%"), [[10, 1.0]])
    np.testing.assert_allclose(line(ax, "tracked")[:, 0], [5, 20])
    np.testing.assert_allclose(line(ax, "real images: 0.5")[:, 1], 0.5)
    assert ax.get_yscale() == "linear"


@pytest.mark.parametrize(
    ("scores", "scale"), [([9.0, 1.0], "log"), ([7.0, 1.0], "linear"), ([9.0, 0.0], "linear")]
)
def test_widely_spread_positive_scores_are_drawn_on_a_logarithmic_axis(scores, scale):
    assert score_curve([0.05, 0.1], scores, best=0.1).axes[0].get_yscale() == scale


@pytest.mark.parametrize("score", [0.4, 12345.678, 1.234e-5])
def test_everything_lies_inside_the_figure(score):
    long = score_curve(
        [0.0512, 0.1234], [1.02 * score, score], best=0.1234, tracked=[0.0512], reference=score
    )
    for figure in (*draw_all().values(), long):
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert min(box.x0, box.y0) > -0.01
        assert box.x1 < width + 0.01
        assert box.y1 < height + 0.01


def test_a_label_is_text_and_never_mathematics():
    svg = figure_svg(score_curve([0.1], [1.0], best=0.1, label="a $\\nonsense$ <script>")).decode()
    assert "a $\\nonsense$ &lt;script&gt;" in svg


def test_matplotlib_waits_for_the_first_figure_and_pyplot_is_never_loaded():
    script = (
        "import sys, edm2.report as r; assert 'matplotlib' not in sys.modules;"
        "r.figure_svg(r.loss_curve([1, 2], [1, 2])); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
