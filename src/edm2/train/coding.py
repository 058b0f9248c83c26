"""From the stored images of a data set to network inputs, and back."""

import math
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from edm2.data import FloatCoding, ImageDataset, PixelCoding, coding_warning, measure_coding
from edm2.data.dataset import MAX_CLASSES
from edm2.nn import keyed_normal
from edm2.train.conditions import ConditionCoding, VectorRange, make_condition_coding, measure_vectors
from edm2.train.config import TrainConfig
from edm2.train.config_groups import DataConfig

_RANGE = ("low", "high")
_LATENT_STREAM = 2  # of keyed random numbers; 0 and 1 are the noise level and the noise


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How stored images become network units.

    Attributes:
        kind: Pixels (bytes), floats, or latents (channels of means, then of standard deviations).
        values: Mean, standard deviation and sigma_data.
        num_channels: Channels of the network's images.
        missing: Whether values of images may be missing, which is NaN.
        condition: Coding of the images given as a condition; None without any.
        vectors: Mean and standard deviation of the vectors given with images; None without any.
        num_classes: Number of classes that precede the vectors; 0 without vectors.
        vector_range: Lowest and highest values of the vectors in training; None if earlier versions did not store them.
    """

    kind: Literal["pixels", "floats", "latents"]
    values: FloatCoding
    num_channels: int
    missing: bool = False
    condition: ConditionCoding | None = None
    vectors: FloatCoding | None = None
    num_classes: int = 0
    vector_range: VectorRange | None = field(default=None, compare=False)

    @property
    def label_dim(self) -> int:
        """Length of the network's label vectors; 0 if it takes no vectors."""
        return 0 if self.vectors is None else self.num_classes + len(self.vectors.mean)

    def encode(self, stored: Tensor, index: Tensor, *, seed: int) -> Tensor:
        """Stored images to network units.

        Args:
            stored: `[B, ...]` images of the data set.
            index: `[B]` int64 that determines which latent is drawn.
            seed: Seed of the run.

        Returns:
            `[B, num_channels, H, W]` float32.
        """
        if self.kind == "latents":
            mean, std = stored.float().chunk(2, dim=1)
            stored = mean + std * keyed_normal(index, mean.shape[1:], seed=seed, stream=_LATENT_STREAM)
        return self.values.encode(stored)

    def labels(self, classes: Tensor | None, vectors: Tensor | None) -> Tensor | None:
        """Classes and vectors as the network's labels.

        Args:
            classes: `[B]` int64, or None.
            vectors: `[B, D]` in the data's own units, for a network with vectors.

        Returns:
            Without vectors, the classes. With them, `[B, label_dim]` float32 of unit magnitude: classes as one-hot
            labels times the root of their number, then the standardised vectors. An unknown class is zeros.
        """
        if self.vectors is None:
            return classes
        assert vectors is not None
        coded = self.vectors.encode(vectors[:, :, None, None])[:, :, 0, 0]
        if not self.num_classes:
            return coded
        known = coded.new_zeros(len(coded), self.num_classes)
        if classes is not None:
            known = one_hot(classes, self.num_classes) * math.sqrt(self.num_classes)
        return torch.cat([known.to(coded.dtype), coded], dim=1)

    def decode(self, x: Tensor) -> Tensor:
        """Network units to bytes, or to the data's own units for floats and latents."""
        return self.values.decode(x)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.values).items()}
        given: dict[str, Any] = {}
        if self.missing:
            given["missing"] = True
        if self.condition is not None:
            given["condition"] = self.condition.to_json()
        if self.vectors is not None:
            given["vectors"] = {"mean": list(self.vectors.mean), "std": list(self.vectors.std)}
            if self.vector_range is not None:
                given["vectors"] |= {k: list(v) for k, v in zip(_RANGE, self.vector_range, strict=True)}
            given["num_classes"] = self.num_classes
        return {"kind": self.kind, "num_channels": self.num_channels, **values, **given}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Coding":
        """The inverse of `to_json`, for values from a file.

        Raises:
            ValueError: If edm2 does not write such values.
        """
        try:
            made = {"pixels": PixelCoding, "floats": FloatCoding, "latents": FloatCoding}[content["kind"]]
            values = made(
                mean=tuple(content["mean"]), std=tuple(content["std"]), sigma_data=content["sigma_data"]
            )
            num_channels = content["num_channels"]
            if type(num_channels) is not int or num_channels < 1:
                raise ValueError("num_channels must be a whole number of at least 1")
            if not {len(values.mean), len(values.std)} <= {1, num_channels}:
                raise ValueError(f"mean and std must have 1 or {num_channels} values")
            given: dict[str, Any] = {"missing": content.get("missing", False) is True}
            if "condition" in content:
                given["condition"] = ConditionCoding.from_json(content["condition"])
            if "vectors" in content:
                moments = {key: tuple(content["vectors"][key]) for key in ("mean", "std")}
                given["vectors"] = FloatCoding(**moments, sigma_data=1.0)
                if _RANGE[0] in content["vectors"]:
                    given["vector_range"] = _read_range(content["vectors"], len(moments["mean"]))
                given["num_classes"] = content["num_classes"]
                if type(given["num_classes"]) is not int or not 0 <= given["num_classes"] < MAX_CLASSES:
                    raise ValueError("num_classes must be a whole number of at least 0")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"a coding of images that edm2 does not write ({str(error)[:200]})") from error
        return cls(kind=content["kind"], values=values, num_channels=num_channels, **given)


