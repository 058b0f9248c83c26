"""Data sets by name or path."""

import difflib
import math
import warnings
import zipfile
from pathlib import Path

import numpy as np

from edm2.data.arrays import NpyDataset, given_in_npz, open_npz
from edm2.data.cifar import open_cifar
from edm2.data.dataset import ArrayDataset, ImageDataset, check_split
from edm2.data.files import Catalog, FileDataset, damage_message, list_files, no_splits
from edm2.data.grids import open_grids, split_source
from edm2.data.hugging_face import PREFIX, is_hugging_face, list_hugging_face
from edm2.data.idx import idx_splits, open_idx
from edm2.data.labels import some
from edm2.data.order import indices
from edm2.data.pairs import Given, PairedDataset
from edm2.data.pictures import encoded
from edm2.data.storage import zip_of
from edm2.data.verify import find_damaged
from edm2.data.views import PaddedDataset, Subset, crop_at_random
from edm2.extras import needed

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def open_dataset(
    source: str | Path,
    *,
    split: str = "train",
    labels: bool = True,
    condition: str | Path | None = None,
    missing: bool = False,
    max_images: int | None = None,
    pad_to: int | None = None,
    crop: int | None = None,
    verify: bool = False,
    skip_damaged: bool = False,
) -> ImageDataset:
    """Open a built-in data set or the user's own images.

    Args:
        source: "digits" (scikit-learn's handwritten digits, 8x8), "fashion-mnist" (Debian's package,
            28x28), "hf://NAME" (a data set of the Hugging Face hub), or a path: an image folder, a ZIP or a folder
            inside one (`data.zip/photos`), a folder of IDX files, a `.npy` or `.npz` file, a zarr group or NetCDF file
            (`era5.zarr:t2m,u10` names its arrays), an archive of CIFAR or Tiny-ImageNet as published or its folder, a
            folder saved by `datasets`, or Arrow or Parquet files. Write `./digits` for a folder with a built-in's name.
        split: "train", or another split that the source has.
        labels: Whether to read labels.
        condition: Source of the images given with these: of files matched by name, whatever their suffix; of arrays in
            the same order. Default: the conditions that the source itself holds.
        missing: Whether NaN is a missing value; otherwise it is an error.
        max_images: Maximum number of images; a larger data set is thinned by a fixed rule, the same in every run.
        pad_to: Height and width in pixels to which images are padded with zeros.
        crop: Side in pixels of the random square that is cut out of each image at each use; see `crop_at_random`.
        verify: Whether to decode every image now, so that a damaged one is found before a run starts.
        skip_damaged: Whether to leave out images that cannot be decoded, with a warning that counts them; `skipped`
            names them. Otherwise they are errors.

    Returns:
        The data set.

    Raises:
        ValueError: If the source or split is unknown, there are no images, sizes differ, files are damaged, or labels
            do not fit.
    """
    found = _find(source, split, labels, missing)
    dataset = (
        found
        if isinstance(found, ImageDataset)
        else FileDataset(found, skip_damaged=skip_damaged, missing=missing)
    )
    if condition is not None:
        given = open_dataset(condition, split=split, labels=False, missing=missing)
        dataset = PairedDataset(dataset, _matched(dataset, given))
    if max_images is not None and max_images < len(dataset):
        dataset = Subset(dataset, np.sort(indices(0, max_images, size=len(dataset), seed=0)))
    if verify or skip_damaged:
        dataset = _verified(dataset, str(source), skip_damaged)
    dataset = dataset if pad_to is None else PaddedDataset(dataset, pad_to)
    return dataset if crop is None else crop_at_random(dataset, crop)


def holds_pairs(source: str | Path) -> bool:
    """Whether a source is a file that holds something with its images, or may have missing values; opens no images."""
    path = Path(source).expanduser()
    if path.suffix.lower() == ".npz" and zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                return bool({"conditions.npy", "vectors.npy", "mask.npy"} & set(archive.namelist()))
        except Exception:  # zipfile has many for damaged files; the reader of the images names the damage
            return False
    return split_source(source) is not None


