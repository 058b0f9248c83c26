"""Scores of models, by the images that they make."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from edm2.data import ImageDataset
from edm2.generate import ImageGenerator
from edm2.metrics import (
    FeatureExtractor,
    FeatureStatistics,
    describe_extractor,
    fit_classifier,
    frechet_distance,
    squared_mmd,
)
from edm2.metrics.measure import KEPT_FEATURES, kept_rows

FRECHET = "Frechet distance"
OWN_CLASSIFIER = "a classifier trained on the run's own images"
Metric = Literal["frechet", "kernel"]
_BATCH = 250


class Judge:
    """Distances to a data set's training images, in features of a classifier trained on them or of another extractor.

    Args:
        dataset: Real images.
        metric: frechet: distance of two Gaussians, too large for few images. kernel: KID over all pairs of images,
            unbiased for any number, and therefore sometimes below 0; against at most 10,000 real ones.
        extractor: Feature extractor. Default: a classifier trained on the images, which need classes.

    Attributes:
        fingerprint: Identifies the images and how they are scored.
        metric: Name of the metric, in words.
        features: Features that it is measured in, in words.

    Raises:
        ValueError: If the metric is unknown, or the images have no classes to train a classifier on.
    """

    def __init__(
        self, dataset: ImageDataset, *, metric: Metric = "frechet", extractor: FeatureExtractor | None = None
    ) -> None:
        names = {"frechet": FRECHET, "kernel": "kernel distance"}
        if metric not in names:
            raise ValueError(f"metric {metric!r} must be {' or '.join(names)}")
        self.metric, self.features, judged_in = names[metric], OWN_CLASSIFIER, "classifier"
        rows = np.arange(len(dataset))
        if extractor is None:
            if dataset.num_classes < 2:
                raise ValueError(
                    "these images have no classes to train a classifier on: choose other features, --features "
                    "inception or dinov2 (extractor=... in Python)"
                )
            extractor = fit_classifier(
                dataset.images(rows), dataset.labels(rows), num_classes=dataset.num_classes
            )
        else:
            self.features, judged_in = extractor.name, json.dumps(describe_extractor(extractor))
        self.fingerprint = f"{self.metric}, {judged_in} of {dataset.fingerprint}"
        self._extractor = extractor
        if metric == "kernel":
            rows = kept_rows(len(dataset), KEPT_FEATURES)
        real = self._features(dataset.images(part) for part in _parts(rows))
        self._reference = _together(real) if metric == "kernel" else _moments(real)

    def distance(self, images: np.ndarray) -> float:
        """Distance of images, `[N, C, H, W]` uint8."""
        features = self._features(_parts(images))
        if isinstance(self._reference, FeatureStatistics):
            return frechet_distance(_moments(features), self._reference)
        return squared_mmd(self._reference, _together(features))

    def score(
        self, generator: ImageGenerator, seeds: Sequence[int], num_steps: int, sampler: str = "heun"
    ) -> float:
        """Distance of the images of some seeds."""
        return self.distance(generator.images(seeds, num_steps=num_steps, sampler=sampler))

    def _features(self, batches: Iterable[np.ndarray]) -> Iterator[Tensor]:
        return (self._extractor.features(images) for images in batches)


def _moments(features: Iterable[Tensor]) -> FeatureStatistics:
    found = FeatureStatistics()
    for part in features:
        found.update(part)
    return found


def _together(features: Iterable[Tensor]) -> np.ndarray:
    return torch.cat([part.float() for part in features]).numpy()


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH))
