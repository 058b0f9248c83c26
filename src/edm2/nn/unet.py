"""The U-Net: embedding, encoder, decoder, and the layout that all configurations share.

Ref: EDM2 Fig. 16-22, Table 6.
"""

import itertools
import math
from collections.abc import Callable, Sequence
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
        img_resolution: Side of square images, or (height, width). Every level but the last halves both.
        img_channels: Channels of the noisy image and of the output.
        label_dim: Number of classes, or length of the conditioning vector; 0 for an unconditional network.
        config: `A` to `G`, see `edm2.nn.configs`.
        model_channels: Base width.
        channel_mult: Width of each level, in units of model_channels.
        channel_mult_noise: Noise features, in units of model_channels. None: the first level's width.
        channel_mult_emb: Width of the embedding, in units of model_channels. None: the widest level's.
        num_blocks: Residual blocks per level of the encoder; the decoder has one more.
        channels_per_head: Width of an attention head.
        label_kind: `class` for one-hot labels; `vector` for float vectors, which should have unit RMS.
        cond_channels: Channels of an image given as a condition, appended to the input as it is.
        augment_dim: Length of the labels that describe an image's augmentation, see `edm2.data.Augmentation`; 0 for
            none. A label of zeros has no effect.
        dropout: Dropout probability. None, here and below: the configuration's own, see `edm2.nn.configs.Features`.
        attn_resolutions: Resolutions (of the shorter side) with attention.
        clip_act: Bound on a block's output; inf for none.
        res_balance: Share of the residual branch in a sum, for config G.
        attn_balance: Share of the attention branch in a sum, for config G.
        label_balance: Share of the label in the embedding, for config G.
        concat_balance: Share of the skip in a concatenation, for config G.

    Attributes:
        features: What the configuration is made of, with its options.

    The state of every config but G names it in the buffer `config`, since C, D and E have equal tensors; states of
    another configuration are refused.

    Raises:
        ValueError: If the configuration does not exist or lacks an option, the resolution cannot be halved often
            enough, no level has an attention resolution, or a width does not split into heads.
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
        label_kind: Literal["class", "vector"] = "class",
        cond_channels: int = 0,
        augment_dim: int = 0,
        dropout: float | None = None,
        attn_resolutions: Sequence[int] | None = None,
        clip_act: float | None = None,
        res_balance: float | None = None,
        attn_balance: float | None = None,
        label_balance: float | None = None,
        concat_balance: float | None = None,
    ) -> None:
        super().__init__()
        f = self.features = get_features(
            config,
            dropout=dropout,
            attn_resolutions=attn_resolutions,
            clip_act=clip_act,
            res_balance=res_balance,
            attn_balance=attn_balance,
            label_balance=label_balance,
            concat_balance=concat_balance,
        )
        levels = level_resolutions(img_resolution, len(channel_mult))
        with_attention = attention_levels(levels, attn_resolutions, f.attn_resolutions)
        if label_kind not in ("class", "vector"):
            raise ValueError(f"label_kind {label_kind!r} is not 'class' or 'vector'")
        self.img_resolution, self.img_channels, self.label_dim = levels[0], img_channels, label_dim
        self.label_kind, self.cond_channels, self.augment_dim = label_kind, cond_channels, augment_dim
        widths = [model_channels * mult for mult in channel_mult]
        noise_channels = model_channels * channel_mult_noise if channel_mult_noise is not None else widths[0]
        emb_channels = model_channels * channel_mult_emb if channel_mult_emb is not None else max(widths)
        # One-hot labels have norm 1, vectors RMS 1. The label layer expects norm 1 in A and B, RMS 1 later.
        unit = math.sqrt(label_dim) if label_kind == "class" else 1.0
        self.label_scale = unit if f.unit_labels else unit / math.sqrt(max(label_dim, 1))

        self.emb_fourier = (
            Positional(noise_channels) if f.positional else f.fixed_functions.fourier(noise_channels)
        )
        self.emb_noise = f.conv(noise_channels, emb_channels)
        self.emb_noise1 = f.conv(emb_channels, emb_channels) if f.embedding_layers == 2 else None
        self.emb_label = f.label_layer(label_dim, emb_channels) if label_dim else None
        self.out_gain = nn.Parameter(torch.zeros([])) if f.gains else None
        streams = itertools.count()

        def block(cin: int, cout: int, flavor: Literal["enc", "dec"], **kwargs: Any) -> nn.Module:
            kwargs |= dict(channels_per_head=channels_per_head, dropout_stream=next(streams))
            if f.group_norm is not None:
                return GroupNormBlock(cin, cout, emb_channels, f, **kwargs)
            return Block(cin, cout, emb_channels, f, flavor=flavor, **kwargs)

        first = f.conv(img_channels + cond_channels + f.constant_channel, widths[0], (3, 3))
        table = list(zip(map(_name, levels), widths, with_attention, strict=True))
        self.enc, skips = _encoder(table, num_blocks, first, block)
        self.dec = _decoder(table, num_blocks, skips, block)
        width = widths[0]
        self.out_norm = None if f.group_norm is None else f.norm(width)
        self.out_conv = f.conv(width, img_channels, (3, 3), ends_branch=True)
        # Last, so that the other weights start as they do without it.
        self.emb_augment = f.augment_layer(augment_dim, emb_channels) if augment_dim else None
        if config != "G":  # whose state has the names of the released weights and no others
            self.register_buffer("config", torch.tensor(ord(config), dtype=torch.uint8))

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
            c_noise: `[B]` noise level as the network sees it, ln(sigma) / 4.
            labels: `[B, label_dim]` one-hot or vector, or None for a missing label.
            dropout_index: `[B]` int64 that makes dropout a function of (dropout_seed, index). None: torch's own.
            dropout_seed: Seed of the dropout masks.
            augment_labels: `[B, augment_dim]`, or None where nothing was augmented.

        Returns:
            `[B, img_channels, H, W]` in x's dtype.
        """
        f = self.features
        dtype = torch.float32 if f.partial_float16 else x.dtype
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own, theirs = self.features.name, None
        if prefix + "config" in state_dict:
            theirs = chr(int(state_dict[prefix + "config"]))
        elif prefix + "out_gain" in state_dict:
            theirs = "G"
        if theirs not in (None, own):
            raise ValueError(
                f"this state is of config {theirs} and cannot be loaded into config {own}: build the network with "
                f"config={theirs!r}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


# Name, width and whether there is attention, for each level from the highest resolution down.
_Levels = list[tuple[str, int, bool]]


def _encoder(
    levels: _Levels, num_blocks: int, first: nn.Module, block: Callable[..., nn.Module]
) -> tuple[nn.ModuleDict, list[int]]:
    """The encoder's layers, and the width of each one's output, which is a skip."""
    layers = nn.ModuleDict()
    width = levels[0][1]
    skips = []
    for i, (name, out, attention) in enumerate(levels):
        if i == 0:
            layers[f"{name}_conv"] = first
        else:
            layers[f"{name}_down"] = block(width, width, "enc", resample_mode="down")
        skips.append(width)
        for j in range(num_blocks):
            layers[f"{name}_block{j}"] = block(width, out, "enc", attention=attention)
            width = out
            skips.append(width)
    return layers, skips


def _decoder(
    levels: _Levels, num_blocks: int, skips: list[int], block: Callable[..., nn.Module]
) -> nn.ModuleDict:
    """The decoder's layers; each block takes the last skip that is left."""
    layers = nn.ModuleDict()
    width = levels[-1][1]
    for i, (name, out, attention) in reversed(list(enumerate(levels))):
        if i == len(levels) - 1:
            layers[f"{name}_in0"] = block(width, width, "dec", attention=True)
            layers[f"{name}_in1"] = block(width, width, "dec")
        else:
            layers[f"{name}_up"] = block(width, width, "dec", resample_mode="up")
        for j in range(num_blocks + 1):
            layers[f"{name}_block{j}"] = block(width + skips.pop(), out, "dec", attention=attention)
            width = out
    return layers


