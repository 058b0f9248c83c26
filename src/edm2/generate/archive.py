"""Samples in one file: a ZIP in the layout of data sets, or an NPZ."""

import itertools
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from edm2.data.npy import read_array
from edm2.files import read_json, replacing

SETTINGS_FILE = "samples.json"
ARCHIVES = (".zip", ".npz")
_DATE = (1980, 1, 1, 0, 0, 0)  # fixed, so that equal samples are equal bytes


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings and seeds that made an archive of samples.

    Raises:
        ValueError: If the file does not hold samples of edm2.
    """
    try:
        with zipfile.ZipFile(path) as content:
            settings = read_json(content.read(SETTINGS_FILE))
        if isinstance(settings, dict):
            return settings
        raise ValueError("not a table")
    except Exception:  # zipfile raises errors of many types for other and damaged files
        raise ValueError(
            f"{path} exists and does not hold samples of edm2: choose another --out or move it away"
        ) from None


def write_zip(
    path: Path,
    settings: dict[str, Any],
    files: Iterator[bytes],
    suffix: str,
    seeds: Sequence[int],
    labels: np.ndarray | None,
) -> None:
    """Pack encoded images as `00012/img00012345.png`, numbered by seed, with `dataset.json`."""
    names = [f"{seed // 1000:05d}/img{seed:08d}{suffix}" for seed in seeds]
    classes = labels is not None and labels.ndim == 1
    pairs = (
        [[n, int(c)] for n, c in zip(names, labels, strict=True)] if labels is not None and classes else None
    )
    with writing(path) as put:
        for name, content in zip(names, files, strict=True):
            put(name, [content])
        put("dataset.json", [json.dumps({"labels": pairs}).encode()])
        put(SETTINGS_FILE, [json.dumps(settings, indent=1, sort_keys=True).encode()])


def write_npz(
    path: Path,
    settings: dict[str, Any],
    files: Iterator[bytes],
    seeds: Sequence[int],
    labels: np.ndarray | None,
) -> None:
    """Pack images, each a `.npy` file, as `arr_0`, labels as `arr_1`, and `seeds`; one image at a time is in memory.

    Pictures are `[N, H, W, C]`, as the field's evaluators expect; other data is `[N, C, H, W]`.
    """
    start = next(files)
    first = read_array(start)
    head = start[: len(start) - first.nbytes]

    def rows() -> Iterator[bytes]:
        yield array_header(first.dtype, (len(seeds), *_stored(first).shape))
        for content in itertools.chain([start], files):
            # All have the same header, and reading it would take most of the time.
            assert content.startswith(head)
            image = np.frombuffer(content, first.dtype, offset=len(head)).reshape(first.shape)
            yield _stored(image).tobytes()

    with writing(path) as put:
        put("arr_0.npy", rows())
        if labels is not None:
            put("arr_1.npy", [array_header(labels.dtype, labels.shape), labels.tobytes()])
        numbers = np.asarray(seeds, np.int64)
        put("seeds.npy", [array_header(numbers.dtype, numbers.shape), numbers.tobytes()])
        put(SETTINGS_FILE, [json.dumps(settings, indent=1, sort_keys=True).encode()])


def _stored(image: np.ndarray) -> np.ndarray:
    return image.transpose(1, 2, 0) if image.dtype == np.uint8 else image


def array_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What stands before an array's values in a .npy file."""
    header = BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


@contextmanager
def writing(path: Path) -> Iterator[Callable[[str, Any], None]]:
    """Write an uncompressed archive, which appears when it is whole.

    Yields:
        A function that adds a member: its name, and its content in parts.
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w") as content:

        def put(name: str, parts: Any) -> None:
            with content.open(zipfile.ZipInfo(name, _DATE), "w", force_zip64=True) as member:
                for part in parts:
                    member.write(part)

        yield put
