"""Distances between stored averages, from a sample of their elements spread over all tensors."""

from collections.abc import Sequence

import numpy as np

from edm2.ema.maths.profiles import FloatArray
from edm2.ema.storage.tensorfile import TensorFile
from edm2.ema.storage.weighted_sums import read_elements

_SAMPLE = 32768
_RUN = 64


def sample_squares(
    files: Sequence[TensorFile], names: Sequence[str], scales: Sequence[dict[str, float]]
) -> FloatArray:
    """Estimate the squared L2 distances between the tensors of files.

    Tensors are sampled in short runs at even spacing, in proportion to their size; small ones are read whole.

    Args:
        files: Files that hold the same tensors.
        names: The tensors to compare.
        scales: For each file, factor of each tensor that was stored divided by one.

    Returns:
        Squared distances [n, n].

    Raises:
        ValueError: If a file holds values that are not finite.
    """
    total = sum(files[0].specs[name].numel for name in names)
    places: list[tuple[str, int, int]] = []
    weights: list[FloatArray] = []
    for name in names:
        numel = files[0].specs[name].numel
        if not numel:
            continue
        runs = min(-(-numel // _RUN), max(1, round(_SAMPLE / _RUN * numel / total)))
        length = min(_RUN, numel)
        starts = np.unique(np.linspace(0, numel - length, runs).astype(np.int64))
        places += [(name, int(start), length) for start in starts]
        weights.append(np.full(starts.size * length, numel / (starts.size * length)))
    rows = np.stack([read_elements(f, places, scale) for f, scale in zip(files, scales, strict=True)])
    for file, row in zip(files, rows, strict=True):
        if not np.isfinite(row).all():
            raise ValueError(
                f"{file.path} is damaged: it holds values that are not finite; restore it from a copy"
            )
    rows -= rows[-1]
    rows *= np.sqrt(np.concatenate(weights))
    gram = rows @ rows.T
    square = np.diag(gram)
    return np.asarray(np.maximum(square[:, None] + square - 2 * gram, 0.0))
