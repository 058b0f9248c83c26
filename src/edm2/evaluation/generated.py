"""Images that a network makes when they are measured, so that nothing is saved."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from edm2.data import ImageDataset
from edm2.evaluation.images import MIN_IMAGES, ImageSet, seed_text
from edm2.generate import ImageGenerator
from edm2.generate.output import sampling_record


class GeneratedImages(ImageDataset):
    """The images of some seeds, made each time they are read; each depends on its own seed alone.

    Args:
        generator: The model.
        seeds: One for each image.
        guide: Model that guides it.
        **options: Fields of `edm2.generate.SamplerOptions`.

    Attributes:
        sampling: Model, guide and sampler, as in the `samples.json` of `edm2 sample`.

    Raises:
        ValueError: If the model does not make pictures, or as in `ImageGenerator.images`.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        seeds: Sequence[int],
        *,
        guide: ImageGenerator | None = None,
        **options: Any,
    ) -> None:
        if not generator.pixel_channels:
            raise ValueError(
                f"the model makes {generator.coding.kind}, and extractors see pictures: sample with `edm2 sample`, "
                "which decodes latents, and measure the files"
            )
        self._generator, self._seeds = generator, np.asarray(seeds, np.int64)
        self._options = {**options, "guide": guide}
        self.sampling = sampling_record(generator, guide, generator.sampler_options(**options))
        facts = json.dumps([self.sampling, seed_text(list(seeds))], sort_keys=True)
        super().__init__(
            name="generated images",
            image_shape=self._read(np.array([0])).shape[1:],
            dtype=np.dtype(np.uint8),
            labels=generator.labels_for(seeds) if generator.num_classes else None,
            num_classes=generator.num_classes,
            class_names=generator.class_names,
            fingerprint=hashlib.sha256(facts.encode()).hexdigest(),
            size=len(seeds),
        )

    def _read(self, indices: np.ndarray) -> np.ndarray:
        return self._generator.images(self._seeds[indices].tolist(), **self._options)


def generated_set(images: GeneratedImages, source: str, seeds: Sequence[int]) -> ImageSet:
    """Generated images with their provenance.

    Args:
        images: The images.
        source: Where the model is from.
        seeds: Their seeds.

    Raises:
        ValueError: If there are too few.
    """
    if len(images) < MIN_IMAGES:
        raise ValueError(f"--num {len(images)} must be at least {MIN_IMAGES}")
    counts = None
    if images.num_classes:
        labels = images.labels(np.arange(len(images)))
        counts = np.bincount(labels, minlength=images.num_classes).tolist()
    provenance = {
        "source": source,
        "fingerprint": images.fingerprint,
        "num_images": len(images),
        "shape": list(images.image_shape),
        "class_counts": counts,
        "seeds": seed_text(list(seeds)),
        "sampling": images.sampling,
    }
    return ImageSet(dataset=images, provenance=provenance)
