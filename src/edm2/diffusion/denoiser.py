"""The denoiser: the network behind EDM's preconditioning, with its learned uncertainty.

Ref: EDM2 Eq. 4-8 and 21; SPEC sections 2 and 3.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edm2.nn import UNet

# State of every config but G, whose state names are those of the released weights: which one it is.
_LETTER = "ladder_config"


class Denoiser(nn.Module):
    """`D(x; sigma) = c_skip x + c_out F(c_in x, c_noise, label)`, with F the U-Net of a configuration.

    Args:
        img_resolution: side of square images, or (height, width).
        img_channels: channels of the images.
        label_dim: number of classes, or length of a conditioning vector; 0 for an unconditional denoiser.
        config: configuration of the paper, `A` to `G`: network, preconditioning and uncertainty;
            `edm2.train.training_rules` has what training must do for it.
        dtype: precision of F: float32, bfloat16 or float16. The preconditioning stays in float32, the
            parameters in theirs; so do the embedding and the logits of attention in A and B.
        sigma_data: standard deviation of the data.
        logvar_channels: features of the uncertainty head, by default 128: the released G's number, and the
            paper gives none for B to F (LADDER section 16.3). Config A has no head.
        **unet_options: options of `edm2.nn.UNet`: model_channels, channel_mult, num_blocks,
            attn_resolutions, channels_per_head, dropout, label_kind, cond_channels, augment_dim and so on.

    Attributes:
        dtype: as above; may be changed at any time.
        config: the constructor's arguments as JSON-able values; `Denoiser(**config)` builds the same network.

    Raises:
        ValueError: for options that `UNet` refuses, or logvar_channels in config A.
    """

    def __init__(
        self,
        img_resolution: int | Sequence[int],
        img_channels: int,
        label_dim: int = 0,
        *,
        config: str = "G",
        dtype: torch.dtype | str = torch.float32,
        sigma_data: float = 0.5,
        logvar_channels: int | None = None,
        **unet_options: Any,
    ) -> None:
        super().__init__()
        self.dtype = _float_dtype(dtype)
        self.sigma_data = sigma_data
        self.img_channels = img_channels
        self.img_resolution = (
            (img_resolution,) * 2 if isinstance(img_resolution, int) else tuple(img_resolution)
        )
        self.label_dim = label_dim
        options = {key: list(v) if isinstance(v, (tuple, list)) else v for key, v in unet_options.items()}
        self.config = {
            "config": config,
            "img_resolution": img_resolution if isinstance(img_resolution, int) else list(img_resolution),
            "img_channels": img_channels,
            "label_dim": label_dim,
            "sigma_data": sigma_data,
            **options,
        }
        self.unet = UNet(img_resolution, img_channels, label_dim, config=config, **unet_options)
        features = self.unet.features
        self.logvar_linear: nn.Module | None = None
        if features.uncertainty:
            logvar_channels = 128 if logvar_channels is None else logvar_channels
            self.config["logvar_channels"] = logvar_channels
            self.logvar_fourier = features.fixed_functions.fourier(logvar_channels)
            self.logvar_linear = features.conv(logvar_channels, 1)
        elif logvar_channels is not None:
            raise ValueError(
                f"config {config} has no learned uncertainty, so no logvar_channels={logvar_channels}: leave it out"
            )
        if config != "G":
            self.register_buffer(_LETTER, torch.tensor(ord(config), dtype=torch.uint8))

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        return_logvar: bool = False,
        *,
        condition: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_index: Tensor | None = None,
        dropout_seed: int = 0,
    ) -> Any:
        """Estimate the clean images.

        Args:
            x: `[B, C, H, W]` noisy images, in the data's units.
            sigma: `[B]`, scalar, or any shape with B elements; standard deviation of the noise, > 0.
            labels: `[B]` class indices (int), `[B, label_dim]` one-hot or vector (float), or None for a
                missing label. An unconditional denoiser ignores them, so that it can guide a conditional one.
            return_logvar: return `(denoised, logvar)`, with logvar `[B, 1, 1, 1]` the learned u(sigma), which
                is 0 in config A.
            condition: `[B, cond_channels, H, W]` image given as a condition, of unit magnitude; it enters
                clean, not scaled by c_in.
            augment_labels: `[B, augment_dim]`, how the images were augmented; None, and zero, for not at all, as
                in sampling.
            dropout_index: `[B]` int64, see `edm2.nn.UNet.forward`.
            dropout_seed: see `edm2.nn.UNet.forward`.

        Returns:
            `[B, C, H, W]` float32.

        Raises:
            ValueError: for labels of the wrong form, a missing condition, augment_labels that do not fit, or class
                indices out of range (checked on the CPU only: elsewhere the check would wait for the device).
        """
        x = x.to(torch.float32)
        sigma = sigma.to(x.device, torch.float32, non_blocking=x.is_cuda).reshape(-1, 1, 1, 1)
        variance = sigma.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data * variance.rsqrt()
        c_in = variance.rsqrt()
        c_noise = sigma.flatten().log() / 4

        inputs = c_in * x
        if (condition is None) != (self.config.get("cond_channels", 0) == 0):
            raise ValueError(
                f"this denoiser has cond_channels={self.config.get('cond_channels', 0)} and was "
                f"{'not ' if condition is None else ''}given a condition; it takes [B, cond_channels, H, W]"
            )
        if condition is not None:
            inputs = torch.cat([inputs, condition.to(torch.float32)], dim=1)
        self._check_augment(augment_labels)
        raw = self.unet(
            inputs.to(self.dtype), c_noise, self._encode(labels), dropout_index, dropout_seed, augment_labels
        )
        denoised = c_skip * x + c_out * raw.to(torch.float32)
        return (denoised, self.logvar(sigma)) if return_logvar else denoised

    def logvar(self, sigma: Tensor) -> Tensor:
        """Learned uncertainty u(sigma), `[B, 1, 1, 1]`: the log of the weighted squared error to expect."""
        if self.logvar_linear is None:
            return torch.zeros_like(sigma, dtype=torch.float32).reshape(-1, 1, 1, 1)
        c_noise = sigma.to(torch.float32).flatten().log() / 4
        return self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own, theirs = self.config["config"], None
        if prefix + _LETTER in state_dict:
            theirs = chr(int(state_dict[prefix + _LETTER]))
        elif prefix + "unet.out_gain" in state_dict:
            theirs = "G"
        if theirs not in (None, own):
            raise ValueError(
                f"this state is of config {theirs} and cannot be loaded into config {own}: build the denoiser "
                f"with config={theirs!r}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_augment(self, labels: Tensor | None) -> None:
        if labels is None:
            return
        dim = self.unet.augment_dim
        if dim == 0:
            raise ValueError(
                "this denoiser was given augment_labels and has no augment_dim: leave them out, or build it with "
                f"augment_dim={labels.shape[-1]}"
            )
        if labels.ndim != 2 or labels.shape[1] != dim:
            raise ValueError(f"augment_labels of shape {tuple(labels.shape)} must be [B, {dim}]")

    def _encode(self, labels: Tensor | None) -> Tensor | None:
        if labels is None or self.label_dim == 0:
            return None
        if labels.is_floating_point():
            if labels.ndim != 2 or labels.shape[1] != self.label_dim:
                raise ValueError(f"float labels of shape {tuple(labels.shape)} must be [B, {self.label_dim}]")
            return labels
        if labels.ndim != 1:
            raise ValueError(
                f"class indices of shape {tuple(labels.shape)} must be [B]; one-hot labels are float"
            )
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.label_dim:
                raise ValueError(
                    f"class index {low if low < 0 else high} is outside 0..{self.label_dim - 1}; "
                    "pass labels=None for a missing label"
                )
        return (labels[:, None] == torch.arange(self.label_dim, device=labels.device)).float()


def _float_dtype(dtype: torch.dtype | str) -> torch.dtype:
    value = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if value not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype {dtype!r} is not float32, bfloat16 or float16")
    assert isinstance(value, torch.dtype)
    return value
