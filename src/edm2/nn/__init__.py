"""Magnitude-preserving functions, layers and networks (EDM2 Sec. 2.3, App. B)."""

from edm2.nn.blocks import Block
from edm2.nn.flops import count_flops
from edm2.nn.functional import mp_cat, mp_silu, mp_sum, normalize, resample, rms
from edm2.nn.keyed_random import keyed_bits, keyed_dropout, keyed_normal, keyed_uniform
from edm2.nn.layers import ForcedWeightNorm, MPConv, MPFourier, use_channels_last
from edm2.nn.unet import UNet

__all__ = [
    "Block",
    "ForcedWeightNorm",
    "MPConv",
    "MPFourier",
    "UNet",
    "count_flops",
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
    "use_channels_last",
]