def _matched(images: ImageDataset, conditions: ImageDataset) -> ImageDataset:
    """Conditions in the order of the images: by name where both are files."""
    if not (isinstance(images, FileDataset) and isinstance(conditions, FileDataset)):
        return conditions
    wanted, given = (
        [data.image_name(row).rpartition(".")[0] for row in range(len(data))] for data in (images, conditions)
    )
    rows = {name: row for row, name in enumerate(given)}
    lacking = [images.image_name(row) for row, name in enumerate(wanted) if name not in rows]
    known = {*wanted, *(skipped.name.rpartition(".")[0] for skipped in images.skipped)}
    spare = [conditions.image_name(row) for row, name in enumerate(given) if name not in known]
    if lacking or spare:
        problems = [
            f"{some(names)} of {data.name!r} not in {other.name!r}"
            for names, data, other in ((lacking, images, conditions), (spare, conditions, images))
            if names
        ]
        raise ValueError(
            f"images and conditions do not match: {'; '.join(problems)}. Give both files of a pair the same name, "
            "and remove files without a partner"
        )
    order = np.array([rows[name] for name in wanted])
    return conditions if np.array_equal(order, np.arange(len(given))) else Subset(conditions, order)


def read_given(source: str | Path, *, missing: bool = False) -> Given:
    """Read conditions, and the vectors and labels stored with them.

    Args:
        source: An `.npz` file with `conditions`, or the source of condition images, as in `open_dataset`.
        missing: Whether NaN is a missing value; otherwise it is an error.

    Raises:
        ValueError: As in `open_dataset`.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".npz" and path.is_file():
        return given_in_npz(path, missing=missing)
    grids = split_source(source)
    opened = (
        open_grids(*grids, missing=missing, given=True)
        if grids
        else open_dataset(source, labels=False, missing=missing)
    )
    rows = np.arange(len(opened))
    return Given(opened.images(rows), opened.vectors(rows) if opened.vector_dim else None)


def _verified(dataset: ImageDataset, source: str, skip_damaged: bool) -> ImageDataset:
    damaged = find_damaged(dataset)
    if damaged and not skip_damaged:
        raise ValueError(damage_message([skipped for _, skipped in damaged], source))
    if damaged:
        rows = np.setdiff1d(np.arange(len(dataset)), [row for row, _ in damaged])
        if not len(rows):
            raise ValueError(f"none of the {len(dataset)} images of {dataset.name!r} can be read")
        dataset = Subset(dataset, rows, skipped=[skipped for _, skipped in damaged])
    if dataset.skipped:
        name, reason = dataset.skipped[0]
        count, total = len(dataset.skipped), len(dataset) + len(dataset.skipped)
        warnings.warn(
            f"skipped {count} of the {total} images of {source}, which cannot be read: the first is {name!r} "
            f"({reason})",
            stacklevel=3,
        )
    return dataset


def open_catalog(source: str | Path, *, split: str = "train", labels: bool = True) -> Catalog:
    """List the images of any source that `open_dataset` takes; sizes and modes may differ.

    Args:
        source: See `open_dataset`.
        split: See `open_dataset`.
        labels: See `open_dataset`.

    Raises:
        ValueError: As in `open_dataset`, except for damaged images and mixed sizes.
    """
    found = _find(source, split, labels)
    if isinstance(found, Catalog):
        return found
    values = found.labels(np.arange(len(found))) if found.num_classes else None
    storage = DatasetStorage(found)
    return Catalog(storage, storage.names, values, found.class_names, str(source), found.name)


class DatasetStorage:
    """The images of a data set as `.npy` files named after their rows.

    Args:
        dataset: The images.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset
        self.names = [f"row {row:09d}.npy" for row in range(len(dataset))]
        self.sizes = [math.prod(dataset.image_shape) * dataset.dtype.itemsize] * len(dataset)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The file's bytes, or the first `limit` of them."""
        return encoded(self._dataset.images(np.array([int(name[4:13])]))[0], ".npy")[:limit]

    def checksum(self, name: str) -> int:
        """Checksum of the whole data set: the beginning of its fingerprint."""
        return int(self._dataset.fingerprint[:16], 16)


