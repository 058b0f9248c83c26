"""The U-Net: embedding, encoder, decoder, and the layout that all configurations share.

Ref: EDM2 Fig. 16-22, Table 6; SPEC section 2, LADDER section 2.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edm2.nn.blocks import Block
from edm2.nn.configs import get_features
from edm2.nn.group_norm_block import GroupNormBlock
from edm2.nn.plain_layers import Positional


class UNet(nn.Module):
    """The U-Net of any configuration of the paper; G, the default, preserves magnitudes throughout.

    Args:
        img_resolution: side of square images, or (height, width). Every level but the last halves both.
        img_channels: channels of the noisy image and of the output.
        label_dim: number of classes, or length of the conditioning vector; 0 for an unconditional network.
        config: `A` to `G`, see `edm2.nn.configs`.
        model_channels: base width.
        channel_mult: width of each level, in units of model_channels.
        channel_mult_noise: noise features, in units of model_channels; default: the first level's width.
        channel_mult_emb: width of the embedding, in units of model_channels; default: the widest level's.
        num_blocks: residual blocks a level in the encoder; the decoder has one more.
        channels_per_head: width of an attention head.
        label_kind: `class` for one-hot labels; `vector` for float vectors, which should have unit RMS as they
            come.
        cond_channels: channels of an image given as a condition, appended to the input as it is.
        augment_dim: length of the labels that say how an image was augmented, see `edm2.data.Augmentation`; 0 for a
            network without them. An image that was not augmented has the label zero, which changes nothing: the
            network then computes exactly what it would without.
        **options: options of the configuration, described in `edm2.nn.configs.Features`: dropout,
            attn_resolutions, clip_act, res_balance and so on.

    Attributes:
        features: what the configuration is made of, with its options.

    Its own state does not name the configuration, and C, D and E have the same tensors: load states through
    `edm2.diffusion.Denoiser`, which refuses that of another one.

    Raises:
        ValueError: for an unknown configuration, an option that it does not have, a resolution that cannot be
            halved often enough, an attention resolution that no level has, or a width that does not split into
            heads.
    """

    def __init__(
        self,
        img_resolution: int | Sequence[int],
        img_channels: int,
        label_dim: int,
        *,
        config: str = "G",
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        channels_per_head: int = 64,
        label_kind: str = "class",
        cond_channels: int = 0,
        augment_dim: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        f = self.features = get_features(config, **options)
        levels = level_resolutions(img_resolution, len(channel_mult))
        with_attention = attention_levels(levels, options.get("attn_resolutions"), f.attn_resolutions)
        if label_kind not in ("class", "vector"):
            raise ValueError(f"label_kind {label_kind!r} is not 'class' or 'vector'")
        if augment_dim < 0:
            raise ValueError(f"augment_dim {augment_dim} must be 0, for none, or more")
        widths = [model_channels * mult for mult in channel_mult]
        noise_channels = model_channels * channel_mult_noise if channel_mult_noise is not None else widths[0]
        emb_channels = model_channels * channel_mult_emb if channel_mult_emb is not None else max(widths)
        # One-hot labels have norm 1, vectors RMS 1. The label layer is made for norm 1 in A and B, later for RMS 1.
        unit = math.sqrt(label_dim) if label_kind == "class" else 1.0
        self.label_scale = unit if f.unit_labels else unit / math.sqrt(max(label_dim, 1))

        self.label_dim = label_dim
        self.emb_fourier = (
            Positional(noise_channels) if f.positional else f.fixed_functions.fourier(noise_channels)
        )
        self.emb_noise = f.conv(noise_channels, emb_channels)
        self.emb_noise1 = f.conv(emb_channels, emb_channels) if f.embedding_layers == 2 else None
        self.emb_label = f.label_layer(label_dim, emb_channels) if label_dim else None
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        self.out_gain = nn.Parameter(torch.zeros([])) if f.gains else None
        streams = itertools.count()

        def block(cin: int, cout: int, flavor: Literal["enc", "dec"], **kwargs: Any) -> nn.Module:
            kwargs |= dict(channels_per_head=channels_per_head, dropout_stream=next(streams))
            if f.group_norm is not None:
                return GroupNormBlock(cin, cout, emb_channels, f, **kwargs)
            return Block(cin, cout, emb_channels, f, flavor=flavor, **kwargs)

        width = img_channels + cond_channels + f.constant_channel
        skips = []
        for i, (name, out) in enumerate(zip(map(_name, levels), widths, strict=True)):
            if i == 0:
                self.enc[f"{name}_conv"] = f.conv(width, out, (3, 3))
                width = out
            else:
                self.enc[f"{name}_down"] = block(width, width, "enc", resample_mode="down")
            skips.append(width)
            for j in range(num_blocks):
                self.enc[f"{name}_block{j}"] = block(width, out, "enc", attention=with_attention[i])
                width = out
                skips.append(width)

        for i in reversed(range(len(levels))):
            name = _name(levels[i])
            if i == len(levels) - 1:
                middle: Literal["enc", "dec"] = "enc" if f.middle_pixel_norm else "dec"
                self.dec[f"{name}_in0"] = block(width, width, middle, attention=True)
                self.dec[f"{name}_in1"] = block(width, width, middle)
            else:
                self.dec[f"{name}_up"] = block(width, width, "dec", resample_mode="up")
            for j in range(num_blocks + 1):
                self.dec[f"{name}_block{j}"] = block(
                    width + skips.pop(), widths[i], "dec", attention=with_attention[i]
                )
                width = widths[i]
        self.out_norm = None if f.group_norm is None else f.norm(width)
        self.out_conv = f.conv(width, img_channels, (3, 3), ends_branch=True)
        # Made last, so that the other weights start as they do without it.
        self.augment_dim = augment_dim
        self.emb_augment = f.augment_layer(augment_dim, emb_channels) if augment_dim else None

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        dropout_index: Tensor | None = None,
        dropout_seed: int = 0,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Apply the raw network F.

        Args:
            x: `[B, img_channels + cond_channels, H, W]`, of unit magnitude.
            c_noise: `[B]` noise level as the network sees it.
            labels: `[B, label_dim]` one-hot or vector, or None for a missing label.
            dropout_index: `[B]` int64; makes dropout a function of (dropout_seed, index). None: torch's own.
            dropout_seed: seed of the dropout masks.
            augment_labels: `[B, augment_dim]`, or None where nothing was augmented.

        Returns:
            `[B, img_channels, H, W]` in x's dtype.
        """
        f = self.features
        dtype = torch.float32 if f.fp32_embedding else x.dtype
        emb = self.embed(c_noise, labels, dtype, augment_labels)
        if f.constant_channel:
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("_conv") else layer(x, emb, dropout_index, dropout_seed)
            skips.append(x)
        for name, layer in self.dec.items():
            if "block" in name:
                x = f.fixed_functions.cat(x, skips.pop(), f.concat_balance)
            x = layer(x, emb, dropout_index, dropout_seed)
        if self.out_norm is not None:
            x = f.fixed_functions.silu(self.out_norm(x))
        out: Tensor = self.out_conv(x) if self.out_gain is None else self.out_conv(x, gain=self.out_gain)
        return out

    def embed(
        self,
        c_noise: Tensor,
        labels: Tensor | None,
        dtype: torch.dtype,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Noise level and labels as the vector that conditions every block, `[B, E]` in `dtype`."""
        f, fixed = self.features, self.features.fixed_functions
        emb: Tensor = self.emb_noise(self.emb_fourier(c_noise).to(dtype))
        if self.emb_noise1 is not None:
            emb = self.emb_noise1(fixed.silu(emb))
        if self.emb_label is not None:
            if labels is None:
                labels = emb.new_zeros(1, self.label_dim)
            emb = fixed.add(emb, self.emb_label(labels.to(dtype) * self.label_scale), f.label_balance)
        if self.emb_augment is not None and augment_labels is not None:
            # Scaled as one-hot labels are: an entry of 1 weighs as much as the noise level.
            added = self.emb_augment((augment_labels * math.sqrt(self.augment_dim)).to(dtype))
            emb = fixed.add_known(emb, added, torch.linalg.vector_norm(augment_labels, dim=1, keepdim=True))
        return fixed.silu(emb)


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


def attention_levels(
    levels: list[tuple[int, int]], attn_resolutions: Sequence[int] | None, default: Sequence[int]
) -> list[bool]:
    """Whether each level has attention.

    Args:
        levels: (height, width) of each level.
        attn_resolutions: shorter sides of the levels that the user wants to have attention; None: those of
            `default` that occur.
        default: resolutions that need not all occur.

    Raises:
        ValueError: if a wanted resolution is the shorter side of no level.
    """
    sides = [min(level) for level in levels]
    if attn_resolutions is None:
        return [side in default for side in sides]
    missing = [r for r in attn_resolutions if r not in sides]
    if missing:
        raise ValueError(
            f"attn_resolutions {tuple(attn_resolutions)}: no level has resolution {missing[0]}; "
            f"the levels have {', '.join(map(str, sides))}"
        )
    return [side in attn_resolutions for side in sides]


def _name(level: tuple[int, int]) -> str:
    return f"{level[0]}x{level[1]}"
