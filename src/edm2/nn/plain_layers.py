"""Layers from before magnitudes were preserved: plain weights, group norms, positional features.

Configs A to C are made of them, D and E keep the RMS group norm, and F has none left.

Ref: EDM2 App. B.1-B.3; LADDER sections 3 and 5.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm2.nn.functional import rms
from edm2.nn.layers import apply_weight, check_kernel

MAX_GROUPS = 32
EPS = 1e-4


class PlainConv(nn.Module):
    """Convolution or linear map with a free weight; zero padding keeps the size.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: as in `edm2.nn.MPConv`.
        bias: whether a bias is added.
        init_bound: weight and bias start uniform in +-init_bound / sqrt(fan_in); 0 makes them zero.

    Raises:
        ValueError: for a kernel of another form.

    Ref: EDM2 App. B.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int] = (),
        *,
        bias: bool = False,
        init_bound: float = 1.0,
    ) -> None:
        super().__init__()
        check_kernel(kernel)
        bound = init_bound / math.sqrt(in_channels * math.prod(kernel))
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound)) if bias else None

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
        num_channels: channels of the input.
        channels_per_group: as in `group_count`.

    Ref: EDM2 App. B.1.
    """

    def __init__(self, num_channels: int, channels_per_group: int | None = None) -> None:
        super().__init__()
        self.num_groups = group_count(num_channels, channels_per_group)
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> same shape and dtype."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.num_groups, weight, bias, eps=1e-5)


class RMSGroupNorm(nn.Module):
    """Group norm of configs C to E: unit RMS per group; no mean is subtracted, nothing is learned.

    Args:
        num_channels: channels of the input.
        channels_per_group: as in `group_count`.
        eps_inside_root: where eps stands: as in `rms_norm` if true, else as in `normalize`.

    Ref: EDM2 Sec. 2.1, Eq. 29.
    """

    def __init__(
        self, num_channels: int, channels_per_group: int | None = None, *, eps_inside_root: bool = True
    ) -> None:
        super().__init__()
        self.num_groups = group_count(num_channels, channels_per_group)
        self.eps_inside_root = eps_inside_root

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> same shape and dtype."""
        # Channel by channel first: whole groups of channels-last images are several times slower to sum and scale.
        channels = rms(x, (2, 3)).unflatten(1, (self.num_groups, -1))
        size = rms(channels, 2)
        size = (size.square() + EPS).sqrt() if self.eps_inside_root else size + EPS
        return x * size.reciprocal().to(x.dtype).expand_as(channels).flatten(1, 2)


class Positional(nn.Module):
    """Features of the noise level in configs A and B: cosines, then sines, of 1 to 1/10000 radians per unit.

    Args:
        num_channels: number of features, even.

    Raises:
        ValueError: for an odd number.

    Ref: EDM2 Fig. 16; LADDER section 3.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        if num_channels % 2:
            raise ValueError(f"positional features come in pairs: {num_channels} must be even")
        self.num_channels = num_channels

    def forward(self, x: Tensor) -> Tensor:
        """`[B]` -> `[B, num_channels]`, computed in float32, returned in x's dtype."""
        half = self.num_channels // 2
        freqs = 10000.0 ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = torch.outer(x.float(), freqs)
        return torch.cat([angle.cos(), angle.sin()], dim=1).to(x.dtype)


def group_count(num_channels: int, channels_per_group: int | None = None) -> int:
    """Number of groups that a group norm splits its channels into.

    Args:
        num_channels: channels of the input.
        channels_per_group: size of a group. None: min(32, C/4) groups, or the next lower number that divides
            the channels; from a base width of 128 on, the paper's widths have 32.

    Raises:
        ValueError: if `channels_per_group` does not divide the channels.
    """
    if channels_per_group is not None:
        if num_channels % channels_per_group:
            raise ValueError(
                f"channels_per_group={channels_per_group} does not divide the {num_channels} channels of a group "
                "norm; choose a divisor of model_channels"
            )
        return num_channels // channels_per_group
    most = max(min(MAX_GROUPS, num_channels // 4), 1)
    return next(n for n in range(most, 0, -1) if num_channels % n == 0)
