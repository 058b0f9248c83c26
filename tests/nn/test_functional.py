import math

import pytest
import torch

from edm2.nn import mp_cat, mp_silu, mp_sum, normalize, resample


def test_operations_equal_golden(golden, relative_error):
    ops = golden("ops.npz")
    a, b, c = (torch.from_numpy(ops[k]) for k in "abc")
    cases = {
        "normalize_default": normalize(a),
        "normalize_dim1": normalize(a, dim=1),
        "mp_silu": mp_silu(a),
        "mp_sum_t0.3": mp_sum(a, b, 0.3),
        "mp_sum_t0.5": mp_sum(a, b, 0.5),
        "mp_cat_t0.3": mp_cat(a, c, dim=1, t=0.3),
        "mp_cat_t0.5": mp_cat(a, c, dim=1, t=0.5),
        "down": resample(a, "down"),
        "up": resample(a, "up"),
    }
    for name, value in cases.items():
        assert relative_error(value, ops[name]) < 1e-5, name


def test_unit_magnitude_is_preserved():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, 96, 16, 16, generator=generator).unbind(0)
    for t in (0.0, 0.2, 0.5, 1.0):
        assert mp_sum(a, b, t).square().mean().sqrt() == pytest.approx(1, abs=3e-3)
        assert mp_cat(a, b[:, :32], t=t).square().mean().sqrt() == pytest.approx(1, abs=3e-3)
    assert mp_silu(a).square().mean().sqrt() == pytest.approx(1, abs=3e-3)
    assert (7 * normalize(a)).square().mean().sqrt() == pytest.approx(7, abs=1e-3)


def test_mp_cat_weighs_contributions_not_channels():
    a, b = torch.ones(1, 4, 1, 1), torch.ones(1, 12, 1, 1)
    out = mp_cat(a, b, t=0.25).square()
    share_b = out[:, 4:].sum() / out.sum()
    assert share_b == pytest.approx(0.25**2 / (0.25**2 + 0.75**2))


def test_normalize_zero_and_tiny_vectors_stay_finite():
    assert normalize(torch.zeros(2, 3)).abs().max() == 0
    x = torch.full((1, 4), 1e-4)
    assert torch.allclose(normalize(x), torch.full((1, 4), 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_normalize_keeps_dtype_and_does_not_overflow(dtype):
    out = normalize(torch.full((2, 512), 300.0, dtype=dtype), dim=1)  # the sum of squares is beyond float16
    assert out.dtype == dtype
    assert torch.allclose(out.float(), torch.ones(2, 512), atol=1e-2)


def test_resample_down_inverts_up():
    x = torch.randn(1, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(resample(resample(x, "up"), "down"), x, atol=1e-6)
    assert resample(x, "keep") is x


def test_resample_unknown_mode():
    with pytest.raises(ValueError, match="'sideways' is not one of 'keep', 'down', 'up'"):
        resample(torch.zeros(1, 1, 2, 2), "sideways")


def test_silu_constant_is_the_rms_of_silu():
    x = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    exact = torch.trapezoid(torch.nn.functional.silu(x) ** 2 * density, x).sqrt()
    assert exact == pytest.approx(0.596, abs=5e-4)


def test_doubling_is_the_same_when_compiled():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(torch.compile(resample, backend="eager")(x, "up"), resample(x, "up"))


def test_normalize_of_what_is_empty_or_a_vector():
    assert normalize(torch.zeros(0, 4, 2)).shape == (0, 4, 2)
    assert normalize(torch.zeros(3, 0)).shape == (3, 0)
    with pytest.raises(
        ValueError, match=r"x of shape \(3,\) has only one dimension to normalise over: give dim"
    ):
        normalize(torch.ones(3))
    assert normalize(torch.full((3,), 5.0), dim=0, eps=0).tolist() == [1, 1, 1]
