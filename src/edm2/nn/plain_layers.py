"""Layers that do not preserve magnitudes: plain weights, group norms, positional features.

Configs A to C are made of them; D and E keep the RMS group norm, F none.

Ref: EDM2 App. B.1-B.3.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm2.nn.functional import rms
from edm2.nn.layers import apply_weight, uniform

MAX_GROUPS = 32
EPS = 1e-4


class PlainConv(nn.Module):
    """Convolution or linear map with a free weight; zero padding keeps the size.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: As in `edm2.nn.MPConv`.
        bias: Whether a bias is added.
        zero_init: Whether weight and bias start at zero; otherwise uniform in +-1 / sqrt(fan_in).

    Ref: EDM2 App. B.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int] = (),
        *,
        bias: bool = False,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        bound = 0.0 if zero_init else 1 / math.sqrt(in_channels * math.prod(kernel))
        self.weight = nn.Parameter(uniform(out_channels, in_channels, *kernel, low=-bound, high=bound))
        self.bias = nn.Parameter(uniform(out_channels, low=-bound, high=bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, ...]` -> `[B, out_channels, ...]` in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return apply_weight(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        """Shape of the weight, for `print(model)`."""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, kernel={tuple(self.weight.shape[2:])}"


class GroupNorm(nn.Module):
    """Group norm of configs A and B: zero mean and unit variance per group, then a scale and shift per channel.

    Args:
        num_channels: Channels of the input.

    Ref: EDM2 App. B.1.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_groups = group_count(num_channels)
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> same shape and dtype."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.num_groups, weight, bias, eps=1e-5)


class RMSGroupNorm(nn.Module):
    """Group norm of configs C to E: unit RMS per group; no mean is subtracted, nothing is learned.

    Args:
        num_channels: Channels of the input.

    Ref: EDM2 Sec. 2.1, Eq. 29.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_groups = group_count(num_channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> same shape and dtype."""
        # Channel by channel first: summing and scaling whole groups of channels-last images is several times slower.
        channels = rms(x, (2, 3)).unflatten(1, (self.num_groups, -1))
        size = (rms(channels, 2).square() + EPS).sqrt()
        return x * size.reciprocal().to(x.dtype).expand_as(channels).flatten(1, 2)


class Positional(nn.Module):
    """Features of the noise level in configs A and B: cosines, then sines, of 1 to 1/10000 radians per unit.

    Args:
        num_channels: Number of features, even.

    Raises:
        ValueError: If the number is odd.

    Ref: EDM2 Fig. 16.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        if num_channels % 2:
            raise ValueError(
                f"positional features come in pairs, and {num_channels} is odd: choose an even model_channels"
            )
        self.num_channels = num_channels

    def forward(self, x: Tensor) -> Tensor:
        """`[B]` -> `[B, num_channels]`, computed in float32, returned in x's dtype."""
        half = self.num_channels // 2
        freqs = 10000.0 ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = torch.outer(x.float(), freqs)
        return torch.cat([angle.cos(), angle.sin()], dim=1).to(x.dtype)


def group_count(num_channels: int) -> int:
    """Number of groups of a group norm: min(32, C / 4), or the next lower number that divides the channels.

    The paper's widths have 32 groups from a base width of 128 on.
    """
    most = max(min(MAX_GROUPS, num_channels // 4), 1)
    return next(n for n in range(most, 0, -1) if num_channels % n == 0)
