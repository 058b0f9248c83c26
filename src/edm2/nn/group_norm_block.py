"""The blocks of configs A to E, which rely on group norms to keep magnitudes in check.

Ref: EDM2 Fig. 16-20, App. B.1-B.5.
"""

from typing import Literal

from torch import Tensor, nn

from edm2.nn.attention import attend
from edm2.nn.blocks import clip, head_count
from edm2.nn.configs import Features
from edm2.nn.functional import resample
from edm2.nn.keyed_random import drop


class GroupNormBlock(nn.Module):
    """One residual block of config A to E, the same in encoder and decoder.

    Unlike in `Block`, the residual branch normalises its input and its middle, nothing normalises the main path, and
    both are resampled. Arguments as in `Block`, without `flavor`.

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
        resample_mode: Literal["keep", "up", "down"] = "keep",
        attention: bool = False,
        channels_per_head: int = 64,
        dropout_stream: int = 0,
    ) -> None:
        super().__init__()
        conv = features.conv
        self.features = features
        self.resample_mode = resample_mode
        self.num_heads = head_count(out_channels, channels_per_head) if attention else 0
        self.dropout_stream = dropout_stream
        self.norm0 = features.norm(in_channels)
        self.conv_res0 = conv(in_channels, out_channels, (3, 3))
        self.norm1 = features.norm(out_channels)
        self.emb_linear = conv(emb_channels, (2 if features.shift else 1) * out_channels)
        self.conv_res1 = conv(out_channels, out_channels, (3, 3), ends_branch=True)
        self.conv_skip = conv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_norm = features.norm(out_channels) if attention and not features.cosine_attention else None
        self.attn_qkv = conv(out_channels, 3 * out_channels, (1, 1)) if attention else None
        self.attn_proj = conv(out_channels, out_channels, (1, 1), ends_branch=True) if attention else None

    def forward(
        self, x: Tensor, emb: Tensor, dropout_index: Tensor | None = None, dropout_seed: int = 0
    ) -> Tensor:
        """`[B, in, H, W]`, `[B, E]` -> `[B, out, H', W']`; the last two as in `UNet.forward`."""
        f, silu = self.features, self.features.fixed_functions.silu
        y = resample(silu(self.norm0(x)), self.resample_mode)
        y = self.norm1(self.conv_res0(y))
        condition = self.emb_linear(emb).to(y.dtype)[:, :, None, None]
        if f.shift:
            scale, shift = condition.chunk(2, dim=1)
            y = y * (1 + scale) + shift
        else:
            y = y * (1 + condition)
        y = silu(y)
        if self.training:
            y = drop(y, f.dropout, dropout_index, seed=dropout_seed, stream=self.dropout_stream)
        y = self.conv_res1(y)

        x = resample(x, self.resample_mode)
        if self.conv_skip is not None:
            x = self.conv_skip(x)
        x = x + y
        if self.attn_qkv is not None:
            x = x + self.attention_branch(x)
        return clip(x, f.clip_act)

    def attention_branch(self, x: Tensor) -> Tensor:
        """Attention of the configuration, `[B, C, H, W]` -> same."""
        assert self.attn_qkv is not None
        assert self.attn_proj is not None
        f = self.features
        return attend(
            x if self.attn_norm is None else self.attn_norm(x),
            self.attn_qkv,
            self.attn_proj,
            num_heads=self.num_heads,
            normalize=f.normalize if f.cosine_attention else None,
            fp32_logits=f.partial_float16,
        )
