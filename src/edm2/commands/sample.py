"""`edm2 sample`."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from edm2.data import LatentDecoder
from edm2.data.autoencoder import RELEASED_AUTOENCODER, PixelRange
from edm2.diffusion import SamplerName
from edm2.generate import ImageGenerator, SamplerOptions, parse_seeds, read_coding, write_samples
from edm2.hub import Parts, find_parts
from edm2.progress import show, tell
from edm2.train.world import join_world
from edm2.tuning.result import tuned_settings

_OPTIONS = [field.name for field in dataclasses.fields(SamplerOptions)]


@dataclass(kw_only=True)
class _Sample:
    """Make images with a model: one file per seed, and a grid. Run the same command again to continue after a stop.

    A tuned run (`edm2 tune`), a shared folder and the settings of a released model are sampled with their saved
    settings, unless EMA, guide, guidance or interval are given. An image depends only on its seed; under torchrun the
    processes share the seeds.
    """

    source: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of a run, model file, folder of `save_pretrained`, or NAME.json of `edm2 import`."""
    model: Path | None = None
    """The same, as an option."""
    out: Path
    """Folder for the images, or a file that ends in .zip (in the layout of data sets) or .npz."""
    seeds: str = "0-63"
    """One image per seed: 0-63 or 1,5,10-12. The seed determines noise and class."""
    ema: float | None = None
    """EMA length to reconstruct from the run's snapshots. Default: the model that the run saved."""
    ema_images: float | None = None
    """Time of that average, in training images. Default: the last snapshot."""
    label: int | None = None
    """Class of all images. Default: seed modulo the number of classes."""
    labels: Path | None = None
    """.npy file of classes or vectors; an image uses row (seed modulo number of rows)."""
    conditions: Path | None = None
    """.npy file of condition images of unit magnitude; an image uses row (seed modulo number of rows)."""
    guide: Path | None = None
    """Guide: an unconditional model, or a weaker one."""
    guide_ema: float | None = None
    """EMA length of the guide, reconstructed from the snapshots of --guide, or of the run itself. Needs --guidance."""
    guide_images: float | None = None
    """Time of the guide in training images, for an earlier moment of its run. Default: the last snapshot."""
    guidance: float | None = None
    """Guidance weight; 1 for none. Default: the saved or tuned weight, else 1."""
    interval: tuple[float, float] | None = None
    """Lowest and highest noise level at which guidance acts. Default: all."""
    sampler: SamplerName | None = None
    """heun runs the network twice at each noise level but the last, the others once; dpmpp-2m-sde adds noise.
    Default: heun, or the sampler that the run was tuned with."""
    num_steps: int | None = None
    """Number of noise levels. Default: 32, or the number that the run was tuned with."""
    sigma_min: float = 0.002
    """Lowest noise level."""
    sigma_max: float = 80.0
    """Highest noise level."""
    rho: float = 7.0
    """Exponent of the schedule."""
    s_churn: float = 0.0
    """Strength of the noise that the sampler heun adds; 0 is deterministic."""
    s_min: float = 0.0
    """Lowest noise level at which --s-churn adds noise."""
    s_max: float = math.inf
    """Highest noise level at which --s-churn adds noise."""
    s_noise: float = 1.0
    """Scale of the noise that heun (with --s-churn) and dpmpp-2m-sde add."""
    clip_denoised: bool = False
    """Clamp the denoised images of every step to the range of pixels."""
    vae: str | None = None
    """AutoencoderKL that decodes a latent model's latents: a name on the hub, or a folder.
    Default: stabilityai/sd-vae-ft-mse."""
    pixel_range: PixelRange = "zero-one"
    """Scale of the autoencoder's output, as in `edm2 data encode`."""
    vae_batch: int = 8
    """Images at a time through the autoencoder."""
    latents: bool = False
    """Write a latent model's latents undecoded, as .npy files or one .npz, instead of pictures."""
    batch: int = 250
    """Images at a time."""
    grid: int = 400
    """Maximum number of images on the grid; 0 for no grid."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network."""
    compile: bool = False
    """Use torch.compile, which takes minutes to start and pays off for many images."""


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 sample`."""
    chosen = tyro.cli(_Sample, prog=prog, args=list(words))
    if (chosen.source is None) == (chosen.model is None):
        raise ValueError("which model? Give one run or model file, either as the first word or with --model")
    path = chosen.source or chosen.model
    assert path is not None
    chosen, path = _with_saved(chosen, path)
    seeds = parse_seeds(chosen.seeds)
    options = {name: getattr(chosen, name) for name in _OPTIONS}
    if chosen.interval is None:
        del options["interval"]
    made = _sample(chosen, path, seeds, options)
    if made is not None:
        show(made)


def _with_saved(chosen: _Sample, path: Path) -> tuple[_Sample, Path]:
    """Fill in saved or tuned settings where the user chose none of them; returns the model's path, too."""
    names = ("ema", "ema_images", "guide", "guide_ema", "guide_images", "guidance", "interval")
    free = all(getattr(chosen, name) is None for name in names)
    parts = find_parts(path)
    if parts is None:
        saved = _tuned_settings(path) if free and path.is_dir() else {}
    else:
        saved, path = _shared_settings(parts) if free else {}, parts.model
    own = {"num_steps": chosen.num_steps, "sampler": chosen.sampler}
    guidance = 1.0 if chosen.guidance is None else chosen.guidance
    standard = {"num_steps": SamplerOptions.num_steps, "sampler": SamplerOptions.sampler}
    changes = {**standard, "guidance": guidance, **saved}
    changes |= {name: value for name, value in own.items() if value is not None}
    return dataclasses.replace(chosen, **changes), path


def _shared_settings(parts: Parts) -> dict[str, Any]:
    saved = parts.sampling
    settings: dict[str, Any] = {"num_steps": saved.num_steps, "sampler": saved.sampler}
    told = "no guidance"
    if parts.guide is not None:
        settings |= dict(guide=parts.guide, guidance=saved.guidance, interval=saved.interval)
        told = f"guidance {saved.guidance:g} by {parts.guide.name}"
    tell(f"edm2: saved settings: {told}; give {parts.model} for others")
    return settings


def _tuned_settings(run: Path) -> dict[str, Any]:
    settings, remarks = tuned_settings(run)
    for remark in remarks:
        tell(f"edm2: {remark}")
    return settings


def _sample(chosen: _Sample, path: Path, seeds: list[int], options: dict[str, Any]) -> Path | None:
    """Make the images; returns the written path in the first process."""
    with join_world(chosen.device) as world:
        common: dict[str, Any] = dict(device=world.device, dtype=chosen.dtype, compile=chosen.compile)
        decoder = _decoder(chosen, path, world.device)
        generator = ImageGenerator.load(
            path, chosen.ema, num_images=chosen.ema_images, decoder=decoder, **common
        )
        made = write_samples(
            generator,
            chosen.out,
            seeds,
            labels=_labels(chosen),
            conditions=None if chosen.conditions is None else _read_array(chosen.conditions),
            guide=_guide(chosen, path, common),
            batch_size=chosen.batch,
            grid=chosen.grid,
            world=world,
            **options,
        )
        return made if world.is_first else None


def _decoder(chosen: _Sample, path: Path, device: torch.device) -> LatentDecoder | None:
    """The decoder of a latent model's latents, opened before the model's weights are read."""
    kind = read_coding(path, chosen.ema).kind
    given = {
        "--vae": chosen.vae is not None,
        "--pixel-range": chosen.pixel_range != "zero-one",
        "--latents": chosen.latents,
    }
    for option in (name for name, is_given in given.items() if is_given):
        if kind != "latents":
            raise ValueError(f"{option} is for latent models, and {path} makes {kind}: leave it out")
        if chosen.latents and option != "--latents":
            raise ValueError(f"{option} and --latents exclude each other: latents are written undecoded")
    if kind != "latents" or chosen.latents:
        return None
    name = chosen.vae or RELEASED_AUTOENCODER
    return LatentDecoder.load(
        name, device=device, pixel_range=chosen.pixel_range, batch_size=chosen.vae_batch
    )


def _guide(chosen: _Sample, path: Path, common: dict[str, Any]) -> ImageGenerator | None:
    wanted = chosen.guide is not None or chosen.guide_ema is not None
    if chosen.guide_images is not None and chosen.guide_ema is None:
        raise ValueError(f"--guide-images {chosen.guide_images:g} needs --guide-ema, the guide's EMA length")
    if wanted and chosen.guidance == 1:
        raise ValueError(
            "a guide has no effect with --guidance 1: give another weight, or leave the guide out"
        )
    if chosen.interval is not None and chosen.guidance == 1:
        raise ValueError("--interval has no effect with --guidance 1: give a weight and a guide")
    if not wanted:
        if chosen.guidance != 1:
            raise ValueError(
                f"--guidance {chosen.guidance:g} needs a guide: give a model as --guide, or the EMA length of an "
                "earlier average of the run as --guide-ema (with --guide-images); --guidance 1 is none"
            )
        return None
    return ImageGenerator.load(
        chosen.guide or path, chosen.guide_ema, num_images=chosen.guide_images, **common
    )


def _labels(chosen: _Sample) -> int | np.ndarray | None:
    if chosen.labels is None:
        return chosen.label
    if chosen.label is not None:
        raise ValueError("--label and --labels exclude each other: give one")
    return _read_array(chosen.labels)


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
        torch.as_tensor(array[:1])
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a .npy file of numbers ({error})") from error
    if not isinstance(array, np.ndarray) or not len(array):
        raise ValueError(f"{path} holds no rows of numbers: write it with numpy.save")
    return array
