"""Reference statistics: ours, the official files, and whether features can be compared with them."""

import contextlib
import zipfile
from pathlib import Path
from typing import Any

from edm2.files import sha256_of
from edm2.interop.reference import is_imported_reference, read_reference_statistics
from edm2.metrics import Reference

OFFICIAL = {"fid": "inception", "fd_dinov2": "dinov2"}


def read_reference(path: str | Path, *, metric: str | None = None) -> Reference:
    """Open a reference file: our own, an official `.pkl`, an `.npz` with `mu` and `sigma`, or either imported.

    Args:
        path: The file. Nothing in a pickle is executed.
        metric: "fid" or "fd_dinov2", for an official file; default: "fid" where the file holds it.

    Raises:
        ValueError: If it is another file, or does not hold the metric.
    """
    path = Path(path)
    official = path.suffix.lower() in (".pkl", ".npz") or is_imported_reference(path)
    if not official or not path.is_file():
        reference = Reference.load(path)
        if metric is not None:
            raise ValueError(f"{path} is of one extractor: leave --metric {metric} out")
        if "name" not in reference.provenance.get("extractor", {}) or "images" not in reference.provenance:
            raise ValueError(
                f"{path} does not say what was measured, and how: make it with `edm2 metrics ref`"
            )
        return reference
    found = read_reference_statistics(path)
    if metric is None:
        metric = "fid" if "fid" in found else next(iter(found))
    if metric not in found:
        raise ValueError(f"{path} does not hold {metric}, only {', '.join(found)}")
    moments = found[metric]
    # Where the file does not say the number, any will do: the distance is of mean and covariance alone.
    return Reference(
        statistics=moments.to_features(num_images=2),
        features=None,
        provenance={
            "extractor": {"name": OFFICIAL.get(metric, metric), "num_features": len(moments.mean)},
            "images": {"source": f"{path.name} ({metric})", "num_images": moments.num_images},
        },
        sha256=sha256_of(path),
    )


def is_reference(path: str | Path) -> bool:
    """Whether a file is a reference, and not images."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        # zipfile raises errors of many types for damaged files; the reader of the images names the damage.
        with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
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
