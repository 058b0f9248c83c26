"""Measures of a model: numbers about its images against a reference, and its errors by noise level.

- `open_images`: images with their provenance (`images`).
- `open_extractor`, `measure_images`: their features (`extractors`).
- `read_reference`, `is_reference`, `check_extractor`: references to compare them with (`references`).
- `find_cautions`: reasons why numbers may mean little (`cautions`).
- `read_result`, `write_result`: numbers as a JSON file, with all that they depend on (`results`).
- `Judge`: one number for a model while it is tuned (`judge`).
- `errors_by_noise`, `noise_density`: a network's error at each noise level (`noise_errors`).
"""

from edm2.evaluation.cautions import find_cautions
from edm2.evaluation.extractors import measure_images, open_extractor
from edm2.evaluation.images import ImageSet, open_images
from edm2.evaluation.judge import Judge
from edm2.evaluation.noise_errors import errors_by_noise, noise_density
from edm2.evaluation.references import check_extractor, is_reference, read_reference
from edm2.evaluation.results import read_result, write_result

__all__ = [
    "ImageSet",
    "Judge",
    "check_extractor",
    "errors_by_noise",
    "find_cautions",
    "is_reference",
    "measure_images",
    "noise_density",
    "open_extractor",
    "open_images",
    "read_reference",
    "read_result",
    "write_result",
]