def level_resolutions(img_resolution: int | Sequence[int], num_levels: int) -> list[tuple[int, int]]:
    """(height, width) of each level, from the image's own down by halves.

    Raises:
        ValueError: If there are no levels, or a side cannot be halved `num_levels - 1` times.
    """
    if not num_levels:
        raise ValueError("channel_mult is empty: give the width of at least one level, such as 1 2 2")
    size = (img_resolution,) * 2 if isinstance(img_resolution, int) else tuple(img_resolution)
    factor = 2 ** (num_levels - 1)
    if len(size) != 2 or any(side < factor or side % factor for side in size):
        larger = -(-max(size) // factor) * factor
        raise ValueError(
            f"img_resolution {img_resolution} with {num_levels} levels in channel_mult: both sides must be multiples "
            f"of {factor}, since every level but the last halves them; use fewer levels, or pad images to {larger} "
            "(pad_to)"
        )
    return [(size[0] >> i, size[1] >> i) for i in range(num_levels)]


def attention_levels(
    levels: list[tuple[int, int]], attn_resolutions: Sequence[int] | None, default: Sequence[int]
) -> list[bool]:
    """Whether each level has attention.

    Args:
        levels: (height, width) of each level.
        attn_resolutions: Shorter sides of the levels that shall have attention; None: those of `default` that occur.
        default: Resolutions that need not all occur.

    Raises:
        ValueError: If no level has a wanted resolution.
    """
    sides = [min(level) for level in levels]
    if attn_resolutions is None:
        return [side in default for side in sides]
    missing = [r for r in attn_resolutions if r not in sides]
    if missing:
        raise ValueError(
            f"attn_resolutions {tuple(attn_resolutions)}: no level has resolution {missing[0]}; choose among those of "
            f"the levels, {', '.join(map(str, sides))}, or None for the default (--network.attn-resolutions None)"
        )
    return [side in attn_resolutions for side in sides]


def _name(level: tuple[int, int]) -> str:
    return f"{level[0]}x{level[1]}"
