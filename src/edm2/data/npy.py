"""Arrays as images: headers of their files, the order of axes, and how values are stored."""

import io
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from edm2.data.dataset import not_finite

_ALWAYS_READ = 128 << 20
_MOST_PACKED = 1000
_FEW_CHUNKS = 10_000


def read_array_header(data: bytes, size: int | None) -> tuple[tuple[int, ...], np.dtype]:
    """Read the shape and type of the array in a `.npy` file.

    Args:
        data: The file, or as much of its beginning as holds its header.
        size: Size of the whole file in bytes, which its values cannot exceed; None if unknown.

    Raises:
        ValueError: If it is another file, its header is damaged, or promises more values than there are.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its .npy format is version {version}: write it with numpy.save")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = read(file)
    except Exception as error:
        # NumPy parses it as Python and passes on all errors of the parser.
        raise ValueError("its .npy header is damaged") from error
    promised = math.prod(shape) * dtype.itemsize
    # Python objects fill any number of bytes, and are refused later.
    if min(shape, default=0) < 0 or (size is not None and promised > size and not dtype.hasobject):
        raise ValueError(
            f"its header promises {promised:,} bytes of values {list(shape)}, more than there are"
        )
    return shape, dtype


def read_array(data: bytes) -> np.ndarray:
    """Read the array in a `.npy` file; never runs what is in it.

    Raises:
        ValueError: As in `read_array_header`, or for Python objects.
    """
    read_array_header(data, len(data))
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def check_promise(path: Path, num_bytes: int, num_chunks: int = 0) -> None:
    """Raise ValueError if a header promises far more bytes of values, or chunks, than there are, however well packed.

    Args:
        path: File, or folder of a zarr group.
        num_bytes: Bytes of the promised values.
        num_chunks: Files that a zarr array has if none is left out; see `edm2.data.grids.chunk_files`.
    """
    if num_bytes <= _ALWAYS_READ and num_chunks <= _FEW_CHUNKS:
        return
    stored = count = 0
    for count, file in enumerate([path] if path.is_file() else path.rglob("*"), start=1):
        stored += file.stat().st_size
        # A large store has many files.
        if num_bytes <= _MOST_PACKED * stored and num_chunks <= max(_FEW_CHUNKS, _MOST_PACKED * count):
            return
    if num_bytes > _MOST_PACKED * stored:
        raise ValueError(f"it promises {num_bytes:,} bytes of values and stores {stored:,}")
    raise ValueError(f"it promises {num_chunks:,} chunks and has {count:,} files")


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read those of the named arrays that a `.npz` file holds; never runs what is in it.

    Raises:
        ValueError: If it is damaged, or holds something else under these names.
        OSError: If it cannot be read.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            wanted = [name for name in names if name in archive.files]
            sizes = {
                member.filename.removesuffix(".npy"): member.file_size for member in archive.zip.infolist()
            }
            check_promise(path, sum(sizes[name] for name in wanted))
            found = {name: archive[name] for name in wanted}
    except OSError:
        raise
    except Exception as error:  # NumPy parses headers as Python, and passes on what zipfile and zlib raise
        raise ValueError(
            f"it is not a whole .npz file: {str(error)[:200] or type(error).__name__}"
        ) from error
    for name, array in found.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name} is not an array")
    return found


def open_array(path: Path) -> np.ndarray:
    """Map the array of a `.npy` file; never runs what is in it.

    Raises:
        ValueError: If it is damaged, promises more values than there are, or is another file.
        OSError: If it cannot be read.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # NumPy parses headers as Python
        raise ValueError(
            f"it is not a whole .npy file: {str(error)[:200] or type(error).__name__}"
        ) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError("it is an .npz file by another name")
    return array


def as_image(array: np.ndarray, *, missing: bool = False) -> np.ndarray:
    """Return an array as `[C, H, W]` uint8 or float32; see `image_layout`.

    Args:
        array: The array.
        missing: Whether NaN is a missing value; otherwise it is an error.

    Raises:
        ValueError: If the shape or type is not that of an image, or values are not finite.
    """
    shape, last = image_layout(array.shape)
    array = array.transpose(2, 0, 1) if last else array.reshape(shape)
    image = as_stored(array)
    if image.dtype == np.float32 and (bad := not_finite(image, missing=missing)):
        raise ValueError(f"it holds {bad}")
    return image


def as_stored(array: np.ndarray) -> np.ndarray:
    """Values as uint8 or float32: bytes as they are, True as 255, other numbers with their own values."""
    kind = stored_kind(array.dtype)
    return array * np.uint8(255) if array.dtype == bool else array.astype(kind, copy=False)


def channels_last(shape: tuple[int, ...]) -> bool:
    """Whether an image's three axes are height, width, channels.

    They are if the last is at most 4 and smaller than both others.
    """
    return len(shape) == 3 and shape[2] <= 4 and shape[2] < min(shape[:2])


def image_layout(shape: tuple[int, ...]) -> tuple[tuple[int, int, int], bool]:
    """Channels, height and width of an array; and whether its channels come last.

    Raises:
        ValueError: If the shape is not that of an image.
    """
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(
            f"its array has the shape {list(shape)}, but must have [C, H, W], [H, W, C] with C up to 4, or [H, W]"
        )
    if channels_last(shape):
        return (shape[2], shape[0], shape[1]), True
    channels, height, width = shape if len(shape) == 3 else (1, *shape)
    return (channels, height, width), False


def stored_kind(dtype: np.dtype) -> str:
    """Type in which an array's values are stored: "uint8" or "float32".

    Raises:
        ValueError: If neither can hold them.
    """
    if dtype in (np.uint8, np.bool_):
        return "uint8"
    # Integers of more than 24 bits would be rounded.
    if dtype.kind == "f" or (dtype.kind in "iu" and dtype.itemsize <= 2):
        return "float32"
    raise ValueError(f"its array has the type {dtype}, but must be bool, float, or integers of 8 or 16 bits")
