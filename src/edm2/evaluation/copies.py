"""Copies of training images among a run's samples: the check, its picture, and its section of a page."""

from pathlib import Path

import numpy as np

from edm2.data import ImageDataset
from edm2.metrics import CopyCheck, check_copies
from edm2.metrics.measure import kept_rows
from edm2.report import Page, image_grid
from edm2.train.build import open_alike, open_run_data
from edm2.train.settings_file import run_settings

PAIRS = 12
_MOST_TRAINING = 50_000


def training_images(run: Path) -> np.ndarray:
    """A run's training images, `[N, C, H, W]` uint8, or a random choice of 50,000.

    Raises:
        ValueError: If the data cannot be opened any more, or is not made of pixels.
    """
    dataset = open_run_data(run)
    if dataset.dtype != np.uint8:
        raise ValueError(f"the data of {run} is {dataset.dtype}, not pixels")
    return some_images(dataset)


def held_out_images(run: Path) -> np.ndarray | None:
    """The test split of a run's data, where it has one."""
    config = run_settings(run)
    if not config.data:
        return None
    try:
        test = open_alike(config, config.data, split="test")
    except (ValueError, OSError):
        return None
    return some_images(test)


def some_images(dataset: ImageDataset, most: int = _MOST_TRAINING) -> np.ndarray:
    """All images, or a random choice that is the same every time."""
    return dataset.images(kept_rows(len(dataset), most))


def copy_pairs(samples: np.ndarray, training: np.ndarray, check: CopyCheck, count: int = PAIRS) -> np.ndarray:
    """The samples closest to a training image, closest first, and then these training images, `[2 n, C, H, W]`."""
    closest = np.argsort(check.nearest.distance, kind="stable")[:count]
    return np.concatenate([samples[closest], training[check.nearest.indices[closest]]])


def add_copies(
    page: Page, samples: np.ndarray, training: np.ndarray, held_out: np.ndarray | None = None
) -> CopyCheck:
    """Write what the check of samples says, with the closest pairs as a picture."""
    check = check_copies(samples, training, held_out)
    against = "training images, each without itself" if held_out is None else "held-out images"
    page.text(f"{check.verdict[0].upper()}{check.verdict[1:]}.")
    pairs = copy_pairs(samples, training, check)
    page.image(
        image_grid(pairs, columns=len(pairs) // 2, scale=max(1, 48 // pairs.shape[-1])),
        "Above: the samples closest to a training image. Below: that training image",
        "Pairs of samples and their nearest training images",
    )
    rows = [
        [
            "median distance to the nearest training image",
            f"{check.median:.4f}",
            f"{check.median_held_out:.4f}",
        ],
        [f"nearer than 99% of the {against.split(',')[0]}", f"{100 * check.suspects:.1f}%", "1.0%"],
        ["authentic: further from it than it is from its own nearest", f"{100 * check.authentic:.1f}%", "-"],
        ["data-copying test C_T; below -3: nearer than chance explains", f"{check.c_t:.1f}", "0"],
    ]
    page.table(["", f"{len(samples):,} samples", against], rows, caption="RMS of pixels scaled to [0, 1]")
    return check
