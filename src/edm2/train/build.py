"""What a run is made of: its data, its device, its network."""

import numpy as np
import torch

import edm2
from edm2.data import ImageDataset, open_dataset
from edm2.diffusion import Denoiser
from edm2.train.coding import Coding
from edm2.train.config import TrainConfig


def open_training_data(config: TrainConfig) -> ImageDataset:
    """Open the data set that a configuration names.

    Raises:
        ValueError: where it names none, or as `edm2.data.open_dataset` does.
    """
    if not config.data:
        raise ValueError(
            "no training data: give --data with the path of an image folder, a ZIP or a folder of IDX files, or "
            "the name digits or fashion-mnist"
        )
    return open_dataset(config.data, labels=config.dataset.labels, pad_to=config.dataset.pad_to)


def build_denoiser(config: TrainConfig, dataset: ImageDataset, coding: Coding) -> Denoiser:
    """The network that fits the configuration and the data, with weights from torch's generator."""
    _, height, width = dataset.image_shape
    network = config.network
    return Denoiser(
        height if height == width else (height, width),
        coding.num_channels,
        dataset.num_classes,
        dtype=config.dtype,
        sigma_data=config.loss.sigma_data,
        model_channels=network.model_channels,
        channel_mult=network.channel_mult,
        num_blocks=network.num_blocks,
        attn_resolutions=network.attn_resolutions,
        channels_per_head=network.channels_per_head,
        dropout=network.dropout,
    )


def pick_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: for another name, or a device that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used here ({str(error).splitlines()[0]}): use auto, cpu, cuda or cuda:N"
        ) from error
    return device


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    return {"edm2": edm2.__version__, "torch": torch.__version__, "numpy": np.__version__}
