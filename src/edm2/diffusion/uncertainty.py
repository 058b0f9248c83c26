"""The learned uncertainty u(sigma) that balances the noise levels in the loss."""

from typing import Any

from torch import Tensor, nn

from edm2.nn import CONFIGS


class LearnedUncertainty(nn.Module):
    """u(sigma), the log of the expected weighted squared error: Fourier features of the noise level, then a linear map.

    It is trained together with the denoiser by `edm2_loss`, or by any loss of the form `error / exp(u) + u`.

    Args:
        num_channels: Number of Fourier features. The released networks have 128; the paper gives none for B to F.
        config: Configuration whose layers it is made of, `B` to `G`.

    Ref: EDM2 Eq. 14-17, App. B.2.
    """

    def __init__(self, num_channels: int = 128, *, config: str = "G") -> None:
        super().__init__()
        self.fourier: nn.Module = CONFIGS[config].fixed_functions.fourier(num_channels)
        self.linear: nn.Module = CONFIGS[config].conv(num_channels, 1)

    def forward(self, sigma: Tensor) -> Tensor:
        """Noise levels with B elements -> u, `[B, 1, 1, 1]` float32."""
        u: Any = self.linear(self.fourier(sigma.float().flatten().log() / 4))
        return u.reshape(-1, 1, 1, 1)  # type: ignore[no-any-return]
