import types

import numpy as np
import pytest

from edm2.ema import sigma_rel_to_gamma
from edm2.report.ema_figures import reconstruction_figure, tracked_figure


def manifest(start=0.0):
    """What the figures need of a manifest: two tracks, stored at 100 and 200 images from the start."""
    snapshots = [
        types.SimpleNamespace(t=start + t, sigma_rel=s, gamma=sigma_rel_to_gamma(s), file=f"{t:g}_{s:g}")
        for t in (100.0, 200.0)
        for s in (0.05, 0.1)
    ]
    return types.SimpleNamespace(run=types.SimpleNamespace(start=start, clock="images"), snapshots=snapshots)


@pytest.mark.parametrize("start", [0.0, 1000.0])
def test_tracked_averages_end_at_their_moments(start):
    (ax,) = tracked_figure(manifest(start), [start + 200.0]).axes
    assert [line.get_label() for line in ax.lines] == ["5%", "10%"]
    for line, sigma_rel in zip(ax.lines, (0.05, 0.1), strict=True):
        x, y = line.get_data()
        assert (x[0], x[-1], y.max(), y[-1]) == (start, start + 200, 1, 0)
        # Half of the time: (1/2)^gamma of the peak.
        half = np.interp(start + 100, x[:-1], y[:-1])
        assert half == pytest.approx(0.5 ** sigma_rel_to_gamma(sigma_rel), rel=1e-3)
    both = tracked_figure(manifest(start), [start + 100.0, start + 200.0])
    colors = [line.get_color() for line in both.axes[0].lines]
    assert colors == [colors[0]] * 2 + [colors[2]] * 2
    assert colors[0] != colors[2]


def test_a_stored_average_is_its_own_reconstruction():
    result = types.SimpleNamespace(sigma_rel=0.1, t=200.0, coefficients={"200_0.1": 1.0}, label="x")
    top, bottom = reconstruction_figure(manifest(), [result]).axes
    wanted, made = top.lines
    np.testing.assert_allclose(made.get_ydata(), wanted.get_ydata(), atol=1e-12)
    assert np.abs(bottom.lines[0].get_ydata()).max() < 1e-9
    with pytest.raises(ValueError, match="0 EMA lengths: a figure shows 1 to 7"):
        reconstruction_figure(manifest(), [])
