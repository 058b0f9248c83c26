import numpy as np
import pytest

from edm2.report import figure_svg, loss_curve
from edm2.report.magnitudes import by_resolution, limits_of, magnitude_curve


def test_blocks_are_grouped_by_part_and_resolution():
    values = {
        "unet.enc.8x8_conv": 3.0,
        "unet.enc.8x8_block0": 4.0,
        "unet.dec.4x4_in0": 2.0,
        "unet.emb_noise.weight": 9.0,
    }
    assert by_resolution(values) == {"encoder 8x8": pytest.approx(12.5**0.5), "decoder 4x4": 2.0}


def test_names_without_resolution_stay():
    assert by_resolution({"layers.0": 1.0, "layers.1": 2.0}) == {"layers.0": 1.0, "layers.1": 2.0}


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].lines}


def test_a_single_record_is_a_dot():
    alone = magnitude_curve([10], [{"encoder 8x8": 1.0}], label="RMS").axes[0].lines
    several = magnitude_curve([10, 20], [{"encoder 8x8": 1.0}] * 2, label="RMS").axes[0].lines
    assert [line.get_marker() for line in (*alone, *several)] == ["o", "None"]
    loss = loss_curve([10], [0.5], learning_rate=[0.1])
    assert {line.get_marker() for axes in loss.axes for line in axes.lines} == {"o"}


def test_each_name_is_a_curve_and_parts_differ_in_style():
    figure = magnitude_curve(
        [10, 20],
        [{"encoder 8x8": 1.0, "decoder 8x8": 2.0}, {"encoder 8x8": 1.5, "decoder 8x8": 4.0}],
        label="RMS",
    )
    drawn = lines(figure)
    assert list(drawn["encoder 8x8"].get_ydata()) == [1.0, 1.5]
    assert list(drawn["decoder 8x8"].get_ydata()) == [2.0, 4.0]
    assert drawn["encoder 8x8"].get_color() == drawn["decoder 8x8"].get_color()
    assert (drawn["encoder 8x8"].get_linestyle(), drawn["decoder 8x8"].get_linestyle()) == ("-", "--")
    assert figure.axes[0].get_yscale() == "log"
    assert b"RMS" in figure_svg(figure)


def test_many_layers_become_a_median():
    values = [{f"layer {i}": float(i + 1) for i in range(21)}] * 2
    drawn = lines(magnitude_curve([1, 2], values, label="RMS"))
    assert list(drawn) == ["median of 21 layers"]
    assert list(drawn["median of 21 layers"].get_ydata()) == [11.0, 11.0]


def test_constant_values_do_not_fill_the_height():
    figure = magnitude_curve([1, 2], [{"a": 1.0}, {"a": 1.0001}], label="RMS")
    low, high = figure.axes[0].get_ylim()
    assert low < 0.6
    assert high > 1.9


def test_several_runs_can_share_an_axis():
    runs = [[{"a": 1.0}, {"a": 0.0}], [{"b": 2.0}, {"b": np.inf}, {"b": 500.0}]]
    limits = limits_of(record for run in runs for record in run)
    assert limits == (1.0, 500.0)
    first, second = (
        magnitude_curve(range(len(run)), run, label="RMS", limits=limits).axes[0].get_ylim() for run in runs
    )
    assert first == second
    assert first[0] < 1.0
    assert first[1] > 500.0
    assert limits_of([{"a": 0.0}]) is None


def test_a_record_without_any_value_is_a_gap_of_the_median():
    values = [{f"layer {i}": step for i in range(20)} for step in (0.0, 3.0)]
    (curve,) = lines(magnitude_curve([1, 2], values, label="RMS")).values()
    np.testing.assert_array_equal(curve.get_ydata(), [np.nan, 3.0])


def test_names_with_dollars_are_no_formulas():
    assert rb"layer $\nonsense$" in figure_svg(
        magnitude_curve([1], [{r"layer $\nonsense$": 1.0}], label="RMS")
    )


def test_zero_and_infinite_values_are_gaps():
    figure = magnitude_curve([1, 2, 3], [{"a": 0.0}, {"a": np.inf}, {"a": 2.0}], label="RMS")
    assert np.isnan(lines(figure)["a"].get_ydata()[:2]).all()
    assert figure_svg(magnitude_curve([1], [{"a": 0.0}], label="RMS"))
