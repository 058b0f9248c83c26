"""Images beside what is given with them."""

import numpy as np
import PIL.Image

from edm2.data import ImageDataset
from edm2.report.ensemble_figures import field_picture, field_table

_SIDE = 96  # of a picture's longer side
_CHANNELS = 6


def pair_table(dataset: ImageDataset, count: int = 6) -> PIL.Image.Image:
    """Draw evenly spaced pairs, one in a row: each channel of the condition, then of the image, on its own scale.

    Bytes with three channels are drawn in their colours, missing values are transparent.

    Args:
        dataset: Images, with conditions or without.
        count: Most pairs to draw.
    """
    rows = np.unique(np.linspace(0, len(dataset) - 1, count).astype(np.int64))
    height, width = dataset.image_shape[1:]
    longer = max(height, width)
    size = (max(1, _SIDE * width // longer), max(1, _SIDE * height // longer))
    titles: list[str] = []
    pictures: list[list[PIL.Image.Image]] = [[] for _ in rows]
    for what, data in (("given", dataset.conditions), ("image", dataset)):
        if data is None:
            continue
        values = data.images(rows)
        if data.dtype == np.uint8 and values.shape[1] == 3:
            titles.append(what)
            drawn = [[PIL.Image.fromarray(image.transpose(1, 2, 0)).convert("RGBA")] for image in values]
        else:
            colours = "gray" if data.dtype == np.uint8 else "viridis"
            shown = values[:, :_CHANNELS].astype(np.float64)
            titles += [
                f"{what} {channel}" if values.shape[1] > 1 else what for channel in range(shown.shape[1])
            ]
            limits = [_limits(shown[:, channel]) for channel in range(shown.shape[1])]
            drawn = [
                [
                    field_picture(field, *ends, colours=colours, scale=1)
                    for field, ends in zip(image, limits, strict=True)
                ]
                for image in shown
            ]
        for row, new in zip(pictures, drawn, strict=True):
            row += [picture.resize(size, PIL.Image.Resampling.NEAREST) for picture in new]
    return field_table(pictures, titles, names=[str(row) for row in rows])


def _limits(values: np.ndarray) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
