"""Description of images with what is given with them: ranges, moments and missing shares of every channel."""

import numpy as np

from edm2.data.dataset import ImageDataset
from edm2.data.order import indices

_SAMPLE = 2000  # images that are read
_BATCH = 64
_SHOWN = 12  # channels and entries


def describe_pairs(dataset: ImageDataset, where: str) -> str:
    """Text that `edm2 data info` prints for pairs.

    Args:
        dataset: Images with conditions, vectors or missing values; up to 2,000 of them are read.
        where: The source.
    """
    chosen = np.sort(indices(0, min(_SAMPLE, len(dataset)), size=len(dataset), seed=0))
    part = "" if len(chosen) == len(dataset) else f" (values of {len(chosen):,})"
    lines = [f"source      {where}", f"pairs       {len(dataset):,}{part}"]
    for what, data in (("images", dataset), ("conditions", dataset.conditions)):
        if data is not None:
            channels, height, width = data.image_shape
            lines += [f"{what:<12}{channels} x {height} x {width} of {data.dtype}", *_channels(data, chosen)]
    if dataset.vector_dim:
        vectors = dataset.vectors(chosen).astype(np.float64)
        lines += [f"vectors     {dataset.vector_dim}", *_rows(vectors[None].transpose(2, 0, 1), "entry")]
    lines.append(f"classes     {dataset.num_classes or 'none'}")
    return "\n".join(lines)


def _channels(data: ImageDataset, chosen: np.ndarray) -> list[str]:
    shown = min(data.image_shape[0], _SHOWN)
    parts = [
        data.images(chosen[start : start + _BATCH])[:, :shown].astype(np.float64)
        for start in range(0, len(chosen), _BATCH)
    ]
    lines = _rows(np.concatenate(parts).swapaxes(0, 1), "channel")
    more = data.image_shape[0] - shown
    return lines + ([f"  and {more} more"] if more else [])


def _rows(values: np.ndarray, what: str) -> list[str]:
    lines = []
    for number, of in enumerate(values[:_SHOWN]):
        known = of[~np.isnan(of)]
        if not known.size:
            lines.append(f"  {what} {number}: all values are missing")
            continue
        missing = f", missing {1 - known.size / of.size:.2%}" if known.size < of.size else ""
        lines.append(
            f"  {what} {number}: {known.min():.4g} to {known.max():.4g}, mean {known.mean():.4g}, std {known.std():.4g}"
            f"{missing}"
        )
    return lines
