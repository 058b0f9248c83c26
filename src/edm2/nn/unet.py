"""The U-Net: embedding, encoder, decoder, and the layout that all configurations share.

Ref: EDM2 Fig. 21-22, Table 6; SPEC section 2.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edm2.nn.blocks import Block
from edm2.nn.functional import mp_cat, mp_silu, mp_sum
from edm2.nn.layers import MPConv, MPFourier


class UNet(nn.Module):
    """Magnitude-preserving U-Net, config G.

    Args:
        img_resolution: side of square images, or (height, width). Every level but the last halves both.
        img_channels: channels of the noisy image and of the output.
        label_dim: number of classes, or length of the conditioning vector; 0 for an unconditional network.
        model_channels: base width.
        channel_mult: width of each level, in units of model_channels.
        channel_mult_noise: noise features, in units of model_channels; default: the first level's width.
        channel_mult_emb: width of the embedding, in units of model_channels; default: the widest level's.
        num_blocks: residual blocks a level in the encoder; the decoder has one more.
        attn_resolutions: resolutions (of the shorter side) with attention. Default: those of 16 and 8 that
            the levels have.
        label_balance: share of the label in the embedding, in [0, 1].
        concat_balance: share of the skip in a concatenation, in [0, 1].
        label_kind: `class` for one-hot labels, which are scaled to unit RMS; `vector` for float vectors,
            which should have unit RMS as they come.
        cond_channels: channels of an image given as a condition, appended to the input as it is.
        **block_kwargs: options of `Block`: channels_per_head, dropout, res_balance, attn_balance, clip_act.

    Raises:
        ValueError: for a resolution that cannot be halved often enough, an attention resolution that no
            level has, or a width that does not split into heads.
    """

    def __init__(
        self,
        img_resolution: int | Sequence[int],
        img_channels: int,
        label_dim: int,
        *,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] | None = None,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        label_kind: str = "class",
        cond_channels: int = 0,
        **block_kwargs: Any,
    ) -> None:
        super().__init__()
        levels = level_resolutions(img_resolution, len(channel_mult))
        with_attention = attention_levels(levels, attn_resolutions)
        if label_kind not in ("class", "vector"):
            raise ValueError(f"label_kind {label_kind!r} is not 'class' or 'vector'")
        widths = [model_channels * mult for mult in channel_mult]
        noise_channels = model_channels * channel_mult_noise if channel_mult_noise is not None else widths[0]
        emb_channels = model_channels * channel_mult_emb if channel_mult_emb is not None else max(widths)
        self.label_balance = label_balance
        self.concat_balance = concat_balance
        self.label_scale = math.sqrt(label_dim) if label_kind == "class" else 1.0

        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb_channels)
        self.emb_label = MPConv(label_dim, emb_channels) if label_dim else None
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        self.out_gain = nn.Parameter(torch.zeros([]))

        def block(cin: int, cout: int, **options: Any) -> Block:
            stream = sum(isinstance(m, Block) for part in (self.enc, self.dec) for m in part.values())
            return Block(cin, cout, emb_channels, dropout_stream=stream, **options, **block_kwargs)

        width = img_channels + cond_channels + 1  # one more channel, of ones
        skips = []
        for i, (name, out) in enumerate(zip(map(_name, levels), widths, strict=True)):
            if i == 0:
                self.enc[f"{name}_conv"] = MPConv(width, out, (3, 3))
                width = out
            else:
                self.enc[f"{name}_down"] = block(width, width, flavor="enc", resample_mode="down")
            skips.append(width)
            for j in range(num_blocks):
                self.enc[f"{name}_block{j}"] = block(width, out, flavor="enc", attention=with_attention[i])
                width = out
                skips.append(width)

        for i in reversed(range(len(levels))):
            name = _name(levels[i])
            if i == len(levels) - 1:
                self.dec[f"{name}_in0"] = block(width, width, flavor="dec", attention=True)
                self.dec[f"{name}_in1"] = block(width, width, flavor="dec")
            else:
                self.dec[f"{name}_up"] = block(width, width, flavor="dec", resample_mode="up")
            for j in range(num_blocks + 1):
                self.dec[f"{name}_block{j}"] = block(
                    width + skips.pop(), widths[i], flavor="dec", attention=with_attention[i]
                )
                width = widths[i]
        self.out_conv = MPConv(width, img_channels, (3, 3))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        dropout_index: Tensor | None = None,
        dropout_seed: int = 0,
    ) -> Tensor:
        """Apply the raw network F.

        Args:
            x: `[B, img_channels + cond_channels, H, W]`, of unit magnitude.
            c_noise: `[B]` noise level as the network sees it.
            labels: `[B, label_dim]` one-hot or vector, or None for a missing label.
            dropout_index: `[B]` int64; makes dropout a function of (dropout_seed, index). None: torch's own.
            dropout_seed: seed of the dropout masks.

        Returns:
            `[B, img_channels, H, W]` in x's dtype.
        """
        emb = self.emb_noise(self.emb_fourier(c_noise).to(x.dtype))
        if self.emb_label is not None:
            if labels is None:
                labels = emb.new_zeros(1, self.emb_label.weight.shape[1])
            emb = mp_sum(emb, self.emb_label(labels.to(x.dtype) * self.label_scale), self.label_balance)
        emb = mp_silu(emb)

        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb, dropout_index, dropout_seed) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop(), t=self.concat_balance)
            x = layer(x, emb, dropout_index, dropout_seed)
        return self.out_conv(x, gain=self.out_gain)  # type: ignore[no-any-return]


def level_resolutions(img_resolution: int | Sequence[int], num_levels: int) -> list[tuple[int, int]]:
    """(height, width) of each level, from the image's own down by halves.

    Raises:
        ValueError: if a side cannot be halved `num_levels - 1` times.
    """
    size = (img_resolution,) * 2 if isinstance(img_resolution, int) else tuple(img_resolution)
    factor = 2 ** (num_levels - 1)
    if num_levels < 1 or len(size) != 2 or any(side < factor or side % factor for side in size):
        raise ValueError(
            f"img_resolution {img_resolution} with {num_levels} levels in channel_mult: both sides must be "
            f"multiples of {factor}, since every level but the last halves them; use fewer levels or pad"
        )
    return [(size[0] >> i, size[1] >> i) for i in range(num_levels)]


def attention_levels(levels: list[tuple[int, int]], attn_resolutions: Sequence[int] | None) -> list[bool]:
    """Whether each level has attention.

    Raises:
        ValueError: if a wanted resolution is the shorter side of no level.
    """
    sides = [min(level) for level in levels]
    if attn_resolutions is None:
        return [side in (16, 8) for side in sides]
    missing = [r for r in attn_resolutions if r not in sides]
    if missing:
        raise ValueError(
            f"attn_resolutions {tuple(attn_resolutions)}: no level has resolution {missing[0]}; "
            f"the levels have {', '.join(map(str, sides))}"
        )
    return [side in attn_resolutions for side in sides]


def _name(level: tuple[int, int]) -> str:
    return f"{level[0]}x{level[1]}"
