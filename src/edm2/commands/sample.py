"""`edm2 sample`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from edm2.commands.metrics_ensemble import report
from edm2.commands.next_step import tell_next
from edm2.commands.sampling import (
    Sampling,
    chosen_cases,
    chosen_path,
    open_guide,
    sampler_options,
    with_saved,
)
from edm2.data import LatentDecoder, read_given
from edm2.data.autoencoder import RELEASED_AUTOENCODER, PixelRange
from edm2.data.npy import open_array, read_arrays
from edm2.forecast import make_ensemble
from edm2.generate import ImageGenerator, parse_seeds, read_coding, write_samples
from edm2.generate.checks import class_index
from edm2.progress import show
from edm2.train.run_folder import CONFIG_FILE
from edm2.train.world import join_world


@dataclass(kw_only=True)
class _Sample(Sampling):
    """Generate images with a model: one file per seed, and a grid.

    Run the same command again to continue after an interruption.

    A tuned run (`edm2 tune`), a shared folder and the settings of a released model are sampled with their saved
    settings, unless EMA, guide, guidance or interval are given. An image depends only on its seed; under torchrun the
    processes share the seeds.
    """

    out: Path
    """Folder for the images, or a .zip file (in the layout of data sets) or .npz file. With --members, an .npz, .nc or
    .zarr file."""
    seeds: str = "0-63"
    """One image per seed: 0-63 or 1,5,10-12. The seed determines noise and class."""
    label: str | None = None
    """Class of all images, by name or number. Default: seed modulo the number of classes."""
    labels: Path | None = None
    """.npy file of classes, or of vectors in the units of the training data. Each image uses row (seed modulo number
    of rows)."""
    conditions: str | None = None
    """Condition images, in the units of the training data: a .npy file, an .npz file with `conditions` (and `vectors`
    and `labels`, if the model takes them), or any source of images that `edm2 train --condition` takes. Each image
    uses row (seed modulo number of rows)."""
    vae: str | None = None
    """AutoencoderKL that decodes a latent model's latents: a name on the hub, or a folder.
    Default: stabilityai/sd-vae-ft-mse."""
    pixel_range: PixelRange = "zero-one"
    """Scale of the autoencoder's output, as in `edm2 data encode`."""
    vae_batch: int = 8
    """Images that the autoencoder decodes at a time."""
    latents: bool = False
    """Write a latent model's latents undecoded, as .npy files or one .npz, instead of pictures."""
    grid: int = 400
    """Maximum number of images in the grid; 0 for no grid."""
    members: int | None = None
    """Sample an ensemble of this many members for each condition into one file, instead of one image per seed. Member
    m of case i depends only on --seed, i and m."""
    cases: str | None = None
    """Conditions to sample an ensemble for: 0-9 or 0,5,7. Default: all."""
    seed: int = 0
    """Seed of an ensemble."""
    truth: Path | None = None
    """.npy file of the true images [N, C, H, W] (NaN where values are missing), to score an ensemble. Default: `images`
    in the .npz file of --conditions."""


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 sample`."""
    chosen = tyro.cli(_Sample, prog=prog, args=list(words))
    path = chosen_path(chosen)
    chosen, path = with_saved(chosen, path)
    options = sampler_options(chosen)
    if chosen.members is not None:
        return _ensemble(chosen, path, options)
    if chosen.cases is not None:
        raise ValueError(f"--cases {chosen.cases} is for ensembles: give --members too, or choose --seeds")
    seeds = parse_seeds(chosen.seeds)
    made = _sample(chosen, path, seeds, options)
    if made is not None:
        show(made)
        if (path / CONFIG_FILE).is_file():
            tell_next("report", path)


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
            **_given(chosen, generator),
            guide=open_guide(chosen, path, common, generator),
            batch_size=chosen.batch,
            grid=chosen.grid,
            world=world,
            **options,
        )
        return made if world.is_first else None


def _ensemble(chosen: _Sample, path: Path, options: dict[str, Any]) -> None:
    """Sample members for each condition, and show their scores where the truth is known."""
    assert chosen.members is not None
    if chosen.conditions is None:
        raise ValueError("--members is for models that are conditioned on images: give --conditions")
    with join_world(chosen.device) as world:
        common: dict[str, Any] = dict(device=world.device, dtype=chosen.dtype, compile=chosen.compile)
        generator = ImageGenerator.load(path, chosen.ema, num_images=chosen.ema_images, **common)
        given = _given(chosen, generator)
        if isinstance(given["labels"], int):
            given["labels"] = np.full(len(given["conditions"]), given["labels"])
        given["truth"] = _truth(chosen)
        if chosen.cases is not None:
            count = len(given["conditions"])
            rows = chosen_cases(chosen.cases, count, chosen.conditions)
            # What is of another length is refused below, unless it belongs to these cases.
            whole = {name for name, array in given.items() if array is not None and len(array) == count}
            given |= {"numbers": rows, **{name: given[name][rows] for name in whole}}
        made = make_ensemble(
            generator,
            given.pop("conditions"),
            chosen.out,
            members=chosen.members,
            seed=chosen.seed,
            guide=open_guide(chosen, path, common, generator),
            batch_size=chosen.batch,
            world=world,
            **given,
            **options,
        )
        if world.is_first:
            report(made, chosen.out, title=f"Ensemble by {path.name}")


def _truth(chosen: _Sample) -> np.ndarray | None:
    if chosen.truth is not None:
        return _read_array(chosen.truth)
    path = Path(chosen.conditions or "")
    if path.suffix != ".npz":
        return None
    images = read_arrays(path, ["images"]).get("images")
    return images[:, None] if images is not None and images.ndim == 3 else images


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


def _given(chosen: _Sample, generator: ImageGenerator) -> dict[str, Any]:
    """Labels, conditions and vectors from the options and the file of conditions."""
    if chosen.labels is not None and chosen.label is not None:
        raise ValueError("--label and --labels exclude each other: give one")
    given: dict[str, Any] = {"labels": None}
    if chosen.label is not None:
        given["labels"] = class_index(chosen.label, generator.class_names, generator.num_classes)
    coding = generator.coding
    if chosen.conditions is not None:
        path = Path(chosen.conditions)
        if path.suffix == ".npy" and coding.condition is None:
            given["conditions"] = _read_array(path)
        else:
            found = read_given(chosen.conditions, missing=coding.condition is not None)
            given["conditions"] = found.conditions
            if found.vectors is not None and coding.vectors is not None:
                given["vectors"] = found.vectors
            if found.labels is not None and generator.num_classes and chosen.label is None:
                given["labels"] = found.labels
    if chosen.labels is not None:
        array = _read_array(chosen.labels)
        is_vectors = coding.vectors is not None and array.dtype.kind == "f"
        given["vectors" if is_vectors else "labels"] = array
    return given


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.array(open_array(path))
        torch.as_tensor(array[:1])
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a .npy file of numbers ({error})") from error
    if not len(array):
        raise ValueError(f"{path} holds no rows of numbers: write it with numpy.save")
    return array
