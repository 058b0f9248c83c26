"""Scores for the models of a run: each is put together from its snapshots, makes images, and is judged by them."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from edm2.data import ImageDataset
from edm2.diffusion import Denoiser
from edm2.ema import reconstruct_many
from edm2.generate import Generator
from edm2.metrics import FeatureStatistics, fit_classifier, frechet_distance
from edm2.nn import use_channels_last
from edm2.train.coding import Coding


class Judge:
    """Frechet distances to a data set's training images, in features of a classifier trained on them.

    Args:
        dataset: real images with classes.

    Attributes:
        fingerprint: of the images and of the way they are judged.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        where = np.arange(len(dataset))
        images = dataset.images(where)
        self._extractor = fit_classifier(images, dataset.labels(where), num_classes=dataset.num_classes)
        self._reference = self._statistics(images)
        self.fingerprint = f"Frechet distance, classifier of {dataset.fingerprint}"

    def distance(self, images: np.ndarray) -> float:
        """Frechet distance of images, `[N, C, H, W]` uint8."""
        return frechet_distance(self._statistics(images), self._reference)

    def score(
        self, generator: Generator, seeds: Sequence[int], num_steps: int, sampler: str = "heun"
    ) -> float:
        """Frechet distance of the images of some seeds."""
        return self.distance(generator.images(seeds, num_steps=num_steps, sampler=sampler))

    def _statistics(self, images: np.ndarray) -> FeatureStatistics:
        found = FeatureStatistics()
        found.update(self._extractor.features(images))
        return found


def generators(snapshots: Path, sigma_rels: Sequence[float], t: float | None = None) -> Iterator[Generator]:
    """Models with several EMA lengths from a run's snapshots, all in the same network, one after the other.

    Args:
        snapshots: folder of a run's snapshots.
        sigma_rels: wanted lengths.
        t: time in images; default: that of the last snapshot.

    Yields:
        A generator for each length; it is another one's as soon as the next is asked for. Lengths that come out
        inaccurate are not warned about, because they are tried, not kept.
    """
    denoiser = None
    for result in reconstruct_many(snapshots, sigma_rels, t, warn_above=math.inf):
        assert result.metadata is not None
        if denoiser is None:
            denoiser = Denoiser(**result.metadata["network"]).eval().requires_grad_(False)
            use_channels_last(denoiser)
        denoiser.load_state_dict(result.tensors)
        info = {**result.metadata["info"], "sigma_rel": result.sigma_rel}
        yield Generator(denoiser, Coding.from_json(info["coding"]), info)
