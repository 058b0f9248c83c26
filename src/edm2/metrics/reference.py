"""Reference files: features of a data set and their provenance, as safetensors."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save

from edm2.files import sha256_of, write_atomic
from edm2.metrics.frechet import FeatureStatistics, check_features
from edm2.metrics.measure import FeatureSet
from edm2.metrics.tensor_file import read_tensor_file, to_metadata

_FORMAT = "edm2 reference 2"


@dataclass(frozen=True, kw_only=True)
class Reference(FeatureSet):
    """Features of a set of images, with their provenance.

    Attributes:
        provenance: JSON; `extractor` (see `describe_extractor`) and `images` say what was measured, and how.
        sha256: Hash of the file that it was read from; "" if there is none.
    """

    provenance: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: `mu`, `sigma`, `features` and the provenance; the same gives the same bytes.

        Raises:
            ValueError: If the statistics are of fewer than 2 images.
        """
        arrays = {"mu": self.statistics.mean, "sigma": self.statistics.cov}
        if self.features is not None:
            arrays["features"] = np.ascontiguousarray(self.features)
        header = {"num_images": self.statistics.num_images, "provenance": self.provenance}
        write_atomic(path, save(arrays, to_metadata(_FORMAT, header)))

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Read a file that `save` wrote.

        Raises:
            ValueError: If the file is missing or holds something else.
        """
        if not Path(path).is_file():
            wanted = Path(path).with_suffix(".safetensors")
            raise ValueError(
                f"there is no reference file {path}: make one with `edm2 metrics ref DATA --out {wanted}`"
            )
        try:
            header, arrays = read_tensor_file(path, "np", _FORMAT)
            mean, features, provenance = arrays["mu"], arrays.get("features"), header["provenance"]
            statistics = FeatureStatistics.from_moments(
                mean, arrays["sigma"], num_images=int(header["num_images"])
            )
            if not isinstance(provenance, dict):
                raise ValueError("its provenance is not a table")
            if features is not None:
                check_features(features)
                if features.shape[1] != len(mean):
                    raise ValueError(
                        f"features {list(features.shape)} do not fit a mean of {len(mean)} numbers"
                    )
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a reference file of edm2 ({error}): make one with `edm2 metrics ref`"
            ) from error
        return cls(
            statistics=statistics,
            features=features,
            provenance=provenance,
            sha256=sha256_of(path),
        )
