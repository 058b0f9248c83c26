"""Numbers about images, with all that they depend on, as a JSON file."""

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edm2
from edm2.files import read_json, write_json
from edm2.metrics import CopyCheck, Scores
from edm2.metrics.measure import DENSITY_K, MANIFOLD_K
from edm2.train.run_folder import flat_settings

FORMAT = "edm2 metrics 1"
SCORE_NAMES = (
    "frechet_distance",
    "kernel_distance",
    "kernel_distance_spread",
    "kernel_distance_subset_size",
    "precision",
    "recall",
    "density",
    "coverage",
)
COPY_NAMES = ("nearer_than_held_out", "authentic", "copying_c_t")


def provenance_of(
    images: dict[str, Any], extractor: dict[str, Any], *, keep: int, seed: int
) -> dict[str, Any]:
    """Provenance of a measurement, as JSON.

    Args:
        images: Provenance of the images.
        extractor: Result of `edm2.metrics.describe_extractor`.
        keep: Number of images whose features are kept.
        seed: Seed of that choice and of subsets.
    """
    settings = {
        "keep": keep,
        "seed": seed,
        "precision_recall_k": MANIFOLD_K,
        "density_coverage_k": DENSITY_K,
    }
    versions = {"edm2": edm2.__version__, "numpy": np.__version__, "torch": torch.__version__}
    versions["python"] = platform.python_version()
    if "transformers" in sys.modules:
        versions["transformers"] = importlib.metadata.version("transformers")
    return {"extractor": extractor, "images": images, "settings": settings, "versions": versions}


def check_result(out: Path, provenance: dict[str, Any]) -> dict[str, Any] | None:
    """Read the result in a file, if it is the one to be made; None if there is no file.

    Raises:
        ValueError: If the file is something else, or was made with other settings.
    """
    if not out.exists():
        return None
    old = read_result(out)
    differing = differences(without_numbers(old), json.loads(json.dumps({"format": FORMAT, **provenance})))
    if differing:
        raise ValueError(
            f"{out} holds numbers of other settings ({', '.join(differing)} differ): choose another --out"
        )
    return old


def without_numbers(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a result that its numbers depend on."""
    return {key: value for key, value in result.items() if key not in ("scores", "warnings")}


def write_result(
    out: Path,
    provenance: dict[str, Any],
    scores: Scores,
    warnings: list[str],
    copies: CopyCheck | None = None,
) -> dict[str, Any]:
    """Write numbers, those of a check for copies if there was one, and provenance; return them as JSON."""
    values = flat_scores(scores)
    if copies is not None:
        values |= dict(zip(COPY_NAMES, (copies.suspects, copies.authentic, copies.c_t), strict=True))
    result = {"format": FORMAT, **provenance, "scores": values, "warnings": warnings}
    write_json(out, result)
    return result


def read_result(path: Path) -> dict[str, Any]:
    """Read a file that `write_result` wrote.

    Raises:
        ValueError: If the file holds something else.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a result of `edm2 metrics` ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a result of `edm2 metrics`: choose another file")
    if not _is_whole(content):
        raise ValueError(f"{path} is damaged: restore it from a copy, or measure again")
    return content


def _is_whole(content: dict[str, Any]) -> bool:
    """Whether a result has values of the kinds that `write_result` writes, as far as they are printed."""
    tables = ("extractor", "images", "reference", "settings", "versions", "scores")
    if not all(isinstance(content.get(name), dict) for name in tables):
        return False
    extractor, scores, warnings = content["extractor"], content["scores"], content.get("warnings")
    sets = (content["images"], content["reference"].get("images"))
    return (
        isinstance(extractor.get("name"), str)
        and isinstance(extractor.get("sha256"), str | None)
        and isinstance(extractor.get("num_features"), int)
        and all(isinstance(value, int | float | None) for value in scores.values())
        and isinstance(warnings, list)
        and all(isinstance(text, str) for text in warnings)
        and all(isinstance(images, dict) and isinstance(images.get("source"), str) for images in sets)
        and all(isinstance(images.get("num_images"), int | None) for images in sets)
    )


def flat_scores(scores: Scores) -> dict[str, float | None]:
    """Values by name; None if one of the sets keeps no features, or there is no spread."""
    kernel, manifold, support = scores.kernel, scores.manifold, scores.support
    values = (
        scores.frechet,
        *((kernel.value, kernel.spread, kernel.subset_size) if kernel else (None,) * 3),
        *(manifold or (None,) * 2),
        *(support or (None,) * 2),
    )
    return dict(zip(SCORE_NAMES, values, strict=True))


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of the entries that differ between two tables of tables."""
    a, b = flat_settings(a), flat_settings(b)
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
