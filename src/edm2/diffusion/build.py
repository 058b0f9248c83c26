"""The denoisers of the paper's configurations."""

from collections.abc import Sequence
from typing import Literal

import torch

from edm2.diffusion.denoiser import Denoiser
from edm2.diffusion.uncertainty import LearnedUncertainty
from edm2.nn import UNet


def build_denoiser(
    img_resolution: int | Sequence[int],
    img_channels: int,
    label_dim: int = 0,
    *,
    config: str = "G",
    dtype: torch.dtype | str = torch.float32,
    sigma_data: float = 0.5,
    logvar_channels: int | None = None,
    model_channels: int = 192,
    channel_mult: Sequence[int] = (1, 2, 3, 4),
    channel_mult_noise: int | None = None,
    channel_mult_emb: int | None = None,
    num_blocks: int = 3,
    channels_per_head: int = 64,
    label_kind: Literal["class", "vector"] = "class",
    cond_channels: int = 0,
    augment_dim: int = 0,
    dropout: float | None = None,
    attn_resolutions: Sequence[int] | None = None,
    clip_act: float | None = None,
    res_balance: float | None = None,
    attn_balance: float | None = None,
    label_balance: float | None = None,
    concat_balance: float | None = None,
) -> Denoiser:
    """Build the denoiser of one of the paper's configurations, untrained.

    Args:
        img_resolution: Side of square images, or (height, width).
        img_channels: Channels of the images.
        label_dim: Number of classes, or length of a label vector; 0 for an unconditional denoiser.
        config: `A` to `G`; `edm2.train.training_rules` has its settings for training.
        dtype: Precision of the network; in A and B, embedding and attention logits stay float32.
        sigma_data: Standard deviation of the data.
        logvar_channels: Features of the learned uncertainty, which config A lacks; 0 for none. None: 128, as in the
            released networks.
        model_channels: See `edm2.nn.UNet`, as for all others.
        channel_mult: Width of each level.
        channel_mult_noise: Noise features.
        channel_mult_emb: Width of the embedding.
        num_blocks: Residual blocks per level.
        channels_per_head: Width of an attention head.
        label_kind: `class` or `vector`.
        cond_channels: Channels of an image given as a condition.
        augment_dim: Length of the labels of augmentation.
        dropout: Dropout probability.
        attn_resolutions: Resolutions with attention.
        clip_act: Bound on a block's output.
        res_balance: Share of the residual branch.
        attn_balance: Share of the attention branch.
        label_balance: Share of the label.
        concat_balance: Share of the skip.

    Returns:
        A denoiser whose `options` are the arguments given, except dtype.

    Raises:
        ValueError: If `edm2.nn.UNet` refuses an option, or config A is given logvar_channels.
    """
    given = {name: value for name, value in locals().items() if value is not None and name != "dtype"}
    options = {name: list(v) if isinstance(v, (tuple, list)) else v for name, v in given.items()}
    network = UNet(**{name: v for name, v in given.items() if name not in ("sigma_data", "logvar_channels")})
    uncertainty = None
    if network.features.uncertainty and logvar_channels != 0:
        channels = options["logvar_channels"] = 128 if logvar_channels is None else logvar_channels
        uncertainty = LearnedUncertainty(channels, config=config)
    elif logvar_channels:
        raise ValueError(
            f"config {config} has no learned uncertainty, so no logvar_channels={logvar_channels}: leave it out"
        )
    return Denoiser(network, sigma_data=sigma_data, uncertainty=uncertainty, dtype=dtype, options=options)
