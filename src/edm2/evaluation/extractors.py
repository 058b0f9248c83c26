"""Feature extractors as the options of a command name them, and features of a set of images."""

from pathlib import Path

import torch

from edm2.evaluation.images import ImageSet
from edm2.files import sha256_of
from edm2.interop.fetch import fetch
from edm2.metrics import (
    ClassifierFeatures,
    DinoV2Features,
    FeatureExtractor,
    FeatureSet,
    InceptionFeatures,
    measure,
)
from edm2.metrics.dinov2 import DINOV2
from edm2.metrics.extractors import check_sha256
from edm2.metrics.inception import HOW_TO_GET_INCEPTION
from edm2.metrics.measure import kept_rows
from edm2.train.world import World

EXTRACTORS = ("inception", "dinov2", "classifier")
_CACHE = Path("~/.cache/edm2")


def open_extractor(
    name: str, weights: str | None, *, sha256: str | None, trust: bool, device: torch.device | str
) -> FeatureExtractor:
    """Open the feature extractor that the options of a command name.

    Args:
        name: One of EXTRACTORS.
        weights: A file or its http(s) address (inception, classifier), a folder or hub name (dinov2). A classifier
            has no default.
        sha256: Expected hash of the weights.
        trust: Open a TorchScript file without knowing its hash.
        device: Where to compute.

    Raises:
        ValueError: If weights are missing or not the expected ones, or must not be opened without their hash.
    """
    if name == "dinov2":
        return DinoV2Features(weights or DINOV2, sha256=sha256, device=device)
    if weights is not None and "://" in weights:
        if sha256 is None:
            raise ValueError(f"{weights} is downloaded only if its hash is known: give --weights-sha256")
        source, _, file = weights.rpartition("/")
        weights = str(fetch(file, source, _CACHE.expanduser(), sha256=sha256))
    if name == "inception":
        if weights is None:
            raise ValueError(
                f"inception needs its weights: {HOW_TO_GET_INCEPTION}, then give both as --weights and "
                "--weights-sha256"
            )
        return InceptionFeatures(weights, sha256=sha256, trust_code=trust, device=device)
    assert weights is not None
    found = ClassifierFeatures.load(weights)
    check_sha256(weights, sha256_of(weights), sha256)
    return found


def measure_images(
    images: ImageSet, extractor: FeatureExtractor, *, keep: int, seed: int, batch_size: int, world: World
) -> FeatureSet:
    """Features of a set of images, over all processes.

    Raises:
        ValueError: As in `edm2.metrics.measure`.
    """
    batches = images.batches(batch_size, rank=world.rank, world_size=world.size)
    return measure(extractor, batches, rows=kept_rows(len(images.dataset), keep, seed=seed))
