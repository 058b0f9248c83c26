"""What the network is given is what the configuration says, and can be turned back."""

import numpy as np
import pytest
import torch
from tiny_run import tiny_config, tiny_data

from edm2.data import ArrayDataset
from edm2.train import DataConfig
from edm2.train.coding import Coding, make_coding

_LATENTS = DataConfig(coding="latents", mean=(5.0, -1.0), std=(4.0, 2.0))


def latents(mean: float, std: float, count: int = 3) -> ArrayDataset:
    shape = (count, 2, 4, 4)
    both = np.concatenate([np.full(shape, mean), np.full(shape, std)], axis=1)
    return ArrayDataset(both.astype(np.float32), name="latents")


def stored(data: ArrayDataset) -> torch.Tensor:
    return torch.from_numpy(data.images(np.arange(len(data))))


def test_measured_pixels_have_the_wanted_magnitude() -> None:
    data = tiny_data(500)
    coded = make_coding(tiny_config(), data).encode(stored(data), torch.arange(500), seed=0)
    assert coded.dtype == torch.float32
    assert float(coded.mean()) == pytest.approx(0, abs=1e-4)
    assert float(coded.std()) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*far from sigma_data")
def test_latents_without_spread_are_coded_exactly() -> None:
    data = latents(9.0, 0.0)
    coding = make_coding(tiny_config(dataset=_LATENTS), data)
    coded = coding.encode(stored(data), torch.arange(3), seed=0)
    assert coding.num_channels == 2
    # (9 - 5) / 4 * 0.5 and (9 + 1) / 2 * 0.5
    assert torch.equal(coded[:, 0], torch.full((3, 4, 4), 0.5))
    assert torch.equal(coded[:, 1], torch.full((3, 4, 4), 2.5))
    assert torch.allclose(coding.decode(coded), torch.full((3, 2, 4, 4), 9.0))


@pytest.mark.filterwarnings("ignore:.*far from sigma_data")
def test_latents_are_drawn_by_position_and_seed() -> None:
    data = latents(5.0, 4.0, 4000)
    coding = make_coding(tiny_config(dataset=_LATENTS), data)
    draw = coding.encode(stored(data), torch.arange(4000), seed=0)
    assert float(draw[:, 0].mean()) == pytest.approx(0.0, abs=0.01)
    assert float(draw[:, 0].std()) == pytest.approx(0.5, abs=0.01)
    part = coding.encode(stored(data)[7:9], torch.tensor([7, 8]), seed=0)
    assert torch.equal(part, draw[7:9])
    assert not torch.equal(draw, coding.encode(stored(data), torch.arange(4000), seed=1))
    assert not torch.equal(draw[0], draw[1])


@pytest.mark.parametrize("data", [tiny_data(), latents(0.0, 1.0)], ids=["pixels", "latents"])
def test_json_and_back(data: ArrayDataset) -> None:
    options = _LATENTS if data.name == "latents" else DataConfig()
    coding = make_coding(tiny_config(dataset=options), data)
    assert Coding.from_json(coding.to_json()) == coding


@pytest.mark.parametrize(
    "data", [tiny_data(), ArrayDataset(np.zeros((2, 3, 4, 4), np.float32), name="odd")], ids=["bytes", "odd"]
)
def test_latents_need_means_and_deviations(data: ArrayDataset) -> None:
    with pytest.raises(ValueError, match="needs float images with an even number of channels"):
        make_coding(tiny_config(dataset=_LATENTS), data)


def test_latents_far_from_sigma_data_are_told() -> None:
    with pytest.warns(UserWarning, match="far from sigma_data 0.5: .* leave such channels out"):
        make_coding(tiny_config(dataset=_LATENTS), latents(9.0, 0.0))
    spread = np.random.default_rng(0).normal(5, 40, (50, 2, 4, 4))
    wide = ArrayDataset(np.concatenate([spread, np.full_like(spread, 3)], axis=1).astype(np.float32))
    with pytest.warns(
        UserWarning, match=r"magnitude .* far from sigma_data 0.5: code it with mean .* and std"
    ):
        make_coding(tiny_config(dataset=_LATENTS), wide)


def test_fixed_coding_that_does_not_fit_is_told() -> None:
    with pytest.warns(UserWarning, match="far from sigma_data 0.5: code it with mean"):
        make_coding(tiny_config(dataset=DataConfig(coding="fixed", mean=(0.0,), std=(5.0,))), tiny_data())