def make_coding(config: TrainConfig, dataset: ImageDataset) -> Coding:
    """The coding that the settings ask for, on this data.

    Warns if the magnitude of coded data is far from what the network expects.

    Raises:
        ValueError: If the coding does not fit the images' type or number of channels.
    """
    options, sigma_data = config.dataset, config.loss.sigma_data
    channels = dataset.image_shape[0]
    bytes_ = dataset.dtype == np.uint8
    if options.coding == "latents":
        if bytes_ or channels % 2:
            raise ValueError(
                f"coding latents needs float images with an even number of channels, means then standard deviations; "
                f"{dataset.name!r} has {channels} channels of {dataset.dtype}"
            )
        values = FloatCoding(mean=options.mean, std=options.std, sigma_data=sigma_data)
        _warn_if_far(dataset, values, latents=True)
        return Coding(kind="latents", values=values, num_channels=channels // 2, **_given(options, dataset))
    if options.coding == "measured":
        values = measure_coding(dataset, sigma_data=sigma_data)
    else:
        made = PixelCoding if bytes_ else FloatCoding
        given = {} if options.coding == "plain" else {"mean": options.mean, "std": options.std}
        values = made(**given, sigma_data=sigma_data)
        _warn_if_far(dataset, values)
    coding = Coding(
        kind="pixels" if bytes_ else "floats",
        values=values,
        num_channels=channels,
        **_given(options, dataset),
    )
    coding.encode(torch.from_numpy(dataset.images(np.arange(1))), torch.zeros(1, dtype=torch.int64), seed=0)
    return coding


def _given(options: DataConfig, dataset: ImageDataset) -> dict[str, Any]:
    """What a coding says about missing values, conditions and vectors."""
    given: dict[str, Any] = {"missing": dataset.missing}
    if dataset.conditions is not None:
        size = (dataset.image_shape[1], dataset.image_shape[2])
        given["condition"] = make_condition_coding(dataset.conditions, size, options.resample)
    if dataset.vector_dim:
        vectors, vector_range = measure_vectors(dataset)
        given |= {"vectors": vectors, "vector_range": vector_range, "num_classes": dataset.num_classes}
    return given


def _read_range(content: dict[str, Any], length: int) -> VectorRange:
    low, high = (tuple(content[key]) for key in _RANGE)
    fits = len(low) == len(high) == length and all(map(math.isfinite, (*low, *high)))
    if not (fits and all(a < b for a, b in zip(low, high, strict=True))):
        raise ValueError(f"low and high of vectors must have {length} finite values each, low below high")
    return low, high


def _warn_if_far(dataset: ImageDataset, values: FloatCoding, *, latents: bool = False) -> None:
    warning = coding_warning(dataset, values, latents=latents)
    if warning is not None:
        warnings.warn(warning, stacklevel=3)
