"""Configs A to G of the paper, each written as its difference from the one before.

Start reading at `CONFIGS`, near the end of this file: it is the paper's Table 1 as far as the network is concerned.
The fields of `Features` say where each difference acts. What training does differently is in `edm2.train.rules`.
Choices that the paper leaves open, and why they were made, are in docs/ladder.md.

Ref: EDM2 Table 1, Sec. 2, App. B.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm2.nn.functional import mp_add, mp_cat, mp_silu, mp_sum, normalize, rms_norm
from edm2.nn.layers import Fourier, MPConv, MPFourier, NormalizedConv, normal
from edm2.nn.plain_layers import GroupNorm, PlainConv, RMSGroupNorm


class FixedFunctions(NamedTuple):
    """The functions without weights between the layers; G replaces all of them."""

    fourier: type[Fourier]
    silu: Callable[[Tensor], Tensor]
    add: Callable[[Tensor, Tensor, float], Tensor]
    add_known: Callable[[Tensor, Tensor, Tensor], Tensor]
    cat: Callable[[Tensor, Tensor, float], Tensor]


def plain_add(a: Tensor, b: Tensor, _share: float) -> Tensor:
    """`a + b`."""
    return a + b


def plain_add_known(a: Tensor, b: Tensor, _rms_b: Tensor) -> Tensor:
    """`a + b`."""
    return a + b


def plain_cat(a: Tensor, b: Tensor, _share: float) -> Tensor:
    """Concatenation of channels."""
    return torch.cat([a, b], dim=1)


def mp_cat_channels(a: Tensor, b: Tensor, share: float) -> Tensor:
    """`mp_cat` of channels."""
    return mp_cat(a, b, dim=1, t=share)


PLAIN = FixedFunctions(Fourier, F.silu, plain_add, plain_add_known, plain_cat)
MAGNITUDE_PRESERVING = FixedFunctions(MPFourier, mp_silu, mp_sum, mp_add, mp_cat_channels)


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a network of one configuration is made of. The defaults are those of config A."""

    name: str
    """The configuration's letter."""
    title: str
    """Its name in the paper's Table 1."""
    bias: bool = True
    """Whether convolutions and linear maps have biases."""
    zero_init: bool = True
    """Whether the last layer of each residual and attention branch, and of the network, starts at zero."""
    weights: Literal["plain", "normalized", "forced"] = "plain"
    """Free weights, weights normalised at each use, or the latter with the stored weights also kept normalised."""
    group_norm: Literal["affine", "rms"] | None = "affine"
    """Group norm of the blocks. None: `Block` instead of `GroupNormBlock`."""
    shift: bool = True
    """Whether the embedding also shifts the activations that it scales."""
    cosine_attention: bool = False
    """Whether queries, keys and values are normalised, instead of the input of attention."""
    positional: bool = True
    """Whether the noise level enters as positional features; otherwise as random Fourier features."""
    unit_labels: bool = False
    """Whether one-hot labels are scaled to unit RMS; otherwise the weights of the label layer start at N(0, 1)."""
    embedding_layers: int = 2
    """Number of linear maps from noise features to the embedding."""
    constant_channel: bool = False
    """Whether the input gets one more channel, of ones."""
    uncertainty: bool = False
    """Whether the loss is weighted with a learned uncertainty u(sigma)."""
    fixed_functions: FixedFunctions = PLAIN
    """Plain or magnitude-preserving SiLU, sum, concatenation and Fourier features."""
    gains: bool = False
    """Whether the conditioning of each block and the output have a learned scalar gain that starts at 0."""
    partial_float16: bool = True
    """Whether embedding, conditioning and attention logits stay float32 when the network runs in float16."""
    eps_inside_root: bool = True
    """Whether norms of activations add eps inside the root, as Eq. 29-30 write it, or to the RMS, as in the
    released networks of G."""

    dropout: float = 0.10
    """Dropout probability in each block, in [0, 1)."""
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    """Resolutions (of the shorter side) with attention, where levels have them."""
    clip_act: float = math.inf
    """Bound on a block's output, a safeguard for float16; inf for none."""
    res_balance: float = 0.3
    """Share of the residual branch in a sum, in [0, 1]; only G uses it."""
    attn_balance: float = 0.3
    """Share of the attention branch in a sum, in [0, 1]; only G uses it."""
    label_balance: float = 0.5
    """Share of the label in the embedding, in [0, 1]; only G uses it."""
    concat_balance: float = 0.5
    """Share of the skip in a concatenation, in [0, 1]; only G uses it."""

    def conv(
        self, in_channels: int, out_channels: int, kernel: Sequence[int] = (), *, ends_branch: bool = False
    ) -> nn.Module:
        """A convolution, or for `kernel=()` a linear map, of this configuration."""
        if self.weights == "plain":
            zero = ends_branch and self.zero_init
            return PlainConv(in_channels, out_channels, kernel, bias=self.bias, zero_init=zero)
        layer = MPConv if self.weights == "forced" else NormalizedConv
        return layer(in_channels, out_channels, kernel)

    def label_layer(self, label_dim: int, out_channels: int) -> nn.Module:
        """The map from labels to the embedding."""
        layer = self.augment_layer(label_dim, out_channels)
        if not self.unit_labels:
            layer.weight = nn.Parameter(normal(*layer.weight.shape))
        return layer

    def augment_layer(self, augment_dim: int, out_channels: int) -> PlainConv | NormalizedConv:
        """The map from labels of augmentation to the embedding, without bias: zero in, zero out."""
        if self.weights == "plain":
            return PlainConv(augment_dim, out_channels)
        return (
            MPConv(augment_dim, out_channels)
            if self.weights == "forced"
            else NormalizedConv(augment_dim, out_channels)
        )

    def norm(self, num_channels: int) -> nn.Module:
        """A group norm of configs A to E."""
        return GroupNorm(num_channels) if self.group_norm == "affine" else RMSGroupNorm(num_channels)

    def normalize(self, x: Tensor, dim: int) -> Tensor:
        """The norm of activations over `dim` in pixel norms and cosine attention."""
        return rms_norm(x, dim) if self.eps_inside_root else normalize(x, dim)


