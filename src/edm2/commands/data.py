"""`edm2 data`: look at images, bring them to one size, encode them to latents and decode those."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from edm2.advice import words_for
from edm2.commands.next_step import run_for, tell_next
from edm2.data import ImageDataset, MirroredDataset, open_dataset
from edm2.data.autoencoder import RELEASED_AUTOENCODER, PixelRange, load_autoencoder
from edm2.data.prepare.chunks import Made
from edm2.data.prepare.convert import Conversion, convert_stream
from edm2.data.prepare.convert import convert as convert_catalog
from edm2.data.prepare.describe import describe
from edm2.data.prepare.describe_pairs import describe_pairs
from edm2.data.prepare.latents import check_encodable, decode_latents, encode_latents
from edm2.data.prepare.survey import survey
from edm2.data.sources import holds_pairs, open_catalog
from edm2.progress import show
from edm2.report.grids import save_png
from edm2.report.pair_figures import pair_table
from edm2.train.build import pick_device

Precision = Literal["float32", "bfloat16", "float16"]
_SOURCE = Annotated[str, tyro.conf.Positional]


@dataclass(kw_only=True)
class _Info:
    """Count images, sizes and classes, measure mean and standard deviation, and list what needs fixing."""

    source: _SOURCE
    """Folder, ZIP or folder inside one, .npy, .npz, zarr, NetCDF, IDX folder, Arrow or Parquet files, hf://NAME,
    digits or fashion-mnist."""
    condition: str | None = None
    """Condition images of these images, as in `edm2 train --condition`."""
    picture: Path | None = None
    """PNG file to draw pairs in, side by side."""
    split: str = "train"
    """Split, if the source has several."""
    labels: bool = True
    """Whether to read labels."""
    sample: int | None = None
    """Number of images whose pixels are read. Default: all, which finds every damaged image."""
    workers: int | None = None
    """Number of threads. Default: one per processor."""


@dataclass(kw_only=True)
class _Convert:
    """Bring images to one size and mode, in a new ZIP or folder.

    Run the same command again to continue after an interruption.
    """

    source: _SOURCE
    """See `edm2 data info`."""
    out: Path
    """New folder, or a name that ends in .zip."""
    size: str | None = None
    """Side in pixels, or HEIGHTxWIDTH. Default: unchanged."""
    method: Literal["center-crop", "center-crop-wide", "resize"] = "center-crop"
    """center-crop: cover the size and cut out the centre, as for ImageNet. center-crop-wide: the same, in the middle of
    a black square of the longer side. resize: stretch to the size."""
    filter: Literal["bicubic", "lanczos"] = "bicubic"
    """Filter for scaling. bicubic: as ImageNet was prepared."""
    mode: Literal["auto", "gray", "rgb", "rgba"] = "auto"
    """Mode of the images. auto: the mode that they share, or else rgb."""
    background: str | None = None
    """Colour that replaces transparent parts, by name or as #rrggbb. Default: transparency is kept."""
    split: str = "train"
    """Split, if the source has several."""
    labels: bool = True
    """Whether to keep labels."""
    stream: bool = False
    """Read a Hugging Face source from start to end without storing it."""
    skip_damaged: bool = False
    """Skip damaged images and count them, instead of stopping at the first one."""
    workers: int | None = None
    """Number of processes. Default: one per processor."""


