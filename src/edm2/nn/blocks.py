"""The encoder and decoder blocks of the network, and their attention.

Ref: EDM2 Fig. 21-22 (config G), App. B.6-B.7; SPEC section 2.

Shapes: B batch, C channels, H x W resolution, E width of the embedding.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from edm2.nn.functional import mp_silu, mp_sum, normalize, resample
from edm2.nn.keyed_random import keyed_dropout
from edm2.nn.layers import MPConv


class Block(nn.Module):
    """One residual block of config G, with optional resampling before it and attention after it.

    Args:
        in_channels: width of the input (after concatenation with a skip, in the decoder).
        out_channels: width of the output.
        emb_channels: width E of the conditioning vector.
        flavor: `enc` or `dec`; they differ in where the width changes and in the pixel norm.
        resample_mode: `keep`, `up` or `down`, applied to the input.
        attention: whether self-attention follows the residual branch.
        channels_per_head: width of an attention head.
        dropout: probability, in [0, 1).
        res_balance: share of the residual branch, in [0, 1].
        attn_balance: share of the attention branch, in [0, 1].
        clip_act: bound on the output's absolute value, a safeguard for float16; None for no bound.
        dropout_stream: number that tells this block's dropout masks from other blocks'.

    Raises:
        ValueError: if the width cannot be split into attention heads.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        flavor: Literal["enc", "dec"],
        resample_mode: Literal["keep", "up", "down"] = "keep",
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
        dropout_stream: int = 0,
    ) -> None:
        super().__init__()
        self.flavor = flavor
        self.resample_mode = resample_mode
        self.num_heads = out_channels // channels_per_head if attention else 0
        self.dropout = dropout
        self.res_balance = res_balance
        self.attn_balance = attn_balance
        self.clip_act = clip_act
        self.dropout_stream = dropout_stream
        if attention and (self.num_heads == 0 or out_channels % self.num_heads):
            raise ValueError(
                f"channels_per_head={channels_per_head} does not divide the {out_channels} channels of a "
                "block with attention; choose a divisor of model_channels"
            )
        self.emb_gain = Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, (3, 3))
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, (1, 1)) if attention else None
        self.attn_proj = MPConv(out_channels, out_channels, (1, 1)) if attention else None

    def forward(
        self, x: Tensor, emb: Tensor, dropout_index: Tensor | None = None, dropout_seed: int = 0
    ) -> Tensor:
        """`[B, in, H, W]`, `[B, E]` -> `[B, out, H', W']`; the last two as in `UNet.forward`."""
        x = resample(x, self.resample_mode)
        if self.flavor == "enc":
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            x = normalize(x, dim=1)

        y = self.conv_res0(mp_silu(x))
        y = mp_silu(y * (1 + self.emb_linear(emb, gain=self.emb_gain))[:, :, None, None])
        if self.training and self.dropout > 0:
            if dropout_index is None:
                y = F.dropout(y, self.dropout)
            else:
                y = keyed_dropout(
                    y, self.dropout, dropout_index, seed=dropout_seed, stream=self.dropout_stream
                )
        y = self.conv_res1(y)

        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.num_heads:
            x = mp_sum(x, self.attend(x), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def attend(self, x: Tensor) -> Tensor:
        """Cosine self-attention over the pixels, `[B, C, H, W]` -> same.

        Queries, keys and values are normalised over a head's channels; the q/k/v index is the fastest part
        of the channel axis, so that released weights load.

        Ref: EDM2 Sec. 2.1, App. B.3.
        """
        assert self.attn_qkv is not None
        assert self.attn_proj is not None
        batch, channels, height, width = x.shape
        y = self.attn_qkv(x).reshape(batch, self.num_heads, channels // self.num_heads, 3, height * width)
        # [B, heads, pixels, channels per head] each
        q, k, v = normalize(y, dim=2).permute(3, 0, 1, 4, 2).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(q.shape[-1]))
        y = y.transpose(2, 3).reshape(batch, channels, height, width)
        return self.attn_proj(y)  # type: ignore[no-any-return]
