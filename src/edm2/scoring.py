"""Numbers about images, with all that is needed to know what they mean: what `edm2 metrics` does."""

import importlib.metadata
import json
import math
import platform
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edm2
from edm2.files import sha256_of, write_json
from edm2.image_sets import ImageSet
from edm2.interop.fetch import fetch
from edm2.interop.reference import is_imported_reference, read_reference_statistics
from edm2.metrics import (
    ClassifierFeatures,
    DinoV2Features,
    FeatureExtractor,
    FeatureStatistics,
    InceptionFeatures,
    Measured,
    Reference,
    Scores,
    measure,
)
from edm2.metrics.dinov2 import DINOV2
from edm2.metrics.inception import HOW_TO_GET_INCEPTION
from edm2.metrics.measure import DENSITY_K, MANIFOLD_K, kept_rows
from edm2.train.world import World

FORMAT = "edm2 metrics 1"
EXTRACTORS = ("inception", "dinov2", "classifier")
OFFICIAL = {"fid": "inception", "fd_dinov2": "dinov2"}
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
_CACHE = Path("~/.cache/edm2")
_CONVENTION = 50_000
_CLASS_DIFFERENCE = 0.1


def open_extractor(
    name: str, weights: str | None, *, sha256: str | None, trust: bool, device: torch.device | str
) -> FeatureExtractor:
    """Open what makes features, as the options of a command name it.

    Args:
        name: one of EXTRACTORS.
        weights: a file or its http(s) address (inception, classifier), a folder or hub name (dinov2). A classifier
            has no default.
        sha256: expected hash of the weights.
        trust: open a TorchScript file without knowing its hash.
        device: where to compute.

    Raises:
        ValueError: for weights that are missing, others than expected, or not to be opened without their hash.
    """
    if name == "dinov2":
        return DinoV2Features(weights or DINOV2, sha256=sha256, device=device)
    if weights is not None and "://" in weights:
        if sha256 is None:
            raise ValueError(
                f"{weights} is downloaded only with the hash that it should have: give --weights-sha256"
            )
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
    if sha256 is not None and sha256_of(weights) != sha256.lower():
        raise ValueError(f"{weights} has another sha256 than {sha256}: it is another file")
    return found


def measure_images(
    images: ImageSet, extractor: FeatureExtractor, *, keep: int, seed: int, batch_size: int, world: World
) -> Measured:
    """Features of a set of images, over all processes.

    Raises:
        ValueError: as in `edm2.metrics.measure`.
    """
    batches = images.batches(batch_size, rank=world.rank, world_size=world.size)
    return measure(extractor, batches, rows=kept_rows(len(images.dataset), keep, seed=seed))


def provenance_of(
    images: dict[str, Any], extractor: dict[str, Any], *, keep: int, seed: int
) -> dict[str, Any]:
    """What a measurement is of and was made by, as JSON.

    Args:
        images: provenance of the images.
        extractor: as of `edm2.metrics.describe_extractor`.
        keep: number of images whose features are kept.
        seed: of that choice and of subsets.
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


def read_reference(path: str | Path, *, metric: str | None = None) -> Reference:
    """Open a reference file: our own, an official `.pkl`, an `.npz` with `mu` and `sigma`, or either imported.

    Args:
        path: the file. Of a pickle nothing is executed.
        metric: "fid" or "fd_dinov2", for an official file; default: "fid" where the file holds it.

    Raises:
        ValueError: if it is no such file, or does not hold the metric.
    """
    path = Path(path)
    official = path.suffix.lower() in (".pkl", ".npz") or is_imported_reference(path)
    if not official or not path.is_file():
        reference = Reference.load(path)
        if metric is not None:
            raise ValueError(f"{path} is of one extractor: leave --metric {metric} out")
        if "name" not in reference.provenance.get("extractor", {}) or "images" not in reference.provenance:
            raise ValueError(
                f"{path} does not say what was measured by what: make it with `edm2 metrics ref`"
            )
        return reference
    found = read_reference_statistics(path)
    if metric is None:
        metric = "fid" if "fid" in found else next(iter(found))
    if metric not in found:
        raise ValueError(f"{path} holds no {metric}: there is {', '.join(found)}")
    moments = found[metric]
    # Where the file does not say the number, any will do: the distance is of mean and covariance alone.
    statistics = FeatureStatistics.from_moments(moments.mean, moments.cov, num_images=moments.num_images or 2)
    return Reference(
        measured=Measured(statistics=statistics, features=None),
        provenance={
            "extractor": {"name": OFFICIAL.get(metric, metric), "num_features": len(moments.mean)},
            "images": {"source": f"{path.name} ({metric})", "num_images": moments.num_images},
        },
        sha256=sha256_of(path),
    )


def is_reference(path: str | Path) -> bool:
    """Whether a file is a reference and no images."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".npz" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    return suffix in (".safetensors", ".pkl")


