"""Image data sets, the order in which a run sees them, and the coding between pixels and network units."""

from edm2.data.dataset import ArrayDataset, ImageDataset, PaddedDataset
from edm2.data.encoders import FloatCoding, PixelCoding, coding_warning, measure_coding
from edm2.data.files import FileDataset
from edm2.data.idx import read_idx
from edm2.data.order import epoch_order, indices
from edm2.data.sources import BUILT_IN, open_dataset

__all__ = [
    "BUILT_IN",
    "ArrayDataset",
    "FileDataset",
    "FloatCoding",
    "ImageDataset",
    "PaddedDataset",
    "PixelCoding",
    "coding_warning",
    "epoch_order",
    "indices",
    "measure_coding",
    "open_dataset",
    "read_idx",
]
