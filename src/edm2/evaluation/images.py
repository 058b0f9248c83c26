"""Images to measure, opened from whatever the user names, with their provenance."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edm2.data import FileDataset, ImageDataset, open_dataset
from edm2.data.files import list_files
from edm2.data.views import Subset
from edm2.files import read_json
from edm2.generate.archive import SETTINGS_FILE
from edm2.progress import Progress

MIN_IMAGES = 6  # five nearest neighbours, and the image itself
_GRID = "grid.png"


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images with their provenance.

    Attributes:
        dataset: The images, uint8.
        provenance: JSON; source, fingerprint, num_images, shape, class_counts, seeds, sampling.
    """

    dataset: ImageDataset
    provenance: dict[str, Any]

    def batches(self, size: int, *, rank: int, world_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Indices and images of this process's share, in order, with progress on the first process."""
        mine = np.array_split(np.arange(len(self.dataset)), world_size)[rank]
        with Progress("features", len(mine), "images", quiet=rank > 0) as progress:
            for start in range(0, len(mine), size):
                indices = mine[start : start + size]
                yield indices, self.dataset.images(indices)
                progress.advance(len(indices))


def open_images(
    source: str,
    *,
    split: str = "train",
    num_classes: int | None = None,
    count: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """Open images to measure.

    Args:
        source: A folder that `edm2 sample` wrote, or anything that `edm2.data.open_dataset` takes.
        split: Split to open, if the source has several.
        num_classes: The reference's, to count classes of samples whose class is their seed modulo that number.
        count: Number of images to choose at random; None: all.
        seed: Seed of that choice.

    Raises:
        ValueError: As in `open_dataset`, or for too few or too many images, or images that are not uint8.
    """
    folder = Path(source).expanduser()
    seeds: list[int] | None = None
    sampling = None
    if (folder / SETTINGS_FILE).is_file():
        dataset, seeds, sampling = _samples(folder)
    else:
        dataset = open_dataset(source, split=split)
    if dataset.dtype != np.uint8:
        raise ValueError(
            f"the images of {source} are {dataset.dtype}, not uint8: extractors see pictures, so decode latents first"
        )
    if len(dataset) < MIN_IMAGES:
        raise ValueError(f"{source} holds {len(dataset)} images: at least {MIN_IMAGES} are needed")
    total, labels = len(dataset), None
    if count is not None and not MIN_IMAGES <= count <= total:
        raise ValueError(
            f"--num {count} must be from {MIN_IMAGES} to {total}, the number of images of {source}"
        )
    if count is not None:
        rows = np.sort(np.random.default_rng(seed).permutation(total)[:count])
        dataset = Subset(dataset, rows)
        seeds = None if seeds is None else [seeds[row] for row in rows]
    if seeds is not None and num_classes and sampling and sampling.get("labels") == "seed modulo classes":
        labels = np.array(seeds) % num_classes
    elif dataset.num_classes:
        labels, num_classes = dataset.labels(np.arange(len(dataset))), dataset.num_classes
    provenance = {
        "source": source if sampling or folder.exists() else f"{source} ({split})",
        "fingerprint": dataset.fingerprint,
        "num_images": len(dataset),
        "shape": list(dataset.image_shape),
        "class_counts": None if labels is None else np.bincount(labels, minlength=num_classes or 0).tolist(),
        "seeds": None if seeds is None else seed_text(seeds),
        "sampling": sampling,
        **({} if count is None else {"chosen_from": total, "choice_seed": seed}),
    }
    return ImageSet(dataset=dataset, provenance=provenance)


def seed_text(seeds: list[int]) -> str:
    """Seeds as `edm2 sample` takes them: `0-63,70`."""
    ordered = np.sort(np.array(seeds))
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1)
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _samples(folder: Path) -> tuple[ImageDataset, list[int] | None, dict[str, Any]]:
    catalog = list_files(folder, labels=False)
    # The contact sheet is in the folder of the images that it shows.
    names = [name for name in catalog.names if name != _GRID]
    try:
        sampling = dict(read_json(folder / SETTINGS_FILE))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / SETTINGS_FILE} is damaged ({error}): sample again") from error
    stems = [Path(name).stem for name in names]
    seeds = [int(stem) for stem in stems] if all(stem.isdecimal() for stem in stems) else None
    return FileDataset(catalog._replace(names=names)), seeds, sampling