def check_extractor(extractor: dict[str, Any], reference: dict[str, Any], where: str) -> None:
    """Raise a ValueError unless features by one extractor can be compared with a reference's."""
    for key in ("name", "sha256", "num_features"):
        if None not in (reference.get(key), extractor.get(key)) and reference[key] != extractor[key]:
            raise ValueError(
                f"{where} was measured by an extractor of {key} {reference[key]}, and this one's is {extractor[key]}: "
                "features of two extractors cannot be compared"
            )


def check_result(out: Path, provenance: dict[str, Any]) -> dict[str, Any] | None:
    """The result that a file holds, where it is the one that is wanted; None where there is no file.

    Raises:
        ValueError: if the file is something else, or was made with other settings.
    """
    if not out.exists():
        return None
    old = read_result(out)
    differing = differences(without_numbers(old), json.loads(json.dumps({"format": FORMAT, **provenance})))
    if differing:
        raise ValueError(
            f"{out} holds numbers made otherwise ({', '.join(differing)} differ): choose another --out"
        )
    return old


def without_numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What a result's numbers depend on."""
    return {key: value for key, value in result.items() if key not in ("scores", "warnings")}


def write_result(
    out: Path, provenance: dict[str, Any], scores: Scores, warnings: list[str]
) -> dict[str, Any]:
    """Write numbers and provenance; returns them as JSON."""
    result = {"format": FORMAT, **provenance, "scores": flat_scores(scores), "warnings": warnings}
    write_json(out, result)
    return result


def read_result(path: Path) -> dict[str, Any]:
    """Read what `write_result` wrote.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no result of edm2 metrics ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no result of edm2 metrics: choose another file")
    return content


def flat_scores(scores: Scores) -> dict[str, float | None]:
    """Name of a number -> its value, None where one of the sets keeps no features, or there is no spread."""
    kernel, manifold, support = scores.kernel, scores.manifold, scores.support
    values = (
        scores.frechet,
        *((kernel.value, kernel.spread, kernel.subset_size) if kernel else (None,) * 3),
        *(manifold or (None,) * 2),
        *(support or (None,) * 2),
    )
    return dict(zip(SCORE_NAMES, values, strict=True))


def doubts(images: dict[str, Any], reference: dict[str, Any], extractor: dict[str, Any]) -> list[str]:
    """Why numbers about images against a reference may mean little, one sentence each."""
    found = []
    width, general = extractor["num_features"], extractor["name"] in OFFICIAL.values()
    for whose, count in (
        ("there are", images["num_images"]),
        ("the reference is of", reference.get("num_images")),
    ):
        if count is not None and count <= width:
            found.append(
                f"{whose} {count:,} images for {width:,} features: covariances are singular and the Frechet distance "
                "is far too large; compare it only with one of as many images"
            )
        elif count is not None and count < (_CONVENTION if general else 10 * width):
            found.append(
                f"{whose} {count:,} images, fewer than {_CONVENTION if general else 10 * width:,}: the Frechet "
                "distance is too large; compare it only with one of as many images"
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


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the entries that differ between two tables of tables."""
    found = []
    for key in sorted({*a, *b}):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key}")
    return found


def _shape_text(shape: list[int]) -> str:
    return "x".join(map(str, [*shape[1:], shape[0]]))


def _class_difference(a: list[int] | None, b: list[int] | None) -> float:
    if not a or not b:
        return 0.0
    size = max(len(a), len(b))
    shares = [np.pad(counts, (0, size - len(counts))) / math.fsum(counts) for counts in (a, b)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)
