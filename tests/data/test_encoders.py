import dataclasses

import numpy as np
import pytest
import torch

from edm2.data import ArrayDataset, FloatCoding, PixelCoding, coding_warning, measure_coding

ALL = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)


def dataset(mean=100.0, std=30.0, channels=2, size=64):
    rng = np.random.default_rng(0)
    values = rng.normal(mean, std, (size, channels, 8, 6)) + 20 * np.arange(channels)[:, None, None]
    return ArrayDataset(np.clip(values, 0, 255).astype(np.uint8))


def test_the_default_leaves_the_scaled_pixels_as_they_are():
    x = PixelCoding().encode(ALL)
    assert x.dtype == torch.float32
    assert torch.equal(x, ALL.float() / 127.5 - 1)
    assert x.min() == -1
    assert x.max() == 1


@pytest.mark.parametrize(
    ("mean", "std", "sigma_data"),
    [((0.0,), (0.5,), 0.5), ((-0.39,), (0.75,), 0.5), ((0.9,), (0.01,), 1.0), ((-0.7,), (3.0,), 0.3)],
)
def test_all_256_values_come_back(mean, std, sigma_data):
    coding = PixelCoding(mean=mean, std=std, sigma_data=sigma_data)
    assert torch.equal(coding.decode(coding.encode(ALL)), ALL)


def test_channels_are_coded_by_their_own_moments():
    coding = PixelCoding(mean=(0.1, -0.2), std=(0.5, 0.25))
    x = coding.encode(torch.full((1, 2, 1, 1), 255, dtype=torch.uint8))
    assert x.flatten().tolist() == pytest.approx([0.9, 2.4], rel=1e-6)


def test_decode_is_the_rule_of_the_paper():
    x = torch.tensor([-2.0, -1.0, -0.998, 0.0, 0.99, 1.0, 5.0]).reshape(1, 1, 1, 7)
    expected = np.clip(x.numpy() * 127.5 + 128, 0, 255).astype(np.uint8)
    assert np.array_equal(PixelCoding().decode(x).numpy(), expected)
    assert PixelCoding().decode(x).dtype == torch.uint8


def test_float_coding_is_undone():
    coding = FloatCoding(mean=(5.81, -2.15), std=(4.17, 3.62))
    z = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0)) * 4 + 1
    x = coding.encode(z)
    assert torch.allclose(x[:, 1], (z[:, 1] + 2.15) / 3.62 * 0.5, atol=1e-6)
    assert torch.allclose(coding.decode(x), z, atol=1e-5)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_measured_coding_makes_zero_mean_and_sigma_data(sigma_data):
    data = dataset()
    coding = measure_coding(data, sigma_data=sigma_data)
    assert isinstance(coding, PixelCoding)
    x = coding.encode(torch.from_numpy(data.images(np.arange(len(data))))).double()
    assert x.mean((0, 2, 3)).abs().max() < 1e-6
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.tensor(sigma_data).double(), atol=1e-6)


def test_measured_coding_of_floats():
    values = np.random.default_rng(0).normal(50, 2, (40, 1, 8, 8)).astype(np.float32)
    coding = measure_coding(ArrayDataset(values))
    assert type(coding) is FloatCoding
    assert coding.mean[0] == pytest.approx(values.mean(), rel=1e-6)
    assert coding.std[0] == pytest.approx(values.std(), rel=1e-4)


def test_a_sample_is_drawn_the_same_way_every_time():
    data = dataset(size=600)
    assert measure_coding(data, sample=300) == measure_coding(data, sample=300)
    assert measure_coding(data, sample=300) != measure_coding(data)
    assert measure_coding(data, sample=300).mean == pytest.approx(measure_coding(data).mean, abs=0.01)


def test_a_coding_is_plain_data():
    coding = PixelCoding(mean=(0.1, 0.2), std=(0.3, 0.4))
    assert PixelCoding(**dataclasses.asdict(coding)) == coding


def test_warning_far_from_sigma_data_gives_the_fix():
    data = dataset(mean=30, std=20, channels=1)
    warning = coding_warning(data, PixelCoding())
    assert warning is not None
    better = measure_coding(data)
    assert f"({round(better.mean[0], 4)},)" in warning
    assert "far from sigma_data 0.5" in warning
    assert coding_warning(data, better) is None


def test_warning_names_a_constant_channel():
    opaque = np.full((5, 4, 3, 3), 255, np.uint8)
    assert "constant (1)" in str(coding_warning(ArrayDataset(opaque), PixelCoding()))


def test_latents_are_measured_as_they_are_drawn():
    rng = np.random.default_rng(0)
    mean = rng.normal([[[5.0]], [[-2.0]]], [[[3.0]], [[1.0]]], (50, 2, 8, 8))
    std = np.abs(rng.normal(1, 0.3, mean.shape))
    data = ArrayDataset(np.concatenate([mean, std], axis=1).astype(np.float32))
    drawn = mean + std * rng.normal(size=(40, *mean.shape))
    coding = measure_coding(data, latents=True)
    assert coding.mean == pytest.approx(drawn.mean((0, 1, 3, 4)), abs=0.02)
    assert coding.std == pytest.approx(drawn.std((0, 1, 3, 4)), rel=0.01)
    assert coding_warning(data, coding, latents=True) is None
    far = coding_warning(data, FloatCoding(mean=(0.0, 0.0), std=(1.0, 1.0)), latents=True)
    magnitude = float(str(far).split("magnitude ")[1].split()[0])
    assert magnitude == pytest.approx(0.5 * np.sqrt(np.square(drawn).mean()), rel=0.01)
    assert f"mean ({round(coding.mean[0], 4)}, " in str(far)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"std": (0.0,)}, "must be above 0"),
        ({"sigma_data": -1.0}, "must be above 0"),
        ({"mean": (float("nan"),)}, "must be finite"),
        ({"mean": ()}, "must be finite"),
        ({"mean": (0.0, 0.0), "std": (1.0, 1.0, 1.0)}, "mean has 2 channels and std 3"),
    ],
)
def test_errors_of_codings(arguments, message):
    with pytest.raises(ValueError, match=message):
        PixelCoding(**arguments)


def test_errors_of_use():
    with pytest.raises(ValueError, match=r"PixelCoding takes uint8 images, not torch\.float32"):
        PixelCoding().encode(ALL.float())
    with pytest.raises(ValueError, match=r"FloatCoding takes float images, not torch\.uint8"):
        FloatCoding().encode(ALL)
    with pytest.raises(ValueError, match="for 3 channels, the images have 1"):
        PixelCoding(mean=(0.0, 0.0, 0.0)).encode(ALL)
    with pytest.raises(ValueError, match="for 3 channels, the images have 2"):
        coding_warning(dataset(), PixelCoding(mean=(0.0, 0.0, 0.0)))
    with pytest.raises(ValueError, match=r"channel 0 of data set 'array' is constant"):
        measure_coding(ArrayDataset(np.full((3, 1, 2, 2), 7, np.uint8)))
    with pytest.raises(ValueError, match="sample 0 must be at least 1"):
        measure_coding(dataset(), sample=0)
