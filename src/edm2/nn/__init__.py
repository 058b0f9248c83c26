"""Magnitude-preserving functions, layers and networks, and the paper's configurations A to G (EDM2 Sec. 2, App. B)."""

from edm2.nn.blocks import Block
from edm2.nn.configs import CONFIGS, Features, get_features
from edm2.nn.flops import count_flops
from edm2.nn.functional import mp_cat, mp_silu, mp_sum, normalize, resample, rms, rms_norm
from edm2.nn.group_norm_block import GroupNormBlock
from edm2.nn.keyed_random import keyed_bits, keyed_dropout, keyed_normal, keyed_uniform
from edm2.nn.layers import ForcedWeightNorm, Fourier, MPConv, MPFourier, NormalizedConv
from edm2.nn.layout import faster_channels_last, use_channels_last
from edm2.nn.plain_layers import GroupNorm, PlainConv, Positional, RMSGroupNorm
from edm2.nn.unet import UNet

__all__ = [
    "CONFIGS",
    "Block",
    "Features",
    "ForcedWeightNorm",
    "Fourier",
    "GroupNorm",
    "GroupNormBlock",
    "MPConv",
    "MPFourier",
    "NormalizedConv",
    "PlainConv",
    "Positional",
    "RMSGroupNorm",
    "UNet",
    "count_flops",
    "faster_channels_last",
    "get_features",
    "keyed_bits",
    "keyed_dropout",
    "keyed_normal",
    "keyed_uniform",
    "mp_cat",
    "mp_silu",
    "mp_sum",
    "normalize",
    "resample",
    "rms",
    "rms_norm",
    "use_channels_last",
]
