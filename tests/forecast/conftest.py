"""A model that needs no training: the exact denoiser of the closed-form case."""

import pytest
from torch import Tensor, nn

from edm2.data import FloatCoding
from edm2.diffusion import Denoiser
from edm2.forecast import Torus
from edm2.generate import ImageGenerator
from edm2.train.coding import Coding


class ExactDenoiser(Denoiser):
    """The expected next frame given two frames and a noisy next frame; its posterior is Gaussian in each wave."""

    def __init__(self, torus: Torus) -> None:
        network = nn.Linear(1, 1)
        network.cond_channels = 2
        super().__init__(network, img_resolution=torus.side, img_channels=1, label_dim=0)
        self.torus, self.options = torus, {"exact": repr(torus)}

    def forward(self, x, sigma, labels=None, return_logvar=False, *, condition=None, **_) -> Tensor:  # type: ignore[no-untyped-def]
        return 0.5 * self.torus.denoise(2 * x.float(), 2 * float(sigma), condition)


@pytest.fixture(scope="session")
def exact() -> ImageGenerator:
    """The generator of the default torus, in units in which the field has variance 1."""
    values = FloatCoding(mean=(0.0,), std=(1.0,), sigma_data=0.5)
    coding = Coding(kind="floats", values=values, num_channels=1)
    return ImageGenerator(ExactDenoiser(Torus()).eval(), coding)
