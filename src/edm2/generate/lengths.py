"""A run's models with several EMA lengths, one after the other in the same network; and without averaging."""

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from edm2.diffusion.description import build_from
from edm2.ema import reconstruct_many
from edm2.ema.storage.manifest import read_manifest
from edm2.generate.generator import ImageGenerator, read_coding
from edm2.generate.reconstructed import load_averages, snapshots_of
from edm2.nn import faster_channels_last, use_channels_last
from edm2.train.checkpoint import StoredTensors, newest
from edm2.train.run_folder import CHECKPOINTS


def generators(
    snapshots: Path,
    sigma_rels: Sequence[float],
    t: float | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Iterator[ImageGenerator]:
    """Models with several EMA lengths from a run's snapshots, all in the same network, one after the other.

    Args:
        snapshots: Folder of a run's snapshots.
        sigma_rels: EMA lengths.
        t: Time in images. None: that of the last snapshot.
        device: Device that images are made on.

    Yields:
        A generator for each length, valid until the next one is requested. Inaccurate lengths cause no warning,
        because they are only tried.

    Raises:
        ValueError: As in `edm2.ema.reconstruct`, or if the snapshots do not fit the network that they describe.
    """
    coding = read_coding(snapshots, sigma_rels[0])  # checks what they say of their network
    model = None
    for result in reconstruct_many(snapshots, sigma_rels, t, warn_above=math.inf):
        assert result.metadata is not None
        info = {**result.metadata["info"], "sigma_rel": result.sigma_rel}
        if model is None:
            denoiser = (
                build_from(result.metadata["network"], device="cpu").to(device).eval().requires_grad_(False)
            )
            if faster_channels_last(denoiser):
                use_channels_last(denoiser)
            model = ImageGenerator(denoiser, coding, info, fix_weights=True)
        load_averages(model.denoiser, snapshots, result)
        model = copy.copy(model)
        model.info = info
        yield model


def load_raw(run: Path) -> ImageGenerator:
    """The network of a run's newest checkpoint as it is, without any averaging.

    Raises:
        ValueError: If the run has no checkpoint or no snapshot.
    """
    checkpoint = newest(run / CHECKPOINTS)
    if checkpoint is None:
        raise ValueError(f"{run} has no checkpoint with raw weights: name an EMA length instead")
    length = read_manifest(snapshots_of(run)).snapshots[0].sigma_rel
    generator = ImageGenerator.load(run, length)
    stored = StoredTensors(checkpoint)
    raw = {name: stored.read("model", name) for name in stored.names("model")}
    generator.denoiser.load_state_dict(generator.denoiser.state_dict() | raw)
    generator.info |= {"sigma_rel": None, "num_images": int(checkpoint.name)}
    return generator
