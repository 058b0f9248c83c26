"""Image folders and ZIPs, read one image at a time."""

import hashlib
import io
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from edm2.data.dataset import ImageDataset
from edm2.data.labels import LABEL_FILE, read_labels
from edm2.data.storage import FolderStorage, Storage, ZipStorage

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CHANNELS = {"1": 1, "L": 1, "LA": 2, "P": 3, "RGB": 3, "RGBA": 4}
_HEAD_BYTES = 4096
# What Pillow and NumPy are known to raise on bytes that are not an image.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

Shape = tuple[int, int, int, str]


class FileDataset(ImageDataset):
    """Images in a folder, or in a ZIP with the same layout.

    PNG, JPEG, WebP or BMP become uint8 with 1 (gray), 2 (gray, alpha), 3 (RGB, palette) or 4 (RGBA)
    channels. `.npy` files hold `[C, H, W]` or `[H, W]`, uint8 or float. Labels come from `dataset.json` at
    the top, `{"labels": [[name, int], ...]}` or null; without it, the sorted top folders are the classes.
    Opening reads the header of every image, not its pixels.

    Args:
        source: folder or ZIP.
        labels: False leaves labels out.

    Raises:
        ValueError: no images, images of mixed sizes, a damaged image, or labels that do not fit.
    """

    def __init__(self, source: Path, *, labels: bool = True) -> None:
        self._source = source
        storage: Storage = FolderStorage(source) if source.is_dir() else ZipStorage(source)
        self._storage = storage
        chosen = [(n, s) for n, s in zip(storage.names, storage.sizes, strict=True) if _is_image(n)]
        if not chosen:
            raise ValueError(
                f"{source} holds no images ({len(storage.names)} files, none of them "
                f"{', '.join(PICTURES)} or .npy): give the folder or ZIP that holds them"
            )
        self._names = [name for name, _ in chosen]
        values, class_names = read_labels(storage, self._names, source=source) if labels else (None, ())
        shape = self._common_shape()
        numbers = [-1] * len(chosen) if values is None else values.tolist()
        digest = hashlib.sha256(f"files {shape}".encode())
        for (name, size), number in zip(chosen, numbers, strict=True):
            digest.update(f"\0{name}\0{size}\0{number}".encode())
        super().__init__(
            name=source.resolve().stem,
            image_shape=shape[:3],
            dtype=np.dtype(shape[3]),
            labels=values,
            num_classes=len(class_names) or None,
            class_names=class_names,
            fingerprint=digest.hexdigest(),
            size=len(chosen),
        )

    def _common_shape(self) -> Shape:
        shapes = [self._header(name) for name in self._names]
        counts = Counter(shapes)
        common = counts.most_common(1)[0][0]
        if len(counts) > 1:
            wrong = [i for i, shape in enumerate(shapes) if shape != common]
            shown = ", ".join(f"{self._names[i]!r} is {_words(shapes[i])}" for i in wrong[:3])
            raise ValueError(
                f"the images of {self._source} have mixed sizes: {counts[common]} are {_words(common)}, but "
                f"{shown}{' ...' if len(wrong) > 3 else ''} ({len(wrong)} in all): "
                "resize, crop or convert them to one size and mode, or take them out"
            )
        return common

    def _header(self, name: str) -> Shape:
        try:
            return _shape(name, self._storage.read(name, _HEAD_BYTES))
        except _UNREADABLE:
            pass  # A long header, such as a camera's: the whole file decides.
        try:
            return _shape(name, self._storage.read(name))
        except _UNREADABLE as error:
            raise self._damaged(name, error) from error

    def _read(self, indices: np.ndarray) -> np.ndarray:
        batch = np.empty((len(indices), *self.image_shape), self.dtype)
        for row, index in enumerate(indices):
            name = self._names[index]
            try:
                image = _decode(name, self._storage.read(name))
                if image.shape != self.image_shape or image.dtype != self.dtype:
                    raise ValueError(f"it was {self.image_shape} at opening, and is {image.shape} now")
                if self.dtype == np.float32 and not np.isfinite(image).all():
                    raise ValueError("it holds values that are not finite")
            except _UNREADABLE as error:
                raise self._damaged(name, error) from error
            batch[row] = image
        return batch

    def _damaged(self, name: str, error: Exception) -> ValueError:
        return ValueError(
            f"image {name!r} in {self._source} is damaged or not supported ({error}): "
            f"replace it, or take it (and its line in {LABEL_FILE}) out"
        )


def _is_image(name: str) -> bool:
    return name.lower().endswith((*PICTURES, ".npy"))


def _words(shape: Shape) -> str:
    return f"{shape[1]}x{shape[2]} (height x width) with {shape[0]} channels, {shape[3]}"


def _mode(image: Image.Image) -> str:
    # A palette is a way of storing RGB, with or without transparency.
    if image.mode == "P":
        return "RGBA" if "transparency" in image.info else "RGB"
    if image.mode not in _CHANNELS:
        raise ValueError(f"its mode is {image.mode!r}: convert it to 8-bit gray or RGB, or to a float .npy")
    return "L" if image.mode == "1" else image.mode


def _shape(name: str, data: bytes) -> Shape:
    if name.lower().endswith(".npy"):
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"its .npy format is version {version}: write it with numpy.save")
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        return (*_image_shape(shape), _kind(dtype))
    with Image.open(io.BytesIO(data)) as image:
        return _CHANNELS[_mode(image)], image.height, image.width, "uint8"


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"its array has the shape {list(shape)}, but must have [C, H, W] or [H, W]")
    channels, height, width = shape if len(shape) == 3 else (1, *shape)
    return channels, height, width


def _kind(dtype: np.dtype) -> str:
    if dtype != np.uint8 and dtype.kind != "f":
        raise ValueError(f"its array has the type {dtype}, but must be uint8 or float")
    return "uint8" if dtype == np.uint8 else "float32"


def _decode(name: str, data: bytes) -> np.ndarray:
    if name.lower().endswith(".npy"):
        array = np.load(io.BytesIO(data), allow_pickle=False)
        return array.reshape(_image_shape(array.shape)).astype(_kind(array.dtype), copy=False)
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert(_mode(image)), dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
