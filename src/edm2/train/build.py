"""The parts of a run: its data, its device, its network."""

import dataclasses
import functools
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import edm2
from edm2.data import AUGMENT_DIM, ImageDataset, open_dataset
from edm2.diffusion import Denoiser, build_denoiser, register_network
from edm2.diffusion.own_network import build_own_denoiser
from edm2.ema.maths.plans import memory_bytes
from edm2.train.coding import Coding
from edm2.train.config import TrainConfig
from edm2.train.settings_file import run_settings

_MOST_FOR_AVERAGES = 0.25  # of the free memory: activations need the rest


def open_training_data(config: TrainConfig) -> ImageDataset:
    """Open the data set that the settings name.

    Raises:
        ValueError: If they name none, or as in `edm2.data.open_dataset`.
    """
    if not config.data:
        raise ValueError(
            "no training data: give --data with the path of an image folder, a ZIP, a .npy, .npz or Parquet file or a "
            "folder of IDX files, or the name digits or fashion-mnist, or hf://NAME"
        )
    return open_alike(
        config,
        config.data,
        condition=config.condition,
        max_images=config.dataset.max_images,
        verify=config.verify_data,
    )


def open_alike(
    config: TrainConfig,
    source: str,
    *,
    split: str = "train",
    condition: str | None = None,
    max_images: int | None = None,
    verify: bool = False,
) -> ImageDataset:
    """Open images in the form that the settings give to training images; other arguments as in `open_dataset`."""
    options = config.dataset
    return open_dataset(
        source,
        split=split,
        labels=options.labels,
        condition=condition,
        missing=options.missing == "mask",
        max_images=max_images,
        pad_to=options.pad_to,
        crop=options.crop,
        verify=verify,
        skip_damaged=options.skip_damaged,
    )


def open_run_data(run: Path) -> ImageDataset:
    """Open the training images of a run, for measuring.

    Raises:
        ValueError: If the folder is not a run, or as in `edm2.data.open_dataset`.
    """
    config = run_settings(run)
    if not config.data:
        raise ValueError(f"{run} does not name its training images: they were given to it in Python")
    return open_training_data(dataclasses.replace(config, verify_data=False))


def make_denoiser(config: TrainConfig, dataset: ImageDataset, coding: Coding) -> Denoiser:
    """The denoiser that fits the configuration and the data, with weights from torch's generator.

    Raises:
        ValueError: If the network cannot be built, or a network of the user's own has no use for `augment`.
    """
    _, height, width = dataset.image_shape
    size = height if height == width else (height, width)
    network = config.network
    label_dim = coding.label_dim or dataset.num_classes
    cond_channels = 0 if coding.condition is None else coding.condition.num_channels
    if config.network_from is not None:
        denoiser = build_own_denoiser(
            size,
            coding.num_channels,
            label_dim,
            network_from=register_network(config.network_from),
            # The letter chooses the uncertainty alone, which A lacks.
            config="A" if config.loss.uncertainty is False else config.config,
            sigma_data=config.loss.sigma_data,
            dtype=config.dtype,
        )
        if config.dataset.augment and denoiser.augment_dim != AUGMENT_DIM:
            raise ValueError(
                f"dataset.augment {config.dataset.augment} needs a network that takes augmentation labels: give "
                f"it an attribute augment_dim = {AUGMENT_DIM} and its forward an argument augment_labels, or leave "
                "augment out"
            )
        if denoiser.cond_channels != cond_channels or denoiser.takes_vectors != bool(coding.label_dim):
            kind = "vector" if coding.label_dim else "class"
            raise ValueError(
                f"this data needs a network with the attributes cond_channels = {cond_channels} and label_kind = "
                f"{kind!r}; that of {config.network_from} has cond_channels = {denoiser.cond_channels} and "
                f"{'vectors' if denoiser.takes_vectors else 'classes'}: see docs/own_network.md"
            )
        return denoiser
    return build_denoiser(
        size,
        coding.num_channels,
        label_dim,
        label_kind="vector" if coding.label_dim else "class",
        cond_channels=cond_channels,
        config=config.config,
        dtype=config.dtype,
        sigma_data=config.loss.sigma_data,
        logvar_channels=0 if config.loss.uncertainty is False else None,
        model_channels=network.model_channels,
        channel_mult=network.channel_mult,
        num_blocks=network.num_blocks,
        attn_resolutions=network.attn_resolutions,
        channels_per_head=network.channels_per_head,
        dropout=network.dropout,
        augment_dim=AUGMENT_DIM if config.dataset.augment else 0,
    )


def check_given(config: TrainConfig, denoiser: Denoiser) -> None:
    """Check that the data gives the network what the settings rely on.

    Raises:
        ValueError: If there are no labels to leave out, or nothing to expect an image from.
    """
    if config.label_dropout and not denoiser.label_dim:
        raise ValueError(
            f"label_dropout {config.label_dropout} has no effect, because the training data has no labels: leave "
            "it out, or give data with classes"
        )
    if config.objective == "mean" and not (denoiser.label_dim or denoiser.cond_channels):
        raise ValueError(
            "objective mean needs something to expect the image from: give data with conditions, vectors or classes"
        )


def pick_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: If there is no such device here.
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


def checkpoint_activations(blocks: Sequence[nn.Module], *, keyed_dropout: bool) -> None:
    """Let modules drop their activations in the forward pass and compute them again in the backward pass.

    Costs a forward pass, saves most of the memory, and changes no value.

    Args:
        blocks: Modules to change, in place.
        keyed_dropout: Whether dropout is a function of the image; otherwise torch's generator is set back for the
            second computation.
    """
    for block in blocks:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=not keyed_dropout
        )


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile each module's forward pass by itself, for training; without gradients it stays as it is.

    Hooks stay outside, and shapes are fixed. A block at a time takes less than half the time of a whole network.

    Args:
        blocks: Modules to change, in place.
    """
    import torch._dynamo.config as limits  # loads slowly

    # Blocks of one class share their compiled forms, of which there may be one for each block.
    limits.recompile_limit = max(limits.recompile_limit, 2 * len(blocks))
    for block in blocks:
        compiled = torch.compile(block.forward, dynamic=False)
        block.forward = functools.partial(_forward, compiled, block.forward)


def _forward(compiled: Callable[..., Any], plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {"edm2": edm2.__version__, "torch": torch.__version__, "numpy": np.__version__}


@functools.cache
def git_state() -> dict[str, str | bool] | None:
    """Git commit of edm2's code, and whether it was changed since; None for an installed package."""
    folder = Path(__file__).parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        # An installed copy may lie inside another repository, which does not track it.
        if not git("ls-files", "--", "__init__.py"):
            return None
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return None


def ema_device(config: TrainConfig, denoiser: nn.Module) -> str | None:
    """Device for the averages of `PowerEMA`: `cpu` for host memory, None for that of the weights."""
    device = next(denoiser.parameters()).device
    if config.ema_device != "auto" or device.type != "cuda":
        return "cpu" if config.ema_device == "cpu" else None
    free, _ = torch.cuda.mem_get_info(device)
    num_params = sum(p.numel() for p in denoiser.parameters())
    needed = memory_bytes(num_params, len(config.ema.sigma_rels), updates=config.num_steps)
    return "cpu" if needed > _MOST_FOR_AVERAGES * free else None
