"""Inception-v3 features, from the TorchScript file that FID is computed with elsewhere.

A TorchScript archive holds code in addition to its weights, and running it runs that code. It is therefore opened only
with the hash that its publisher states, or on an explicit word of trust.
"""

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edm2.metrics.extractors import as_rgb, check_sha256

HOW_TO_GET_INCEPTION = (
    "get the TorchScript file of the 2015-12-05 TensorFlow graph, inception-2015-12-05.pt as published with NVIDIA's "
    "StyleGAN2-ADA and StyleGAN3 metrics, and the sha256 that its publisher states; other ports of Inception-v3 give "
    "other numbers"
)
_FLAG = "return_features"


class InceptionFeatures:
    """2048 features of Inception-v3 before its last layer; the file resizes images by its own rule.

    Args:
        path: The TorchScript file.
        sha256: Its hash, as its publisher states it; 64 hexadecimal digits.
        trust_code: Open it whatever its hash is. Its code then runs, so use this only for your own files.
        device: Where to compute.

    Raises:
        ValueError: If the file is missing, has another hash, or is not such a network; or without hash and trust.
    """

    name = "inception"
    resize = "by the TorchScript file itself, from uint8 RGB"

    def __init__(
        self,
        path: str | Path,
        *,
        sha256: str | None = None,
        trust_code: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there are no Inception weights at {path}: {HOW_TO_GET_INCEPTION}")
        # Read once, so that the bytes that run are those that were hashed.
        content = path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        if sha256 is None and not trust_code:
            raise ValueError(
                f"{path} is TorchScript, which contains code that runs: give the sha256 that its publisher states, or "
                f"trust it explicitly (the file's is {self.sha256}: compare it with the published one)"
            )
        check_sha256(path, self.sha256, sha256)
        self._device = torch.device(device)
        with warnings.catch_warnings():
            # torch deprecates TorchScript, but the file behind everybody's numbers is in that format.
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            try:
                self._network = torch.jit.load(io.BytesIO(content), map_location=self._device).eval()
            except (RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(
                    f"{path} is not a TorchScript file ({reason}): {HOW_TO_GET_INCEPTION}"
                ) from None
        has_flag = any(a.name == _FLAG for a in self._network.forward.schema.arguments)
        self._options = {_FLAG: True} if has_flag else {}
        self.num_features = self._count(path)

    @torch.no_grad()
    def features(self, images: np.ndarray | Tensor) -> Tensor:
        """Features of images.

        Args:
            images: `[N, C, H, W]` uint8, RGB or gray.

        Returns:
            `[N, D]` float32 on the CPU.

        Raises:
            ValueError: For other images.
        """
        rgb = as_rgb(images, self.name).to(self._device)
        if not len(rgb):
            return torch.empty(0, self.num_features)
        found: Tensor = self._network(rgb, **self._options)
        return found.float().cpu()

    @torch.no_grad()
    def _count(self, path: Path) -> int:
        try:
            found = self._network(
                torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=self._device), **self._options
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"{path} does not take uint8 RGB images ({reason}): {HOW_TO_GET_INCEPTION}"
            ) from None
        if not isinstance(found, Tensor) or found.ndim != 2:
            raise ValueError(f"{path} does not give features [N, D]: {HOW_TO_GET_INCEPTION}")
        return found.shape[1]
