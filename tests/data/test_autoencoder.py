"""Pictures from latents, with a stand-in for the autoencoder; tests/integrations has diffusers' own."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edm2.data import LatentDecoder


class Spread:
    """Each latent becomes 2x2 pixels of its value, in three channels."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(out_channels=3, latent_channels=1)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.ones(1)}

    def decode(self, x: torch.Tensor) -> Any:
        self.batches.append(len(x))
        return SimpleNamespace(sample=x.repeat(1, 3, 1, 1).repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize(
    ("pixel_range", "value", "pixel"),
    [
        ("zero-one", 0.999, 254),  # 254.745 is truncated
        ("zero-one", 1.0, 255),
        ("zero-one", 1.2, 255),
        ("zero-one", -0.1, 0),
        ("zero-one", 0.5, 127),
        ("minus-one-one", 0.0, 127),
        ("minus-one-one", -1.5, 0),
        ("minus-one-one", 0.999, 254),
    ],
)
def test_pixels_are_clamped_and_truncated(pixel_range: Any, value: float, pixel: int) -> None:
    decoder = LatentDecoder(Spread(), pixel_range=pixel_range)
    pictures = decoder(torch.full((1, 1, 2, 3), value))
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (1, 3, 4, 6)
    assert pictures.unique().tolist() == [pixel]


def test_batches_of_its_own() -> None:
    spread = Spread()
    latents = torch.linspace(0, 1, 5).reshape(5, 1, 1, 1)
    pictures = LatentDecoder(spread, batch_size=2)(latents)
    assert spread.batches == [2, 2, 1]
    assert pictures[:, 0, 0, 0].tolist() == [0, 63, 127, 191, 255]


def test_identity_tells_ranges_apart() -> None:
    identities = [LatentDecoder(Spread(), pixel_range=r).identity() for r in ("zero-one", "minus-one-one")]
    assert identities[0] != identities[1]
    assert identities[0]["autoencoder"] == identities[1]["autoencoder"]


def test_errors() -> None:
    with pytest.raises(ValueError, match="pixel_range 'bytes' must be zero-one or minus-one-one"):
        LatentDecoder(Spread(), pixel_range="bytes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size 0 of the autoencoder must be at least 1"):
        LatentDecoder(Spread(), batch_size=0)
