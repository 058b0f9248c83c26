"""The ladder: configs A to G of the paper, each written as its difference from the one before.

Start reading at `CONFIGS`, at the end of this file: it is the paper's Table 1 as far as the network is concerned.
The fields of `Features` say where each difference acts. What training must do differently is in
`edm2.train.rules`.

Ref: EDM2 Table 1, Sec. 2, App. B; LADDER sections 3-9.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm2.nn.functional import mp_add, mp_cat, mp_silu, mp_sum, normalize, rms_norm
from edm2.nn.layers import Fourier, MPConv, MPFourier, NormalizedConv
from edm2.nn.plain_layers import GroupNorm, PlainConv, RMSGroupNorm


class FixedFunctions(NamedTuple):
    """The functions without weights that join the layers; G exchanges all of them."""

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
    """Free weights, weights normalised where they are used, or these with the stored weights kept normalised."""
    group_norm: Literal["affine", "rms"] | None = "affine"
    """Group norm of the blocks. None: blocks of the later kind, `Block` instead of `GroupNormBlock`."""
    shift: bool = True
    """Whether the embedding also shifts the activations that it scales."""
    cosine_attention: bool = False
    """Whether queries, keys and values are normalised, instead of the input of attention."""
    positional: bool = True
    """Whether the network sees the noise level as positional features; else as random Fourier features."""
    unit_labels: bool = False
    """Whether one-hot labels are scaled to unit RMS; else the weights of the label layer start at N(0, 1)."""
    embedding_layers: int = 2
    """Linear maps between noise features and embedding."""
    constant_channel: bool = False
    """Whether the input gets one more channel, of ones."""
    uncertainty: bool = False
    """Whether the loss is weighted with a learned uncertainty u(sigma)."""
    fixed_functions: FixedFunctions = PLAIN
    """Plain or magnitude-preserving SiLU, sum, concatenation and Fourier features."""
    gains: bool = False
    """Whether the conditioning of each block and the output have a learned scalar gain that starts at 0."""
    fp32_embedding: bool = True
    """Whether embedding and conditioning stay float32 when the network runs in float16."""

    dropout: float = 0.10
    """Option of every configuration: dropout probability in each block, in [0, 1)."""
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    """Option of every configuration: resolutions (of the shorter side) with attention. By default those of the
    configuration's list that the levels have."""
    clip_act: float | None = None
    """Option of every configuration: bound on a block's output, None for none. App. D.2 has 256 for float16 and
    names no configuration: config A's code has none, G's has it; we take it from C on, where the whole
    network is float16. In B and C activations may reach it, see LADDER section 11."""
    channels_per_group: int | None = None
    """Option of A to E: size of a group of the group norm. By default 32 groups, as config A's code has; App. B.1
    can be read as groups of 32 channels (LADDER section 16.1)."""
    init_bound: float = 1.0
    """Option of A to C: weights start uniform in +-init_bound / sqrt(fan_in), u(sigma) too. 1 as in config A, of
    which C is said to keep the init; what is usually called He's init is sqrt(6) (LADDER sections 16.3-16.4)."""
    fp32_attention: Literal["logits", "block"] | None = "logits"
    """Option of A and B: what of attention stays float32 when the network runs in float16: its logits and softmax,
    as in App. B.1, or all of it, as App. D.2 suggests (LADDER section 16.9). C to G: none of it."""
    eps_inside_root: bool = True
    """Option of C to F: whether norms of activations add eps inside the root, as Eq. 29-30 write it. G is
    without, as the released networks are; at unit magnitude the difference is 1e-4 (LADDER section 16.5)."""
    middle_pixel_norm: bool = False
    """Option of F: whether the two blocks in the middle have a pixel norm, which makes 17 of them. The paper counts
    "1/4 as many" norms as before, which is 18; G has 15 without (LADDER section 16.8)."""
    res_balance: float = 0.3
    """Option of G: share of the residual branch in a sum, in [0, 1]."""
    attn_balance: float = 0.3
    """Option of G: share of the attention branch in a sum, in [0, 1]."""
    label_balance: float = 0.5
    """Option of G: share of the label in the embedding, in [0, 1]."""
    concat_balance: float = 0.5
    """Option of G: share of the skip in a concatenation, in [0, 1]."""

    def conv(
        self, in_channels: int, out_channels: int, kernel: Sequence[int] = (), *, ends_branch: bool = False
    ) -> nn.Module:
        """A convolution, or for `kernel=()` a linear map, of this configuration."""
        if self.weights == "plain":
            bound = 0.0 if ends_branch and self.zero_init else self.init_bound
            return PlainConv(in_channels, out_channels, kernel, bias=self.bias, init_bound=bound)
        layer = MPConv if self.weights == "forced" else NormalizedConv
        return layer(in_channels, out_channels, kernel)

    def label_layer(self, label_dim: int, out_channels: int) -> nn.Module:
        """The map from labels to the embedding."""
        layer = self.augment_layer(label_dim, out_channels)
        if not self.unit_labels:
            nn.init.normal_(layer.weight)  # type: ignore[arg-type]
        return layer

    def augment_layer(self, augment_dim: int, out_channels: int) -> nn.Module:
        """The map from labels of augmentation to the embedding, without bias: zero in, zero out."""
        if self.weights != "plain":
            return self.conv(augment_dim, out_channels)
        return PlainConv(augment_dim, out_channels, init_bound=self.init_bound)

    def norm(self, num_channels: int) -> nn.Module:
        """A group norm of this configuration, A to E."""
        if self.group_norm == "affine":
            return GroupNorm(num_channels, self.channels_per_group)
        return RMSGroupNorm(num_channels, self.channels_per_group, eps_inside_root=self.eps_inside_root)

    def normalize(self, x: Tensor, dim: int) -> Tensor:
        """The norm of activations over `dim` that pixel norm and cosine attention use."""
        return rms_norm(x, dim) if self.eps_inside_root else normalize(x, dim)