def _find(source: str | Path, split: str, labels: bool, missing: bool = False) -> Catalog | ImageDataset:
    if isinstance(source, str) and source in BUILT_IN:
        check_split(split, ("train", "test"), source)
        return BUILT_IN[source](split, labels)
    if str(source).startswith(PREFIX):
        return list_hugging_face(str(source), split=split, labels=labels)
    if grids := split_source(source):
        return open_grids(*grids, labels=labels, missing=missing)
    path = Path(source).expanduser()
    if not path.exists() and zip_of(path) is None:
        raise ValueError(_unknown(str(source), path))
    if (cifar := open_cifar(path, split=split, labels=labels)) is not None:
        return cifar
    if is_hugging_face(path):
        return list_hugging_face(path, split=split, labels=labels)
    if path.is_dir() and idx_splits(path):
        return open_idx(path, split=split, labels=labels)
    suffix = path.suffix.lower()
    arrays = path.is_file() and suffix in (".npy", ".npz")
    if path.is_file() and not arrays and not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is neither a folder nor a ZIP: give the folder or ZIP that holds the images, or a .npy, .npz, "
            ".arrow or .parquet file"
        )
    if arrays:
        if split != "train":
            raise no_splits(path, split)
        opened = NpyDataset if suffix == ".npy" else open_npz
        return opened(path, labels=labels, missing=missing)
    return list_files(path, split=split, labels=labels)


def _unknown(source: str, path: Path) -> str:
    near = difflib.get_close_matches(source, BUILT_IN)
    if path.parent.is_dir():
        beside = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
        near += [str(path.parent / name) for name in difflib.get_close_matches(path.name, beside)]
    advice = ": check the spelling, or give a folder or file of images (docs/data.md)"
    hint = f"; did you mean {' or '.join(near)}?" if near else advice
    return f"data source {source!r} is neither an existing path nor one of {', '.join(BUILT_IN)}{hint}"


def _digits(split: str, labels: bool) -> ImageDataset:
    # Loading scikit-learn takes a second, so only this source does.
    with needed("the data set 'digits'"):
        from sklearn.datasets import load_digits

    bunch = load_digits()
    # 0..16 to 0..255: the 17 values stay distinct.
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    target = bunch.target.astype(np.int64)
    chosen = np.flatnonzero(_held_out(target) == (split == "test"))
    names = tuple(str(digit) for digit in range(10))
    if not labels:
        return ArrayDataset(pixels[chosen], name="digits")
    return ArrayDataset(pixels[chosen], target[chosen], name="digits", class_names=names)


def _held_out(target: np.ndarray, share: float = 0.2) -> np.ndarray:
    # The same share of every class, by raw Philox bits, which are the same in all releases of NumPy.
    words = np.random.Philox(key=np.zeros(2, np.uint64)).random_raw(len(target))
    mask = np.zeros(len(target), bool)
    for label in np.unique(target):
        members = np.flatnonzero(target == label)
        mask[members[np.argsort(words[members])][: math.floor(share * len(members) + 0.5)]] = True
    return mask


def _fashion_mnist(split: str, labels: bool) -> ImageDataset:
    if not FASHION_MNIST.is_dir():
        raise ValueError(
            f"the Fashion-MNIST files are not in {FASHION_MNIST}: "
            "run 'apt-get install dataset-fashion-mnist' as root (Debian, Ubuntu), or give the path of a "
            "folder that holds train-images-idx3-ubyte.gz and its companions"
        )
    dataset = open_idx(FASHION_MNIST, split=split, labels=labels, name="fashion-mnist")
    dataset.class_names = _FASHION_CLASSES if labels else ()
    return dataset


BUILT_IN = {"digits": _digits, "fashion-mnist": _fashion_mnist}
