"""Settings that follow from the size of a run and of its pictures: power laws through two runs that worked.

One is the preset `digits` (8x8, minutes on a laptop), the other the paper's best, EDM2-XXL on ImageNet-512 (Table 6).
The preset `fashion-mnist-small` lies between them and near the line.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from edm2.presets import digits, img512
from edm2.train.config_groups import NetworkConfig

# Multiply-accumulates of a forward pass of one image in the two runs.
_SMALL_MACS, _LARGE_MACS = 29.2e6, 552e9
_SMALL, _LARGE = digits(), img512("xxl")
DECAY_START = 0.1
"""Share of the run after which the learning rate decays: 11% in `digits`, 7% to 16% in EDM2 Table 6."""
PASSES = 3
"""A forward pass, and a backward pass that costs twice as much."""

# Base width and residual blocks of a level, each about 1.3 to 2 times as expensive as the one before. The last ones
# are EDM2's XS to XXL.
SHAPES = (
    (16, 1), (24, 1), (32, 1), (32, 2), (48, 2), (64, 2), (64, 3), (96, 3), (128, 3), (192, 3), (256, 3), (320, 3),
    (384, 3), (448, 3),
)  # fmt: skip
_PAPER_WIDTH = 128
_DEEPEST, _DEEPEST_SMALL = (
    8,
    4,
)  # shorter side of the last level, of images from 16 pixels on and of smaller ones


def _line(x: float, small: tuple[float, float], large: tuple[float, float]) -> float:
    """Value at x of the power law through two points."""
    exponent = math.log(large[1] / small[1]) / math.log(large[0] / small[0])
    return float(small[1] * (x / small[0]) ** exponent)


def _by_length(num_images: float, small: float, large: float) -> float:
    return _line(num_images, (_SMALL.num_images, small), (_LARGE.num_images, large))


def run_length(macs: float) -> float:
    """Images after which a compute budget is split well between a run's length and its network.

    Args:
        macs: Budget in multiply-accumulates of all passes.
    """
    budgets = [PASSES * m * c.num_images for m, c in ((_SMALL_MACS, _SMALL), (_LARGE_MACS, _LARGE))]
    return _line(macs, (budgets[0], _SMALL.num_images), (budgets[1], _LARGE.num_images))


def batch_size(num_images: float) -> int:
    """Batch for a length of run: a power of two, from 8 to 4096."""
    exact = _by_length(num_images, _SMALL.batch_size, _LARGE.batch_size)
    return int(2 ** min(max(round(math.log2(exact)), 3), 12))


def rampup_images(num_images: float) -> float:
    """Images in which the learning rate rises."""
    return 1e6 * _by_length(num_images, _SMALL.optimizer.rampup_mimg, _LARGE.optimizer.rampup_mimg)


def reference_rate(model_channels: int) -> float:
    """Learning rate for a width: `0.136 / sqrt(channels)` is within 6% of all rates of EDM2 Table 6."""
    return float(f"{0.136 / math.sqrt(model_channels):.2g}")


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Resolutions of a U-Net for pictures of one size.

    Attributes:
        sides: Shorter side of each level, from the pictures' own down.
        pad_to: Side to pad square pictures to, where they cannot be halved often enough; None for no padding.
    """

    sides: tuple[int, ...]
    pad_to: int | None


def levels_for(height: int, width: int) -> Levels:
    """Halve the shorter side down to 8 pixels, or 4 for pictures below 16, as the presets do.

    Raises:
        ValueError: If the sides are too small, or not square and odd.
    """
    side = min(height, width)
    deepest = _DEEPEST if side >= 2 * _DEEPEST else _DEEPEST_SMALL
    depth = max(1, math.ceil(math.log2(side / deepest)))
    unit = 2**depth
    pad_to = None
    if height % unit or width % unit:
        if height == width:
            side = pad_to = unit * math.ceil(side / unit)
        else:
            depth = min((s & -s).bit_length() - 1 for s in (height, width))
    if side < 4 or not depth:
        raise ValueError(
            f"images of {height}x{width} cannot be halved: bring them to an even size of at least 4 with "
            "'edm2 data convert --size'"
        )
    return Levels(sides=tuple(side >> k for k in range(depth + 1)), pad_to=pad_to)


def network_for(levels: Levels, shape: tuple[int, int], dropout: float = 0.0) -> NetworkConfig:
    """Network of one of the `SHAPES`.

    From 128 channels on it is EDM2's, level by level; narrower ones double the width once and attend at the last level
    only. Levels above 64 pixels have the base width, because they cost most.
    """
    width, blocks = shape
    paper = width >= _PAPER_WIDTH
    fine = max(0, len(levels.sides) - 4)
    coarse = len(levels.sides) - fine
    mult = (1, 2, 3, 4)[:coarse] if paper else (1, 2, 2, 2)[:coarse]
    return NetworkConfig(
        model_channels=width,
        channel_mult=(1,) * fine + mult,
        num_blocks=blocks,
        attn_resolutions=None if paper and coarse == 4 else levels.sides[-1:],
        channels_per_head=64 if paper else 32 if width % 32 == 0 else 16,
        dropout=dropout or None,
    )


def nearest_shape(wanted: float, macs: Callable[[tuple[int, int]], float]) -> tuple[int, int]:
    """Shape whose cost is nearest to the wanted one, by ratio; costs beyond it are not asked for."""
    best = SHAPES[0]
    for shape in SHAPES:
        if abs(math.log(macs(shape) / wanted)) > abs(math.log(macs(best) / wanted)):
            break
        best = shape
    return best
