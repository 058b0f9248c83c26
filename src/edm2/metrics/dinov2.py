"""DINOv2 features, through the transformers package."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from edm2.extras import needed
from edm2.files import sha256_of
from edm2.metrics.extractors import as_rgb, check_sha256

DINOV2 = "facebook/dinov2-large"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIDE = 224
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_HOW_TO_GET = (
    f"download {_CONFIG} and {_WEIGHTS} of https://huggingface.co/{DINOV2} into a folder and give that; the page of "
    f"{_WEIGHTS} there states its sha256"
)


class DinoV2Features:
    """The class token of DINOv2 after its last norm: 1024 features of ViT-L/14.

    Images are resized to 224x224 bicubic with antialiasing in float32, neither rounded nor clamped, scaled to
    [0, 1], and normalised by ImageNet's mean and standard deviation.

    Args:
        source: A local folder with config.json and model.safetensors, or a name on the Hugging Face hub.
        sha256: Expected hash of model.safetensors; 64 hexadecimal digits.
        device: Where to compute.

    Raises:
        MissingExtra: If transformers is not installed.
        ValueError: If the weights are missing, or are others.

    Ref: Oquab et al. 2023 (arXiv 2304.07193).
    """

    name = "dinov2"
    resize = f"{_SIDE}x{_SIDE} bicubic with antialiasing, scaled to [0, 1], ImageNet mean and std"

    def __init__(
        self, source: str | Path = DINOV2, *, sha256: str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        with needed("DINOv2"):
            from transformers import Dinov2Model
        folder = _find(source)
        self.sha256 = sha256_of(folder / _WEIGHTS)
        check_sha256(folder / _WEIGHTS, self.sha256, sha256)
        try:
            loaded: Any = Dinov2Model.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
            network, report = loaded
            # transformers would go on with random numbers in their place.
            if report["missing_keys"]:
                missing = sorted(report["missing_keys"])
                raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder} does not hold a DINOv2 network ({error}): {_HOW_TO_GET}") from error
        self._device = torch.device(device)
        self._network = network.to(self._device).eval().requires_grad_(False)
        self.num_features = int(network.config.hidden_size)

    @torch.no_grad()
    def features(self, images: np.ndarray | Tensor) -> Tensor:
        """Features of images, `[N, D]` float32 on the CPU; images and errors as in `InceptionFeatures.features`."""
        rgb = as_rgb(images, self.name).to(self._device)
        if not len(rgb):
            return torch.empty(0, self.num_features)
        resized = functional.interpolate(
            rgb.float(), (_SIDE, _SIDE), mode="bicubic", align_corners=False, antialias=True
        )
        mean, std = (torch.tensor(v, device=self._device)[:, None, None] for v in (_MEAN, _STD))
        found: Tensor = self._network(pixel_values=(resized / 255 - mean) / std).last_hidden_state
        return found[:, 0].cpu()


def _find(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        missing = [name for name in (_CONFIG, _WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {' and '.join(missing)}: {_HOW_TO_GET}")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(source), allow_patterns=[_CONFIG, _WEIGHTS]))
    # Errors of the hub, of its client and of the network have no common base class.
    except (OSError, ValueError, RuntimeError, HFValidationError) as error:
        raise ValueError(
            f"{source} is not a folder here, and the Hugging Face hub did not provide it ({type(error).__name__}): "
            f"{_HOW_TO_GET}"
        ) from error
