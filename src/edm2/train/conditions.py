"""What a network is given besides noise and class, from the data's own units to the network's, and back to words."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from edm2.data import FloatCoding, ImageDataset, PixelCoding, measure_coding

Resampling = Literal["nearest", "bilinear", "bicubic"]
VectorRange = tuple[tuple[float, ...], tuple[float, ...]]  # lowest and highest value of each entry
_LARGEST_SIZE = 1 << 20  # of what a file may promise
# How far the mean of conditions may lie from that of training, in its standard deviations, and the ratio of both
# standard deviations, before a warning and before an error.
_STRANGE, _WRONG, _FLAT = 3.0, 10.0, 0.02


@dataclass(frozen=True, kw_only=True)
class ConditionCoding:
    """How condition images become inputs of the network.

    Each channel gets zero mean and unit standard deviation, as measured on the training data. Missing values become 0,
    and a second half of the channels is 1 where a value is known and -1 where it is missing. Images of another size
    than the network's are resampled.

    Attributes:
        kind: Pixels (bytes) or floats.
        mean: Mean of each channel; of x / 127.5 - 1 for pixels.
        std: Standard deviation of each channel, likewise.
        shape: Channels, height and width as stored.
        size: Height and width of the network's images.
        resample: How images of another size are resampled; None if the sizes are equal.
        missing: Whether values may be missing, which is NaN.
    """

    kind: Literal["pixels", "floats"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, int, int]
    size: tuple[int, int]
    resample: Resampling | None = None
    missing: bool = False

    @property
    def num_channels(self) -> int:
        """Channels of the network's condition."""
        return self.shape[0] * (2 if self.missing else 1)

    @property
    def values(self) -> FloatCoding:
        """Between stored values and unit magnitude."""
        made = PixelCoding if self.kind == "pixels" else FloatCoding
        return made(mean=self.mean, std=self.std, sigma_data=1.0)

    def encode(self, stored: Tensor) -> Tensor:
        """Stored images to inputs of the network.

        Args:
            stored: `[B, *shape]` uint8 for pixels, otherwise float.

        Returns:
            `[B, num_channels, *size]` float32 of unit magnitude.
        """
        coded = self.values.encode(stored)
        if self.missing:
            known = coded.isfinite()
            coded = torch.cat([torch.where(known, coded, 0.0), 2.0 * known - 1.0], dim=1)
        if self.resample is None:
            return coded
        if self.resample == "nearest":
            return interpolate(coded, self.size, mode="nearest-exact")
        return interpolate(coded, self.size, mode=self.resample, align_corners=False, antialias=True)

    def check(self, images: np.ndarray) -> str | None:
        """Check that conditions are of the kind, shape and units of the training data.

        Args:
            images: `[N, C, H, W]` as stored.

        Returns:
            A warning if their mean or standard deviation is unusual, else None.

        Raises:
            ValueError: If kind or shape differ, values are missing that were not in training, or the units must be
                others.
        """
        wanted = "uint8" if self.kind == "pixels" else "float"
        if images.shape[1:] != self.shape or (images.dtype == np.uint8) != (self.kind == "pixels"):
            raise ValueError(
                f"conditions of {images.dtype} {list(images.shape)}: this model was trained on {wanted} "
                f"[N, {', '.join(map(str, self.shape))}]; give them as they were in training"
            )
        if not self.missing and not np.isfinite(images).all():
            raise ValueError(
                f"conditions hold values that are not finite ({1 - np.isfinite(images).mean():.2%}), and the model was "
                "not trained with missing values: fill them, or train with --dataset.missing mask"
            )
        return self._units(images)

    def _units(self, images: np.ndarray) -> str | None:
        values = images.astype(np.float64)
        values = (
            values / 127.5 - 1 if self.kind == "pixels" else np.where(np.isfinite(values), values, np.nan)
        )
        worst: tuple[float, str] = (0.0, "")
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            given = values[:, channel]
            given = given[~np.isnan(given)]
            if not given.size:
                continue
            distance = max(abs(given.mean() - mean), given.std()) / std
            flat = given.size > 1 and given.std() < _FLAT * std
            text = (
                f"channel {channel} of the conditions has mean {given.mean():.4g} and standard deviation "
                f"{given.std():.4g}, in training {mean:.4g} and {std:.4g}"
            )
            worst = max(worst, (max(distance, _STRANGE if flat else 0.0), text))
        if worst[0] > _WRONG:
            raise ValueError(f"{worst[1]}: give conditions in the units of the training data")
        return f"{worst[1]}: are they in the units of the training data?" if worst[0] >= _STRANGE else None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ConditionCoding":
        """The inverse of `to_json`, for values from a file.

        Raises:
            ValueError: If edm2 does not write such values.
        """
        values = {field.name: content[field.name] for field in fields(cls)}
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        shape, size = values["shape"], values["size"]
        whole = all(type(side) is int and 1 <= side <= _LARGEST_SIZE for side in (*shape, *size))
        if not whole or (len(shape), len(size)) != (3, 2):
            raise ValueError("shape and size of conditions must be 3 and 2 whole numbers")
        known = values["kind"] in ("pixels", "floats") and type(values["missing"]) is bool
        if not known or values["resample"] not in (None, *get_args(Resampling)):
            raise ValueError("kind, missing or resample of conditions is unknown")
        made = cls(**values)
        if not len(made.mean) == len(made.std) == shape[0]:
            raise ValueError(f"mean and std of conditions must have {shape[0]} values")
        made.values.encode(
            torch.zeros(1, shape[0], 1, 1, dtype=torch.uint8 if made.kind == "pixels" else None)
        )
        return made


def make_condition_coding(
    conditions: ImageDataset, size: tuple[int, int], resample: Resampling | None
) -> ConditionCoding:
    """Measure the coding of a data set's conditions.

    Args:
        conditions: The condition images.
        size: Height and width of the network's images.
        resample: How conditions of another size are resampled.

    Raises:
        ValueError: If they have another size and `resample` is None, or a channel is constant.
    """
    height, width = conditions.image_shape[1:]
    if (height, width) != size and resample is None:
        raise ValueError(
            f"the conditions are {height}x{width} and the images {size[0]}x{size[1]}: say how to resample the "
            "conditions with --dataset.resample bicubic, bilinear or nearest"
        )
    values = measure_coding(conditions, sigma_data=1.0)
    return ConditionCoding(
        kind="pixels" if conditions.dtype == np.uint8 else "floats",
        mean=values.mean,
        std=values.std,
        shape=conditions.image_shape,
        size=size,
        resample=None if (height, width) == size else resample,
        missing=conditions.missing,
    )


def measure_vectors(dataset: ImageDataset) -> tuple[FloatCoding, VectorRange]:
    """Measure the coding that gives every entry of a data set's vectors zero mean and unit standard deviation.

    Returns:
        The coding, and the lowest and highest value of each entry.

    Raises:
        ValueError: If an entry is the same for all images.
    """
    vectors = dataset.vectors(np.arange(len(dataset))).astype(np.float64)
    mean, std = vectors.mean(0), vectors.std(0)
    flat = np.flatnonzero(std <= 1e-6 * np.abs(mean))
    if len(flat):
        raise ValueError(
            f"entry {flat[0]} of the vectors of {dataset.name!r} is {mean[flat[0]]:.6g} for all images: leave it out"
        )
    coding = FloatCoding(mean=tuple(mean.tolist()), std=tuple(std.tolist()), sigma_data=1.0)
    return coding, (tuple(vectors.min(0).tolist()), tuple(vectors.max(0).tolist()))
