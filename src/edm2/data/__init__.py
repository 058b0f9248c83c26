"""Image data sets, the order in which a run sees them, and the coding between pixels and network units."""

from edm2.data.arrays import NpyDataset, open_npz
from edm2.data.augment import AUGMENT_DIM, Augmentation, mirror
from edm2.data.autoencoder import LatentDecoder
from edm2.data.dataset import ArrayDataset, ImageDataset, Skipped
from edm2.data.encoders import FloatCoding, PixelCoding, coding_warning, measure_coding
from edm2.data.files import FileDataset
from edm2.data.hugging_face import stream_hugging_face
from edm2.data.idx import read_idx
from edm2.data.loader import Batch, Batches
from edm2.data.order import epoch_order, indices
from edm2.data.pairs import Given, PairedDataset
from edm2.data.sources import BUILT_IN, open_dataset, read_given
from edm2.data.verify import find_damaged
from edm2.data.views import MirroredDataset, PaddedDataset, Subset, TransformedDataset, crop_at_random

__all__ = [
    "AUGMENT_DIM",
    "BUILT_IN",
    "ArrayDataset",
    "Augmentation",
    "Batch",
    "Batches",
    "FileDataset",
    "FloatCoding",
    "Given",
    "ImageDataset",
    "LatentDecoder",
    "MirroredDataset",
    "NpyDataset",
    "PaddedDataset",
    "PairedDataset",
    "PixelCoding",
    "Skipped",
    "Subset",
    "TransformedDataset",
    "coding_warning",
    "crop_at_random",
    "epoch_order",
    "find_damaged",
    "indices",
    "measure_coding",
    "mirror",
    "open_dataset",
    "open_npz",
    "read_given",
    "read_idx",
    "stream_hugging_face",
]
