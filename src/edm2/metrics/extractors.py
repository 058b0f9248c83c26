"""Feature extractors: a small protocol, and any function as an extractor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class FeatureExtractor(Protocol):
    """Features of images, with the facts needed to compute the same ones again.

    Attributes:
        name: Short, such as "inception".
        sha256: Hash of its weights; "" if it has none.
        num_features: D.
        resize: How images are brought to the network's size and range, in words.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - described above
    @property
    def sha256(self) -> str: ...  # noqa: D102
    @property
    def num_features(self) -> int: ...  # noqa: D102
    @property
    def resize(self) -> str: ...  # noqa: D102

    def features(self, images: np.ndarray | Tensor) -> Tensor:
        """Features `[N, D]`, floating point on the CPU, of `[N, C, H, W]` uint8 images."""
        ...


class CallableFeatures:
    """Any function as an extractor.

    Args:
        function: `[N, C, H, W]` uint8 tensor on the CPU -> `[N, D]` floating-point tensor.
        name: Short, for the provenance of numbers.
        num_features: D.
        sha256: Hash of the function's weights, if it has any.
        resize: How it prepares images, in words.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        *,
        name: str,
        num_features: int,
        sha256: str = "",
        resize: str = "",
    ) -> None:
        self.name, self.num_features, self.sha256, self.resize = name, num_features, sha256, resize
        self._function = function

    @torch.no_grad()
    def features(self, images: np.ndarray | Tensor) -> Tensor:
        """Features of images.

        Args:
            images: `[N, C, H, W]` uint8.

        Returns:
            `[N, D]`.

        Raises:
            ValueError: If images do not fit, or the function returns something of the wrong shape or type.
        """
        images = check_images(images)
        found = self._function(images)
        if found.shape != (len(images), self.num_features) or not found.is_floating_point():
            raise ValueError(
                f"extractor {self.name!r} gave {list(found.shape)} {found.dtype} for {len(images)} images: it must "
                f"give [{len(images)}, {self.num_features}] floating-point numbers"
            )
        return found.cpu()


def describe_extractor(extractor: FeatureExtractor) -> dict[str, Any]:
    """What identifies an extractor's features, as JSON."""
    return {key: getattr(extractor, key) for key in ("name", "sha256", "num_features", "resize")}


def check_sha256(path: str | Path, found: str, expected: str | None) -> None:
    """Raise a ValueError unless a file's hash is the expected one, if there is one."""
    if expected is not None and expected.lower() != found:
        raise ValueError(
            f"{path} has the sha256 {found}, not {expected}: it is damaged or another file, and is not used"
        )


def check_images(images: np.ndarray | Tensor) -> Tensor:
    """Images as a tensor on the CPU, or a ValueError unless they are `[N, C, H, W]` uint8."""
    images = torch.as_tensor(images)
    if images.ndim != 4 or images.dtype != torch.uint8:
        raise ValueError(f"images must be [N, C, H, W] uint8, not {list(images.shape)} {images.dtype}")
    return images.cpu()


def as_rgb(images: np.ndarray | Tensor, name: str) -> Tensor:
    """Images as RGB, gray repeated three times, or a ValueError."""
    images = check_images(images)
    if images.shape[1] not in (1, 3):
        raise ValueError(f"{name} sees RGB or gray images, and these have {images.shape[1]} channels")
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