@dataclass(kw_only=True)
class _Encode:
    """Encode images to latents: 2 x C channels, means then standard deviations.

    If conditions belong to the images, the means of their latents are written next to OUT, as OUT-conditions. Run the
    same command again to continue after an interruption.
    """

    source: _SOURCE
    """See `edm2 data info`; images of one size."""
    out: Path
    """New folder, or a name that ends in .zip."""
    vae: str
    """AutoencoderKL: a name on the hub, such as stabilityai/sd-vae-ft-mse, or a local folder."""
    condition: str | None = None
    """Condition images, as in `edm2 train --condition`."""
    means: bool = False
    """Write means alone, as for the conditions of `edm2 sample`."""
    mirror: bool = False
    """Also encode a mirrored copy of every image."""
    split: str = "train"
    """Split, if the source has several."""
    batch: int = 8
    """Images at a time."""
    pixel_range: PixelRange = "zero-one"
    """Scale of the autoencoder's input. zero-one: that of the models released with EDM2."""
    dtype: Precision = "float32"
    """Precision of the autoencoder; latents are stored in float32."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    skip_damaged: bool = False
    """Skip damaged images and count them."""


@dataclass(kw_only=True)
class _Decode:
    """Decode latents to pictures, the inverse of `edm2 data encode`.

    Run the same command again to continue after an interruption.
    """

    source: _SOURCE
    """Latents of `edm2 data encode` or of `edm2 sample --latents`."""
    out: Path
    """New folder, or a name that ends in .zip."""
    vae: str = RELEASED_AUTOENCODER
    """The AutoencoderKL that encoded them: a name on the hub, or a local folder."""
    batch: int = 8
    """Latents at a time."""
    pixel_range: PixelRange = "zero-one"
    """Scale of the autoencoder's output, as in `edm2 data encode`."""
    dtype: Precision = "float32"
    """Precision of the autoencoder."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""


def info(prog: str, words: Sequence[str]) -> None:
    """`edm2 data info`."""
    chosen = tyro.cli(_Info, prog=prog, args=list(words))
    if (pairs := _pairs(chosen)) is not None:
        show(describe_pairs(pairs, chosen.source))
        if chosen.picture is not None:
            show(save_png(pair_table(pairs), chosen.picture))
        return _tell_training(chosen, pairs)
    catalog = open_catalog(chosen.source, split=chosen.split, labels=chosen.labels)
    found = survey(catalog, sample=chosen.sample, workers=chosen.workers)
    show(describe(found))
    mending = words_for(found)
    if mending is not None:
        return tell_next(mending)
    tell_next("train", "--data", Path(chosen.source), "--out", run_for(chosen.source))


def _pairs(chosen: _Info) -> ImageDataset | None:
    """The data set, if something is given with its images or values are missing."""
    if chosen.condition is None and chosen.picture is None and not holds_pairs(chosen.source):
        return None
    return open_dataset(
        chosen.source, split=chosen.split, labels=chosen.labels, condition=chosen.condition, missing=True
    )


def _tell_training(chosen: _Info, pairs: ImageDataset) -> None:
    words: list[str | Path] = ["train", "--data", chosen.source]
    given = pairs.conditions
    if chosen.condition is not None:
        words += ["--condition", chosen.condition]
    if given is not None and given.image_shape[1:] != pairs.image_shape[1:]:
        words += ["--dataset.resample", "bicubic"]
    if pairs.missing or (given is not None and given.missing):
        words += ["--dataset.missing", "mask"]
    tell_next(*words, "--out", run_for(chosen.source))


def convert(prog: str, words: Sequence[str]) -> None:
    """`edm2 data convert`."""
    chosen = tyro.cli(_Convert, prog=prog, args=list(words))
    conversion = Conversion(
        size=_size(chosen.size),
        method=chosen.method,
        filter=chosen.filter,
        mode=chosen.mode,
        background=chosen.background,
    )
    if chosen.stream:
        done = convert_stream(
            chosen.source,
            chosen.out,
            conversion,
            split=chosen.split,
            skip_damaged=chosen.skip_damaged,
            workers=chosen.workers,
        )
    else:
        catalog = open_catalog(chosen.source, split=chosen.split, labels=chosen.labels)
        done = convert_catalog(
            catalog, chosen.out, conversion, skip_damaged=chosen.skip_damaged, workers=chosen.workers
        )
    show(_outcome(done))
    tell_next("train", "--data", done.path, "--out", run_for(done.path))


def encode(prog: str, words: Sequence[str]) -> None:
    """`edm2 data encode`."""
    chosen = tyro.cli(_Encode, prog=prog, args=list(words))
    dataset = open_dataset(
        chosen.source,
        split=chosen.split,
        condition=chosen.condition,
        verify=True,
        skip_damaged=chosen.skip_damaged,
    )
    dataset = MirroredDataset(dataset) if chosen.mirror else dataset
    autoencoder = _autoencoder(chosen)
    if dataset.conditions is not None:  # before the images are encoded, which takes long
        check_encodable(dataset.conditions, autoencoder)
    options: Any = {"batch_size": chosen.batch, "pixel_range": chosen.pixel_range}
    done = encode_latents(dataset, chosen.out, autoencoder, means=chosen.means, **options)
    show(f"{done.path}: {done.num_images:,} images of {(1 if chosen.means else 2) * len(done.mean)} channels")
    given = ""
    if dataset.conditions is not None:
        beside = chosen.out.with_name(f"{chosen.out.stem}-conditions{chosen.out.suffix}")
        encode_latents(dataset.conditions, beside, autoencoder, means=True, **options)
        show(f"{beside}: their conditions, of {len(done.mean)} channels")
        given = f" --condition {beside}"
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (done.mean, done.std))
    if not chosen.means:
        coding = f"--dataset.coding latents --dataset.mean {mean} --dataset.std {std}"
        show(f"train with: --data {done.path}{given} {coding}")


def decode(prog: str, words: Sequence[str]) -> None:
    """`edm2 data decode`."""
    chosen = tyro.cli(_Decode, prog=prog, args=list(words))
    done = decode_latents(
        open_dataset(chosen.source, verify=True),
        chosen.out,
        _autoencoder(chosen),
        batch_size=chosen.batch,
        pixel_range=chosen.pixel_range,
    )
    show(_outcome(done))


def _autoencoder(chosen: _Encode | _Decode) -> Any:
    return load_autoencoder(chosen.vae, pick_device(chosen.device), getattr(torch, chosen.dtype))


def _outcome(done: Made) -> str:
    lines = [f"{done.path}: {done.num_images:,} images"]
    if done.enlarged:
        lines.append(f"enlarged because smaller: {done.enlarged:,}")
    if done.skipped:
        lines.append(f"skipped because unreadable: {len(done.skipped):,}")
        lines += [f"  {name}: {reason}" for name, reason in done.skipped[:10]]
    return "\n".join(lines)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        sides = [int(part) for part in text.split("x")]
        height, width = sides * 2 if len(sides) == 1 else sides
    except ValueError:
        raise ValueError(f"--size {text!r} is not a size: write 64, or height and width as 64x96") from None
    return height, width
