"""The autoencoder between pictures and latents: diffusers' `AutoencoderKL`, with the scale of its pixels.

Ref: docs/data.md.
"""

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from edm2.extras import need

RELEASED_AUTOENCODER = "stabilityai/sd-vae-ft-mse"
# Values of black and white at the autoencoder's input and output.
PixelRange = Literal["zero-one", "minus-one-one"]


def load_autoencoder(
    name: str | Path, device: torch.device | str, dtype: torch.dtype = torch.float32, *, instead: str = ""
) -> Any:
    """Load diffusers' `AutoencoderKL`.

    Args:
        name: Name on the hub, such as `stabilityai/sd-vae-ft-mse`, or a folder that it was saved to. From a folder
            that holds a whole pipeline, the part `vae` is taken.
        device: Device for its weights.
        dtype: Type of its weights.
        instead: What can be done without it, for the end of an error's message.

    Raises:
        MissingExtra: If `diffusers` is not installed.
        ValueError: If it cannot load the autoencoder.
    """
    kind = need("diffusers", "decoding or encoding latents", instead=instead).AutoencoderKL
    options = {"subfolder": "vae"} if (Path(name) / "vae" / "config.json").exists() else {}
    try:
        # Weights in other formats are pickles, which run code when they are loaded.
        model = kind.from_pretrained(str(name), torch_dtype=dtype, use_safetensors=True, **options)
    except Exception as error:
        # diffusers and the hub raise dozens of kinds of errors: no network, no such name, no safetensors.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"the autoencoder {str(name)!r} could not be loaded ({reason}): give the "
            f"name of an AutoencoderKL on the hub, or the folder that one was saved to with safetensors{instead}"
        ) from error
    return model.eval().requires_grad_(False).to(device)


@torch.no_grad()
def encode_images(autoencoder: Any, images: Tensor, pixel_range: PixelRange) -> Tensor:
    """Encode pictures `[B, C, H, W]` uint8 to means, then standard deviations, of latents, float32 on the CPU."""
    x = images.to(device=autoencoder.device, dtype=torch.float32) / 255
    if pixel_range == "minus-one-one":
        x = 2 * x - 1
    found = autoencoder.encode(x.to(autoencoder.dtype)).latent_dist
    return torch.cat([found.mean, found.std], dim=1).float().cpu()


def autoencoder_digest(autoencoder: Any) -> str:
    """Digest of an autoencoder's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def check_pixel_range(pixel_range: str) -> None:
    """Raise ValueError unless it is one of `PixelRange`."""
    if pixel_range not in ("zero-one", "minus-one-one"):
        raise ValueError(f"pixel_range {pixel_range!r} must be zero-one or minus-one-one")


class LatentDecoder:
    """Decoder from latents to pictures.

    Args:
        autoencoder: From `load_autoencoder`.
        pixel_range: Values of black and white at its output: "zero-one" as for the models released with EDM2;
            "minus-one-one" as most autoencoders were trained.
        batch_size: Latents at a time; pictures have dozens of times as many values.
    """

    def __init__(
        self, autoencoder: Any, *, pixel_range: PixelRange = "zero-one", batch_size: int = 8
    ) -> None:
        check_pixel_range(pixel_range)
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} of the autoencoder must be at least 1")
        self.autoencoder, self.pixel_range, self.batch_size = autoencoder, pixel_range, batch_size
        self.num_channels: int = autoencoder.config.out_channels
        self.latent_channels: int = autoencoder.config.latent_channels

    @classmethod
    def load(
        cls, name: str | Path = RELEASED_AUTOENCODER, *, device: torch.device | str = "cpu", **options: Any
    ) -> "LatentDecoder":
        """Load the autoencoder as well.

        Args:
            name: See `load_autoencoder`; default: the autoencoder of the models released with EDM2.
            device: Device for its weights.
            **options: `pixel_range` and `batch_size`.

        Raises:
            ValueError: As in `load_autoencoder`, or if an option is out of range.
        """
        instead = ", or write the latents themselves: edm2 sample --latents --out latents.npz (no decoder in Python)"
        return cls(load_autoencoder(name, device, instead=instead), **options)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Decode latents in the autoencoder's own units, `[B, c, h, w]`, to `[B, C, H, W]` uint8.

        Ref: docs/data.md.
        """
        decoded = [self._decode(part) for part in latents.split(self.batch_size)]
        return torch.cat(decoded).to(latents.device)

    def to(self, device: torch.device | str) -> None:
        """Move the autoencoder to a device."""
        self.autoencoder.to(device)

    def identity(self) -> dict[str, str]:
        """Everything but the latents that pictures depend on."""
        return {"autoencoder": autoencoder_digest(self.autoencoder), "pixel_range": self.pixel_range}

    def _decode(self, latents: Tensor) -> Tensor:
        x = latents.to(device=self.autoencoder.device, dtype=self.autoencoder.dtype)
        pixels: Tensor = self.autoencoder.decode(x).sample.float()
        if self.pixel_range == "minus-one-one":
            pixels = (pixels + 1) / 2
        return (pixels.clamp(0, 1) * 255).to(torch.uint8)