# Group norms keep magnitudes in check inside the branches; weights and the main path grow as they like.
_A = Features(name="A", title="EDM baseline")

# A tuned baseline: nothing new in principle. u(sigma) balances the noise levels.
_B = replace(_A, name="B", title="Minor improvements", attn_resolutions=(16, 8), uncertainty=True)

# Everything that does not help is removed, so that what remains can be reasoned about: norms act on magnitude alone,
# and one channel of ones replaces all biases. App. D.2 bounds activations at 256 for float16 and names no
# configuration: G has the bound, A has not; we take it from C on, where the whole network runs in float16.
_C = replace(
    _B,
    name="C",
    title="Architectural streamlining",
    bias=False,
    zero_init=False,
    group_norm="rms",
    shift=False,
    cosine_attention=True,
    positional=False,
    unit_labels=True,
    constant_channel=True,
    partial_float16=False,
    clip_act=256.0,
)

# No layer scales its input by the size of its weights any more, so activations stop growing with training. But now
# each gradient is orthogonal to its weight vector: every step lengthens the vector, and longer ones turn more slowly.
_D = replace(_C, name="D", title="Magnitude-preserving learned layers", weights="normalized")

# Stored weights keep their length, so that the learning rate alone sets how fast they turn.
_E = replace(_D, name="E", title="Control effective learning rate", weights="forced")

# Magnitude-preserving layers make group norms unnecessary; a pixel norm in the encoder is enough.
_F = replace(_E, name="F", title="Remove group normalizations", group_norm=None, embedding_layers=1)

# The functions between the layers preserve magnitudes, too, and branches are mixed in fixed proportions. Normalised
# weights cannot start at zero, so gains do what zero-init did in A.
_G = replace(
    _F,
    name="G",
    title="Magnitude-preserving fixed-function layers",
    fixed_functions=MAGNITUDE_PRESERVING,
    gains=True,
    dropout=0.0,
    eps_inside_root=False,
)

CONFIGS = {features.name: features for features in (_A, _B, _C, _D, _E, _F, _G)}


def get_features(config: str = "G", **options: Any) -> Features:
    """The features of a configuration, with some of its options changed.

    Args:
        config: Letter of the configuration, `A` to `G`.
        **options: Fields of `Features` from `dropout` on. None: the configuration's own.

    Raises:
        ValueError: If the configuration does not exist or lacks an option, or a value is out of range.
    """
    if config not in CONFIGS:
        raise ValueError(f"config {config!r} is not one of {', '.join(CONFIGS)}; G is the published one")
    given = {name: value for name, value in options.items() if value is not None}
    for name, share in given.items():
        if name.endswith("_balance") and config != "G":
            raise ValueError(f"config {config} has no {name}, which belongs to G: leave it out")
        if name.endswith("_balance") and not 0 <= share <= 1:
            raise ValueError(f"{name} {share} must be in [0, 1]")
    if not 0 <= given.get("dropout", 0) < 1:
        raise ValueError(f"dropout {given['dropout']} must be in [0, 1)")
    if not given.get("clip_act", 1) > 0:
        raise ValueError(f"clip_act {given['clip_act']} must be above 0; inf for no bound")
    if "attn_resolutions" in given:
        given["attn_resolutions"] = tuple(given["attn_resolutions"])
    return replace(CONFIGS[config], **given)