# Group norms keep magnitudes in check inside the branches; weights and the main path grow as they like.
_A = Features(name="A", title="EDM baseline")

# Nothing in principle: a tuned baseline, in which u(sigma) balances the noise levels.
_B = replace(_A, name="B", title="Minor improvements", attn_resolutions=(16, 8), uncertainty=True)

# Whatever does not help is taken out, so that what remains can be reasoned about: norms act on magnitude alone, and
# one channel of ones stands in for all biases.
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
    fp32_embedding=False,
    fp32_attention=None,
    clip_act=256.0,
)

# No layer scales its input by the size of its weights any more, so activations stop growing with training. But a
# gradient is now orthogonal to the weight vector, every step lengthens it, and longer vectors turn more slowly.
_D = replace(_C, name="D", title="Magnitude-preserving learned layers", weights="normalized")

# Stored weights keep their length, so that the learning rate alone says how fast they turn.
_E = replace(_D, name="E", title="Control effective learning rate", weights="forced")

# Layers that keep magnitudes leave group norms without work; a pixel norm in the encoder is enough.
_F = replace(_E, name="F", title="Remove group normalizations", group_norm=None, embedding_layers=1)

# The functions between the layers keep magnitudes, too, and branches are mixed in fixed proportions. Normalised
# weights cannot start at zero, so gains take over what zero-init did in A.
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

# Which configurations have which options; their meaning is in the docstrings of `Features`.
_OPTIONS = {
    "dropout": "ABCDEFG",
    "attn_resolutions": "ABCDEFG",
    "clip_act": "ABCDEFG",
    "channels_per_group": "ABCDE",
    "init_bound": "ABC",
    "fp32_attention": "AB",
    "eps_inside_root": "CDEF",
    "middle_pixel_norm": "F",
    "res_balance": "G",
    "attn_balance": "G",
    "label_balance": "G",
    "concat_balance": "G",
}


def get_features(config: str = "G", **options: Any) -> Features:
    """The features of a configuration, with some of its options set.

    Args:
        config: letter of the configuration, `A` to `G`.
        **options: fields of `Features` whose docstring says "Option of" with this configuration's letter. For
            dropout and attn_resolutions, None is the configuration's default.

    Raises:
        ValueError: for an unknown configuration, an option that it does not have, or a value out of range.
    """
    if not isinstance(config, str) or config not in CONFIGS:
        raise ValueError(f"config {config!r} is not one of {', '.join(CONFIGS)}; G is the published one")
    for key in options:
        if key not in _OPTIONS:
            near = difflib.get_close_matches(key, _OPTIONS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"there is no option {key!r}: {hint}config {config} has {_names(config)}")
        if config not in _OPTIONS[key]:
            having = _OPTIONS[key]
            where = having if len(having) == 1 else f"{having[0]} to {having[-1]}"
            raise ValueError(
                f"config {config} has no option {key}, which belongs to {where}: leave it out, or choose another "
                f"config; {config} has {_names(config)}"
            )
    given = {k: v for k, v in options.items() if v is not None or k not in ("dropout", "attn_resolutions")}
    if "attn_resolutions" in given:
        try:
            given["attn_resolutions"] = tuple(given["attn_resolutions"])
        except TypeError:
            wrong = given["attn_resolutions"]
            raise ValueError(f"attn_resolutions {wrong!r} must be a list, such as ({wrong},)") from None
    features = replace(CONFIGS[config], **given)
    _check(features)
    return features


def _check(features: Features) -> None:
    rules: list[tuple[str, Callable[[Any], bool], str]] = [
        ("dropout", lambda v: 0 <= v < 1, "in [0, 1)"),
        ("clip_act", lambda v: v is None or v > 0, "above 0, or None for no bound"),
        (
            "channels_per_group",
            lambda v: v is None or (isinstance(v, int) and v >= 1),
            "a whole number of at least 1, or None",
        ),
        ("eps_inside_root", lambda v: isinstance(v, bool), "True or False"),
        ("middle_pixel_norm", lambda v: isinstance(v, bool), "True or False"),
        ("init_bound", lambda v: v > 0, "above 0"),
        ("fp32_attention", lambda v: v in (None, "logits", "block"), "'logits', 'block' or None"),
        *((name, lambda v: 0 <= v <= 1, "in [0, 1]") for name in _OPTIONS if name.endswith("_balance")),
    ]
    for name, holds, rule in rules:
        value = getattr(features, name)
        try:
            fits = holds(value)
        except TypeError:  # a text, or None, where a number is compared
            fits = False
        if not fits:
            raise ValueError(f"{name} {value!r} must be {rule}")


def _names(config: str) -> str:
    return ", ".join(name for name, having in _OPTIONS.items() if config in having)
