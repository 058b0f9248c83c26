"""Reference files: what a data set's features are like, and where they came from, as safetensors."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edm2.files import sha256_of, write_atomic
from edm2.metrics.frechet import FeatureStatistics
from edm2.metrics.measure import Measured

_FORMAT = "edm2 reference 1"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Measured features with their provenance.

    Attributes:
        measured: statistics, and features if any.
        provenance: JSON; `extractor` (see `describe_extractor`) and `images` say what was measured by what.
        sha256: of the file that it was read from; "" where there is none.
    """

    measured: Measured
    provenance: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: `mu`, `sigma`, `features` and the provenance.

        Raises:
            ValueError: for statistics of fewer than 2 images.
        """
        statistics = self.measured.statistics
        arrays = {"mu": statistics.mean, "sigma": statistics.cov}
        if self.measured.features is not None:
            arrays["features"] = np.ascontiguousarray(self.measured.features)
        metadata = {
            "format": _FORMAT,
            "num_images": str(statistics.num_images),
            "provenance": json.dumps(self.provenance, sort_keys=True),
        }
        write_atomic(path, save(arrays, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is missing or holds something else.
        """
        if not Path(path).is_file():
            raise ValueError(
                f"there is no reference file {path}: make one with `edm2 metrics ref DATA --out {path}`"
            )
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
                mean, cov = file.get_tensor("mu"), file.get_tensor("sigma")
                features = file.get_tensor("features") if "features" in file.keys() else None  # noqa: SIM118
            statistics = FeatureStatistics.from_moments(mean, cov, num_images=int(metadata["num_images"]))
            provenance = json.loads(metadata["provenance"])
            if not isinstance(provenance, dict):
                raise ValueError("its provenance is no table")
            if features is not None and (features.ndim != 2 or features.shape[1] != len(mean)):
                raise ValueError(f"features {list(features.shape)} do not fit a mean of {len(mean)} numbers")
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(
                f"{path} is no reference file of edm2 ({error}): make one with `edm2 metrics ref`"
            ) from error
        return cls(
            measured=Measured(statistics=statistics, features=features),
            provenance=provenance,
            sha256=sha256_of(path),
        )
