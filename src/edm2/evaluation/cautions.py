"""Reasons why numbers about images against a reference may mean little."""

import math
from typing import Any

import numpy as np

from edm2.evaluation.references import OFFICIAL

_CONVENTION = 50_000
_CLASS_DIFFERENCE = 0.1


def find_cautions(images: dict[str, Any], reference: dict[str, Any], extractor: dict[str, Any]) -> list[str]:
    """Find reasons why scores against a reference may mean little, one sentence each."""
    found = []
    width, general = extractor["num_features"], extractor["name"] in OFFICIAL.values()
    enough = _CONVENTION if general else 10 * width
    for whose, count in (
        ("there are", images["num_images"]),
        ("the reference is of", reference.get("num_images")),
    ):
        if count is not None and count <= width:
            found.append(
                f"{whose} {count:,} images for {width:,} features: covariances are singular and the Frechet distance "
                "is far too large; compare it only with one of as many images"
            )
        elif count is not None and count < enough:
            found.append(
                f"{whose} {count:,} images, fewer than {enough:,}: the Frechet distance is too large; compare it only "
                "with one of as many images"
            )
    shape, fingerprint = images.get("shape"), images.get("fingerprint")
    if general and shape is not None and shape[0] == 1:
        found.append(
            f"the images are gray and {extractor['name']} was trained on photos in colour: numbers mean little"
        )
    known = reference.get("shape")
    if known is not None and shape is not None and known != shape:
        found.append(
            f"the images are {_shape_text(shape)} and the reference's {_shape_text(known)}: part of the "
            "distance is that of their sizes"
        )
    if fingerprint is not None and fingerprint == reference.get("fingerprint"):
        found.append("the images are the reference's own: the numbers say nothing about a generator")
    difference = _class_difference(images.get("class_counts"), reference.get("class_counts"))
    if difference > _CLASS_DIFFERENCE:
        found.append(
            f"{100 * difference:.0f}% of the images would need another class to have the reference's class balance"
        )
    return found


def _shape_text(shape: list[int]) -> str:
    return "x".join(map(str, [*shape[1:], shape[0]]))


def _class_difference(a: list[int] | None, b: list[int] | None) -> float:
    if not a or not b:
        return 0.0
    size = max(len(a), len(b))
    shares = [np.pad(counts, (0, size - len(counts))) / math.fsum(counts) for counts in (a, b)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)
