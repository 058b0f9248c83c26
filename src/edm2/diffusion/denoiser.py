"""The denoiser: any network behind EDM's preconditioning.

Ref: EDM2 Eq. 4-8 and 21; EDM (arXiv 2206.00364) Sec. 5, Table 1.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edm2.diffusion.uncertainty import LearnedUncertainty
from edm2.nn import UNet

# State of A to F before their letter was a buffer of the network.
_OLD_CONFIG = "ladder_config"


class Denoiser(nn.Module):
    """`D(x; sigma) = c_skip x + c_out F(c_in x, c_noise, labels)` for any network F.

    Args:
        network: F, called as `network(x, c_noise, labels)` with x `[B, C, H, W]` of unit magnitude in `dtype`, c_noise
            `[B]` float32, and labels `[B, label_dim]` float32 or None; it returns `[B, C, H, W]`. If its `forward` has
            arguments called dropout_index, dropout_seed or augment_labels, it is given those too, as described in
            `edm2.nn.UNet.forward`.
        sigma_data: Standard deviation of the data.
        uncertainty: Module from sigma to u(sigma), such as `LearnedUncertainty`. None: u is 0.
        dtype: Precision of F: float32, bfloat16 or float16. The preconditioning stays in float32, the parameters
            in theirs.
        img_resolution: Side of square images, or (height, width). None, here and below: the network's attribute of
            that name; where it has none, images of any size are accepted.
        img_channels: Channels of the images.
        label_dim: Number of classes, or length of a label vector; 0 for a denoiser that ignores labels. Where it is
            unknown, the network is given labels as they are.
        options: Arguments that build the same denoiser again, as JSON values; `build_denoiser` fills them in.

    Attributes:
        dtype: Precision of F; may be changed at any time.
        unet: The network, under the name that it has in the states of the released models.
        options: Arguments that build the same denoiser again; empty if unknown.

    Raises:
        ValueError: If dtype is not one of the three.
    """

    img_resolution: tuple[int, int] | None
    img_channels: int | None
    label_dim: int | None

    def __init__(
        self,
        network: nn.Module,
        *,
        sigma_data: float = 0.5,
        uncertainty: nn.Module | None = None,
        dtype: torch.dtype | str = torch.float32,
        img_resolution: int | Sequence[int] | None = None,
        img_channels: int | None = None,
        label_dim: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.dtype = _float_dtype(dtype)
        self.sigma_data = sigma_data
        self.unet = network
        if isinstance(uncertainty, LearnedUncertainty):
            # The released states have its layers beside the network: these are registered, and it is not.
            self.logvar_fourier, self.logvar_linear = uncertainty.fourier, uncertainty.linear
            self.__dict__["uncertainty"] = uncertainty
        else:
            self.uncertainty = uncertainty
        size: Any = getattr(network, "img_resolution", None) if img_resolution is None else img_resolution
        self.img_resolution = (size, size) if isinstance(size, int) else size and (size[0], size[1])
        self.img_channels = getattr(network, "img_channels", None) if img_channels is None else img_channels
        self.label_dim = getattr(network, "label_dim", None) if label_dim is None else label_dim
        self.takes_vectors = bool(self.label_dim) and getattr(network, "label_kind", "class") == "vector"
        self.cond_channels: int = getattr(network, "cond_channels", 0)
        self.augment_dim: int = getattr(network, "augment_dim", 0)
        self.options = dict(options or {})
        self._arguments = set(inspect.signature(network.forward).parameters)

    @property
    def network(self) -> nn.Module:
        """The network F."""
        return self.unet

    @property
    def img_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images.

        Raises:
            ValueError: If they are unknown.
        """
        if self.img_resolution is None or self.img_channels is None:
            raise ValueError(
                "the denoiser does not know the size of its images: give Denoiser img_resolution and img_channels"
            )
        return (self.img_channels, *self.img_resolution)

    @property
    def title(self) -> str:
        """The network in words, such as "config A, EDM baseline"."""
        if isinstance(self.unet, UNet):
            return f"config {self.unet.features.name}, {self.unet.features.title}"
        return str(self.options.get("network_from", type(self.unet).__name__))

    @property
    def has_keyed_dropout(self) -> bool:
        """Whether dropout is a function of the image; otherwise it draws from torch's generator."""
        return "dropout_index" in self._arguments

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
            sigma: Standard deviation of the noise, > 0: a scalar, or any shape with B elements.
            labels: `[B]` class indices (int), `[B, label_dim]` one-hot or vector (float), or None for a missing
                label. An unconditional denoiser ignores them, so that it can guide a conditional one.
            return_logvar: Whether to return `(denoised, logvar)`, with logvar `[B, 1, 1, 1]` the learned u(sigma).
            condition: `[B, cond_channels, H, W]` image given as a condition, of unit magnitude; it enters clean, not
                scaled by c_in.
            augment_labels: `[B, augment_dim]`, how the images were augmented; None, like zeros, for not at all.
            dropout_index: `[B]` int64, see `edm2.nn.UNet.forward`.
            dropout_seed: See `edm2.nn.UNet.forward`.

        Returns:
            `[B, C, H, W]` float32.

        Raises:
            ValueError: If images, noise levels, labels, condition or augment_labels do not fit. Class indices are
                checked on the CPU only: elsewhere the check would wait for the device.
        """
        self._check(x, sigma, condition, augment_labels)
        x = x.to(torch.float32)
        sigma = sigma.to(x.device, torch.float32, non_blocking=x.is_cuda).reshape(-1, 1, 1, 1)
        variance = sigma.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data * variance.rsqrt()
        c_in = variance.rsqrt()
        c_noise = sigma.flatten().log() / 4

        inputs = c_in * x
        if condition is not None:
            inputs = torch.cat([inputs, condition.to(torch.float32)], dim=1)
        given = {
            "dropout_index": dropout_index,
            "dropout_seed": dropout_seed,
            "augment_labels": augment_labels,
        }
        extra = {name: value for name, value in given.items() if name in self._arguments}
        raw = self.unet(inputs.to(self.dtype), c_noise, self.encode_labels(labels), **extra)
        denoised = c_skip * x + c_out * raw.to(torch.float32)
        return (denoised, self.logvar(sigma)) if return_logvar else denoised

    def given(self, condition: Tensor | None = None, vectors: Tensor | None = None) -> "GivenDenoiser":
        """Bind this denoiser to a condition, vectors or both, for samplers and guidance; see `GivenDenoiser`.

        Args:
            condition: `[N, cond_channels, H, W]`, see `forward`.
            vectors: `[N, label_dim]` float, for a network of `label_kind` "vector".
        """
        return GivenDenoiser(self, condition, vectors)

    def logvar(self, sigma: Tensor) -> Tensor:
        """u(sigma), the log of the expected weighted squared error, `[B, 1, 1, 1]`; 0 without an uncertainty."""
        if self.uncertainty is None:
            return torch.zeros_like(sigma, dtype=torch.float32).reshape(-1, 1, 1, 1)
        u: Tensor = self.uncertainty(sigma)
        return u

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + _OLD_CONFIG in state_dict:
            state_dict[f"{prefix}unet.config"] = state_dict.pop(prefix + _OLD_CONFIG)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check(
        self, x: Tensor, sigma: Tensor, condition: Tensor | None, augment_labels: Tensor | None
    ) -> None:
        if x.ndim != 4:
            raise ValueError(f"images of shape {_shape(x)} must be [B, C, H, W]")
        channels = x.shape[1] if self.img_channels is None else self.img_channels
        height, width = x.shape[2:] if self.img_resolution is None else self.img_resolution
        if x.shape[1:] != (channels, height, width):
            raise ValueError(
                f"images of shape {_shape(x)}: this denoiser was built for {channels} x {height} x {width}, and where "
                "it has attention depends on that; resize the images, or build it with their img_resolution and "
                "img_channels"
            )
        # Not `len(x)`, a plain number, to which torch.export would bind the batch.
        if sigma.numel() != x.shape[0] and sigma.numel() != 1:
            raise ValueError(
                f"{sigma.numel()} noise levels for {len(x)} images: give one for all, or one for each"
            )
        if (condition is None) != (self.cond_channels == 0):
            raise ValueError(
                f"this denoiser has cond_channels={self.cond_channels} and was {'not ' if condition is None else ''}"
                "given a condition; it takes [B, cond_channels, H, W]"
            )
        if augment_labels is not None and self.augment_dim == 0:
            raise ValueError(
                "this denoiser was given augment_labels and has no augment_dim: leave them out, or build it with "
                f"augment_dim={augment_labels.shape[-1]}"
            )
        if augment_labels is not None and augment_labels.shape[1:] != (self.augment_dim,):
            raise ValueError(
                f"augment_labels of shape {_shape(augment_labels)} must be [B, {self.augment_dim}]"
            )

    def encode_labels(self, labels: Tensor | None) -> Tensor | None:
        """Labels as the network takes them, `[B, label_dim]` float32 or None; errors as in `forward`."""
        if labels is None or self.label_dim is None:
            return labels
        if self.label_dim == 0:
            return None
        if labels.is_floating_point():
            if labels.ndim != 2 or labels.shape[1] != self.label_dim:
                raise ValueError(f"float labels of shape {_shape(labels)} must be [B, {self.label_dim}]")
            return labels
        if labels.ndim != 1:
            raise ValueError(f"class indices of shape {_shape(labels)} must be [B]; one-hot labels are float")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.label_dim:
                raise ValueError(
                    f"class index {low if low < 0 else high} is outside 0..{self.label_dim - 1}; "
                    "pass labels=None for a missing label"
                )
        return (labels[:, None] == torch.arange(self.label_dim, device=labels.device)).float()


class GivenDenoiser:
    """A denoiser bound to a condition, vectors or both: an ordinary denoiser `(x, sigma, labels)`.

    For a batch of k N images, the N conditions and vectors are repeated k times.

    Args:
        network: Called as `network(x, sigma, labels, condition=condition)`; a `Denoiser`, or a copy of one.
        condition: `[N, cond_channels, H, W]` of unit magnitude, or None.
        vectors: `[N, label_dim]` float, which take the place of labels where none are given, or None. Labels given
            in a call replace them, and a row of zeros means that nothing is known.

    Raises:
        ValueError: From a call, if the batch is not a multiple of N.
    """

    def __init__(
        self, network: Callable[..., Tensor], condition: Tensor | None = None, vectors: Tensor | None = None
    ) -> None:
        self.network, self.condition, self.vectors = network, condition, vectors

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        """Noisy images, noise level and labels -> the expected clean images, all as in `Denoiser.forward`."""
        labels = _repeated(self.vectors, len(x)) if labels is None else labels
        if self.condition is None:
            return self.network(x, sigma, labels)
        return self.network(x, sigma, labels, condition=_repeated(self.condition, len(x)))


def _repeated(given: Tensor | None, size: int) -> Tensor | None:
    if given is None or len(given) == size:
        return given
    if size % len(given):
        raise ValueError(
            f"{size} images for conditions or vectors of {len(given)}: give one for each image, or a divisor of their "
            "number"
        )
    return given.repeat(size // len(given), *[1] * (given.ndim - 1))


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _float_dtype(dtype: torch.dtype | str) -> torch.dtype:
    value = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if value not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype {dtype!r} is not float32, bfloat16 or float16")
    assert isinstance(value, torch.dtype)
    return value
