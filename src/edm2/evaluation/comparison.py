"""Two sets of images, or references, measured by one extractor and compared, with a record next to the images."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edm2.data.sources import BUILT_IN
from edm2.evaluation.cautions import find_cautions
from edm2.evaluation.copies import copy_pairs, some_images
from edm2.evaluation.extractors import measure_images
from edm2.evaluation.images import ImageSet, open_images
from edm2.evaluation.references import check_extractor
from edm2.evaluation.results import check_result, provenance_of, write_result
from edm2.metrics import (
    ClassifierFeatures,
    CopyCheck,
    FeatureExtractor,
    FeatureSet,
    Reference,
    check_copies,
    describe_extractor,
    fit_classifier,
    score,
)
from edm2.progress import show
from edm2.report import image_grid, save_png
from edm2.train.world import World


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How images are measured.

    Attributes:
        keep: Images whose features are kept, at random; 0 for none.
        seed: Seed of that choice, of subsets, and of a classifier's training.
        batch: Images at a time.
        world: Processes that share the work.
    """

    keep: int
    seed: int
    batch: int
    world: World

    def measure(self, images: ImageSet, extractor: FeatureExtractor) -> FeatureSet:
        """Measure all images of a set."""
        return measure_images(
            images, extractor, keep=self.keep, seed=self.seed, batch_size=self.batch, world=self.world
        )


@dataclass(kw_only=True)
class Side:
    """One of the two sets that are compared: images, or a reference."""

    where: str
    found: ImageSet | Reference

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the images are from."""
        known: dict[str, Any] = self.found.provenance
        return known if isinstance(self.found, ImageSet) else known["images"]

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if it is not known."""
        counts = self.provenance.get("class_counts")
        return len(counts) if counts else None

    def measured(self, extractor: FeatureExtractor | None, how: Measuring) -> FeatureSet:
        """Its features; those of a reference are known already."""
        if isinstance(self.found, Reference):
            return self.found
        assert extractor is not None
        return how.measure(self.found, extractor)


@dataclass(kw_only=True)
class CopySources:
    """The images that samples are compared with in the check for copies."""

    training: ImageSet
    held_out: ImageSet | None

    @classmethod
    def open(cls, training: str, held_out: str | None) -> "CopySources":
        """Open training images, and images that the model has not seen."""
        unseen = None
        if held_out is not None:
            unseen = open_images(held_out, split="test" if held_out in BUILT_IN else "train")
        return cls(training=open_images(training), held_out=unseen)

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the images are from."""
        unseen = None if self.held_out is None else self.held_out.provenance
        return {"training": self.training.provenance, "held_out": unseen}

    def check(self, made: ImageSet, out: Path) -> CopyCheck:
        """Look for copies, and write the picture."""
        samples, training = some_images(made.dataset), some_images(self.training.dataset)
        held_out = None if self.held_out is None else some_images(self.held_out.dataset)
        check = check_copies(samples, training, held_out)
        pairs = copy_pairs(samples, training, check)
        picture = image_grid(pairs, columns=len(pairs) // 2, scale=max(1, 64 // pairs.shape[-1]))
        save_png(picture, out.with_suffix(".copies.png"))
        return check


def score_sides(
    real: Side,
    made: Side,
    extractor: FeatureExtractor | None,
    out: Path,
    how: Measuring,
    copies: CopySources | None = None,
) -> tuple[dict[str, Any] | None, bool]:
    """Check everything, then measure and write the result; two references need no extractor.

    Returns:
        The result (None on all processes but the first), and whether `out` held it already.

    Raises:
        ValueError: If the sides were measured by different extractors, or `out` holds another result.
    """
    described = made.found.provenance["extractor"] if extractor is None else describe_extractor(extractor)
    for side in (real, made):
        if isinstance(side.found, Reference):
            check_extractor(described, side.found.provenance["extractor"], side.where)
    provenance = provenance_of(made.provenance, described, keep=how.keep, seed=how.seed)
    provenance["reference"] = {
        "images": real.provenance,
        "sha256": real.found.sha256 if isinstance(real.found, Reference) else None,
    }
    if copies is not None:
        provenance["copies"] = copies.provenance
    old = check_result(out, provenance)
    if old is not None:
        return (old if how.world.is_first else None), True
    for side in (real, made):
        if isinstance(side.found, ImageSet) and extractor is not None:
            try_extractor(extractor, side.found)
    found = find_cautions(made.provenance, real.provenance, provenance["extractor"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        scores = score(made.measured(extractor, how), real.measured(extractor, how), seed=how.seed)
    found += [str(warning.message) for warning in caught]
    if not how.world.is_first:
        return None, False
    check = None
    if copies is not None and isinstance(made.found, ImageSet):
        check = copies.check(made.found, out)
        found += [check.verdict] if check.is_copying else []
    for text in found:
        warnings.warn(text, stacklevel=2)
    return write_result(out, provenance, scores, found, check), False


def fit_classifier_beside(images: ImageSet, beside: Path, how: Measuring) -> ClassifierFeatures:
    """Train a classifier on labelled images; a file from an earlier attempt must hold the same one.

    Raises:
        ValueError: If the images have no classes, or the file holds another classifier.
    """
    dataset = images.dataset
    if dataset.num_classes < 2:
        raise ValueError(
            f"{images.provenance['source']} has no classes to train a classifier on: give --extractor inception or "
            "dinov2, or --weights with a classifier"
        )
    rows = np.arange(len(dataset))
    if how.world.is_first:
        show(f"training a classifier on {len(rows):,} images")
    fitted = fit_classifier(
        dataset.images(rows), dataset.labels(rows), num_classes=dataset.num_classes, seed=how.seed
    )
    # The same one is there if the command was killed before it wrote the reference.
    if beside.exists() and _sha256_of_classifier(beside) != fitted.sha256:
        raise ValueError(
            f"{beside} exists and is another classifier: use it with --weights {beside}, or choose another --out"
        )
    return fitted


def _sha256_of_classifier(path: Path) -> str | None:
    try:
        return ClassifierFeatures.load(path).sha256
    except ValueError:
        return None


def try_extractor(extractor: FeatureExtractor, images: ImageSet) -> None:
    """Pass one image through an extractor, so that a mismatch is an error now and not after hours."""
    extractor.features(images.dataset.images(np.arange(1)))
