"""Mirroring, and augmentation for small data sets that does not leak into samples.

Each draw is a function of (seed, position of the image in the run).

Ref: EDM (arXiv 2206.00364) App. F.2.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from edm2.nn import keyed_normal, keyed_uniform

# Streams of keyed random numbers; training uses 0 to 2.
_MIRROR, _SWITCHES, _UNIFORMS, _NORMALS = 16, 17, 18, 19
_TRANSFORMATIONS = ("flip_x", "flip_y", "scale", "rotation", "stretch", "translation")

AUGMENT_DIM = 9


def mirror(images: Tensor, index: Tensor, *, seed: int, probability: float = 0.5) -> Tensor:
    """Mirror images left to right at random.

    Samples are then mirrored as often, which is right for faces and wrong for text.

    Args:
        images: `[B, C, H, W]`.
        index: `[B]` int64, positions in the run.
        seed: Seed of the run.
        probability: Probability that an image is mirrored, in [0, 1].

    Returns:
        `[B, C, H, W]`.

    Raises:
        ValueError: If the probability is outside [0, 1].
    """
    _require_probability(probability)
    chosen = keyed_uniform(index, (), seed=seed, stream=_MIRROR) < probability
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(3), images)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random geometric transformations, with a label that tells the network what was done.

    Samples are made with the label zero, so that the transformations do not leak into them. Each transformation
    happens independently with the chance `probability`, in the order of the label:

    - 0, 1: 1 where mirrored left to right, and top to bottom; each by a fair coin.
    - 2: a, scaled by `scale**a`; a ~ N(0, 1).
    - 3, 4: cos r - 1 and sin r, turned by r; r uniform in (-pi, pi).
    - 5, 6: a cos r and a sin r, stretched by `stretch**abs(a)` along r and shrunk as much across; a ~ N(0, 1),
      r uniform.
    - 7, 8: a and b, moved by `translation` x a of the width and x b of the height; a, b ~ N(0, 1).

    Images that are only flipped, or not touched, keep their values exactly. The others are sampled bicubically
    and continued by their mirror image beyond the border. This is for pixels only: a flipped latent is not the latent
    of a flipped image.

    Tests show that the label says exactly what was done, that zero leaves an image untouched, and that the draws have
    the distributions above. Kinds, strengths and chances follow the paper's description and have not been compared with
    its authors' results. The paper's resampling filter (a wavelet) and its order of transformations are not reproduced.

    Args:
        probability: Probability of each transformation, in [0, 1]; the paper's are 0.12 to 0.15.
        always_flip_x: Whether left and right are mirrored by the fair coin alone, regardless of the probability.
        scale: Factor at one standard deviation, at least 1.
        stretch: Factor at one standard deviation, at least 1.
        translation: Share of the side at one standard deviation, at least 0.

    Raises:
        ValueError: If a value is outside its range.

    Ref: EDM App. F.2.
    """

    probability: float = 0.12
    always_flip_x: bool = False
    scale: float = 2**0.2
    stretch: float = 2**0.2
    translation: float = 0.125

    def __post_init__(self) -> None:
        _require_probability(self.probability)
        if not (
            1 <= self.scale < math.inf and 1 <= self.stretch < math.inf and 0 <= self.translation < math.inf
        ):
            raise ValueError(
                f"scale {self.scale} and stretch {self.stretch} must be at least 1, translation "
                f"{self.translation} at least 0, and all finite"
            )

    def __call__(self, images: Tensor, index: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
        """Transform images.

        Args:
            images: `[B, C, H, W]` float.
            index: `[B]` int64, positions in the run; best on the CPU, so that nothing waits for the images' device.
            seed: Seed of the run.

        Returns:
            `[B, C, H, W]` like the images, and labels `[B, 9]` float32 on their device.

        Raises:
            ValueError: If the images are not float.
        """
        if not images.is_floating_point():
            raise ValueError(f"augmentation takes float images, not {images.dtype}: code them first")
        label = self.labels(index, seed=seed)
        return transform(images, label, self), label.to(images.device, non_blocking=True)

    def labels(self, index: Tensor, *, seed: int) -> Tensor:
        """Draw the labels of the images at these positions, `[B, 9]` float32; arguments as in a call."""
        on = keyed_uniform(index, (len(_TRANSFORMATIONS),), seed=seed, stream=_SWITCHES) < self.probability
        if self.always_flip_x:
            on[:, 0] = True
        coins = keyed_uniform(index, (4,), seed=seed, stream=_UNIFORMS).unbind(1)
        normals = keyed_normal(index, (4,), seed=seed, stream=_NORMALS).unbind(1)
        turn, axis = (2 * math.pi * coin - math.pi for coin in coins[2:])
        flips = [(coin < 0.5).float() for coin in coins[:2]]
        parts = [
            *flips,
            normals[0],
            turn.cos() - 1,
            turn.sin(),
            normals[1] * axis.cos(),
            normals[1] * axis.sin(),
            normals[2],
            normals[3],
        ]
        # Which transformation each entry of the label belongs to.
        owner = torch.tensor([0, 1, 2, 3, 3, 4, 4, 5, 5], device=on.device)
        return torch.where(on[:, owner], torch.stack(parts, dim=1), 0.0)


def transform(images: Tensor, label: Tensor, augmentation: Augmentation) -> Tensor:
    """Transform images as their labels say.

    Args:
        images: `[B, C, H, W]` float.
        label: `[B, 9]`, as `Augmentation` describes, on any device; zero leaves an image exactly as it is.
        augmentation: Strengths of the transformations.

    Returns:
        `[B, C, H, W]`.
    """
    device = images.device
    flip_x, flip_y = ((label[:, i] > 0.5).to(device)[:, None, None, None] for i in (0, 1))
    images = torch.where(flip_x, images.flip(3), images)
    images = torch.where(flip_y, images.flip(2), images)
    moved = (label[:, 2:] != 0).any(1)
    if not moved.any():
        return images
    height, width = images.shape[2:]
    # From positions in the result to positions in the source, both in pixels from the centre.
    backward = _forward_matrix(label[:, 2:].double(), augmentation, height, width).inverse().to(device)
    x, y = _centred(width, device), _centred(height, device)
    places = torch.stack(
        [x[None, :].expand(height, width), y[:, None].expand(height, width), x.new_ones(height, width)],
        dim=-1,
    )
    found = places.reshape(1, -1, 3) @ backward[:, :2].transpose(1, 2)
    grid = found / torch.tensor([width / 2, height / 2], dtype=torch.float64, device=device)
    grid = grid.reshape(len(images), height, width, 2).to(images.dtype)
    sampled = grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return torch.where(moved.to(device)[:, None, None, None], sampled, images)


def _forward_matrix(label: Tensor, augmentation: Augmentation, height: int, width: int) -> Tensor:
    # [B, 3, 3], to be applied to columns (x, y, 1); x to the right, y down, so turns go clockwise.
    scale, turn_cos, turn_sin, along_x, along_y, move_x, move_y = label.unbind(1)
    factor = augmentation.scale**scale
    # Shrinking along r is stretching across it, so amounts are positive.
    amount = torch.hypot(along_x, along_y)
    axis = torch.atan2(along_y, along_x)
    grow = augmentation.stretch**amount
    anisotropy = _turned(axis) @ _scaled(grow, 1 / grow) @ _turned(-axis)
    turn = _turned(torch.atan2(turn_sin, turn_cos + 1))
    moved = _moved(move_x * augmentation.translation * width, move_y * augmentation.translation * height)
    return moved @ anisotropy @ turn @ _scaled(factor, factor)


def _centred(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, dtype=torch.float64, device=device) - (size - 1) / 2


def _turned(angle: Tensor) -> Tensor:
    zero, cos, sin = torch.zeros_like(angle), angle.cos(), angle.sin()
    return _matrix(cos, -sin, zero, sin, cos, zero)


def _scaled(x: Tensor, y: Tensor) -> Tensor:
    zero = torch.zeros_like(x)
    return _matrix(x, zero, zero, zero, y, zero)


def _moved(x: Tensor, y: Tensor) -> Tensor:
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return _matrix(one, zero, x, zero, one, y)


def _matrix(*entries: Tensor) -> Tensor:
    zero, one = torch.zeros_like(entries[0]), torch.ones_like(entries[0])
    return torch.stack([*entries, zero, zero, one], dim=1).reshape(-1, 3, 3)


def _require_probability(probability: float) -> None:
    if not 0 <= probability <= 1:
        raise ValueError(f"probability {probability} must be in [0, 1]")
