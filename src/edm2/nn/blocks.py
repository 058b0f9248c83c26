"""The encoder and decoder blocks of configs F and G, and functions that they share with those of A to E.

Ref: EDM2 Fig. 21-22, App. B.6-B.7.

Shapes: B batch, C channels, H x W resolution, E width of the embedding.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from edm2.nn import fast
from edm2.nn.attention import attend
from edm2.nn.configs import Features
from edm2.nn.functional import resample
from edm2.nn.keyed_random import drop


class Block(nn.Module):
    """One residual block of config F or G, with optional resampling before it and attention after it.

    Args:
        in_channels: Width of the input (after concatenation with a skip, in the decoder).
        out_channels: Width of the output.
        emb_channels: Width E of the conditioning vector.
        features: Features of the configuration.
        flavor: `enc` or `dec`; they differ in where the width changes and in the pixel norm.
        resample_mode: `keep`, `up` or `down`, applied to the input.
        attention: Whether self-attention follows the residual branch.
        channels_per_head: Width of an attention head.
        dropout_stream: Number that distinguishes this block's dropout masks from those of other blocks.

    Raises:
        ValueError: If the width does not split into attention heads.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        features: Features,
        *,
        flavor: Literal["enc", "dec"],
        resample_mode: Literal["keep", "up", "down"] = "keep",
        attention: bool = False,
        channels_per_head: int = 64,
        dropout_stream: int = 0,
    ) -> None:
        super().__init__()
        conv = features.conv
        self.features = features
        self.flavor = flavor
        self.resample_mode = resample_mode
        self.num_heads = head_count(out_channels, channels_per_head) if attention else 0
        self.dropout_stream = dropout_stream
        self.emb_gain = Parameter(torch.zeros([])) if features.gains else None
        self.conv_res0 = conv(out_channels if flavor == "enc" else in_channels, out_channels, (3, 3))
        self.emb_linear = conv(emb_channels, out_channels)
        self.conv_res1 = conv(out_channels, out_channels, (3, 3))
        self.conv_skip = conv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = conv(out_channels, 3 * out_channels, (1, 1)) if attention else None
        self.attn_proj = conv(out_channels, out_channels, (1, 1)) if attention else None

    def forward(
        self, x: Tensor, emb: Tensor, dropout_index: Tensor | None = None, dropout_seed: int = 0
    ) -> Tensor:
        """`[B, in, H, W]`, `[B, E]` -> `[B, out, H', W']`; the last two as in `UNet.forward`."""
        if fast.applies(self):
            return fast.block_forward(self, x, emb, dropout_index, dropout_seed)
        f, fixed = self.features, self.features.fixed_functions
        x = resample(x, self.resample_mode)
        if self.flavor == "enc":
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            x = f.normalize(x, 1)

        y = self.conv_res0(fixed.silu(x))
        scale = self.emb_linear(emb, gain=1.0 if self.emb_gain is None else self.emb_gain)
        y = fixed.silu(y * (1 + scale)[:, :, None, None])
        if self.training:
            y = drop(y, f.dropout, dropout_index, seed=dropout_seed, stream=self.dropout_stream)
        y = self.conv_res1(y)

        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = fixed.add(x, y, f.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            y = attend(x, self.attn_qkv, self.attn_proj, num_heads=self.num_heads, normalize=f.normalize)
            x = fixed.add(x, y, f.attn_balance)
        return clip(x, f.clip_act)


def head_count(channels: int, channels_per_head: int) -> int:
    """Number of attention heads.

    Raises:
        ValueError: If the channels do not split into heads.
    """
    heads, rest = divmod(channels, channels_per_head)
    if heads == 0 or rest:
        fitting = next(n for n in range(min(channels, channels_per_head), 0, -1) if channels % n == 0)
        raise ValueError(
            f"channels_per_head {channels_per_head} does not divide the {channels} channels of a block with attention: "
            f"choose a divisor, such as {fitting}"
        )
    return heads


def clip(x: Tensor, bound: float) -> Tensor:
    """Clamp to +-bound, a safeguard for float16."""
    # Differs from `clamp` only in the gradient at the bound itself; its backward takes one pass instead of several.
    return x if bound == math.inf else F.hardtanh(x, -bound, bound)
