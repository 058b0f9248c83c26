"""Damage files of every kind at random and open them: only the documented errors, no hang, bounded memory.

    python tests/data/fuzz.py --seconds 60 --seed 1

A child of tests/data/test_fuzz.py, so that its limits do not bind the tests. A failure prints the case's number,
which with the seed makes it again (`--only`).
"""

import argparse
import gzip
import io
import json
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from edm2.data import open_dataset
from edm2.data.pictures import decode, read_header
from edm2.data.prepare.describe import describe
from edm2.data.prepare.survey import survey
from edm2.data.sources import open_catalog

MEMORY = 1 << 30  # bytes that damaged files may ask for beyond what the libraries take
CASE_SECONDS = 20
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)


def saved(pixels, kind, **options):
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def images():
    """Name -> bytes of one image."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    rgb, rgba, gray = PIXELS[..., :3], PIXELS, PIXELS[..., 0]
    found = {
        "rgb.png": saved(rgb, "PNG", exif=exif, transparency=(1, 2, 3)),
        "rgba.png": saved(rgba, "PNG"),
        "gray.png": saved(gray, "PNG", transparency=7),
        "palette.png": saved(Image.fromarray(rgb).quantize(7), "PNG", transparency=1),
        "16.png": saved(gray.astype(np.uint16) * 257, "PNG"),
        "a.jpg": saved(rgb, "JPEG", exif=exif),
        "progressive.jpg": saved(rgb, "JPEG", progressive=True),
        "a.webp": saved(rgba, "WEBP", exif=exif),
        "lossless.webp": saved(rgb, "WEBP", lossless=True),
        "a.bmp": saved(rgb, "BMP"),
        "a.gif": saved(
            Image.fromarray(gray), "GIF", save_all=True, append_images=[Image.fromarray(255 - gray)]
        ),
        "rgb.tif": saved(rgb, "TIFF", exif=exif),
        "lzw.tif": saved(rgb, "TIFF", compression="tiff_lzw"),
        "float.tif": saved(gray.astype(np.float32), "TIFF"),
        "32.tif": saved(gray.astype(np.int32), "TIFF"),
        "pages.tif": saved(Image.fromarray(rgb), "TIFF", save_all=True, append_images=[Image.fromarray(rgb)]),
        "bytes.npy": npy(rgb),
        "float.npy": npy(rgb.astype(np.float64)),
    }
    return found


def sources(parts):
    """Name of a source and of its file to damage -> all its files."""
    labels = json.dumps({"labels": [["a/0.png", 1], ["b/1.png", 0]], "class_names": ["x", "y"]}).encode()
    files = {"a/0.png": parts["rgba.png"], "b/1.png": parts["rgba.png"], "dataset.json": labels}
    found = {}
    for name, method in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            for inner, content in files.items():
                archive.writestr(inner, content)
        found[f"{name}.zip", ""] = {"": file.getvalue()}
    batch = np.stack([PIXELS.transpose(2, 0, 1)] * 3)
    found["x.npy", ""] = {"": npy(batch)}
    file = io.BytesIO()
    np.savez_compressed(file, images=batch.astype(np.float32), labels=np.arange(3))
    found["x.npz", ""] = {"": file.getvalue()}
    digits = {
        "train-images-idx3-ubyte.gz": gzip.compress(idx(PIXELS)),
        "train-labels-idx1-ubyte": idx(np.arange(20, dtype=np.uint8)),
    }
    for damaged in digits:
        found["idx", damaged] = digits
    for damaged in ("dataset.json", "a/0.png"):
        found["folder", damaged] = files
    return found


def damaged(data, others, rng):
    """The bytes with one to four changes."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        kind = rng.integers(7)
        # Headers are short, and most of what can go wrong lies in them.
        end = len(data) if rng.random() < 0.5 else min(len(data), 200)
        if not end:
            break
        at = int(rng.integers(end))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            to, size = int(rng.integers(len(data))), int(rng.integers(1, 64))
            data[at : at + size], data[to : to + size] = data[to : to + size], data[at : at + size]
        elif kind == 3:
            data[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff"])
        elif kind == 4:
            data[at:at] = rng.bytes(int(rng.integers(1, 20)))
        elif kind == 5:
            del data[at : at + int(rng.integers(1, 20))]
        else:
            other = others[int(rng.integers(len(others)))]
            data[at:] = other[at:]
    return bytes(data)


def read_one(name, data, rng):
    """Read an image as opening and training do; errors but ValueError are ours to find."""
    header = None
    try:
        header = read_header(name, data, size=len(data))
        image = decode(name, data, [None, "L", "RGBA", "RGB"][int(rng.integers(4))])
    except ValueError:
        return
    if header.mode in ("F", "array"):
        assert image.shape == (header.channels, header.height, header.width), (header, image.shape)
    assert image.shape[1:] == (header.height, header.width), (header, image.shape)
    assert image.dtype.name == header.dtype


def read_source(root, source, target, files, content, rng):
    """Write a source with one damaged file, and open it in the ways of the commands."""
    path = root / source
    for name, data in files.items():
        file = path / name if name else path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if name == target else data)
    try:
        if rng.random() < 0.5:
            data = open_dataset(path, verify=True, skip_damaged=bool(rng.integers(2)))
            data.images(np.arange(len(data)))
        else:
            describe(survey(open_catalog(path), workers=1, quiet=True))
    except ValueError:
        pass


def virtual_memory():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


class TooLong(BaseException):
    """No Exception, because a reader would take it for damage."""


def too_long(*_):
    raise TooLong


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    parts = images()
    whole = [*parts.items(), *sources(parts).items()]
    others = list(parts.values())
    signal.signal(signal.SIGALRM, too_long)
    limit = virtual_memory() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    end, case = time.monotonic() + chosen.seconds, 0 if chosen.only is None else chosen.only
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            rng = np.random.default_rng([chosen.seed, case])
            name, content = whole[case % len(whole)]
            signal.alarm(CASE_SECONDS)
            try:
                if isinstance(name, tuple):
                    source, target = name
                    changed = damaged(content[target], others, rng)
                    read_source(Path(folder), source, target, content, changed, rng)
                else:
                    read_one(name, damaged(content, others, rng), rng)
            except BaseException:
                traceback.print_exc()
                print(f"case {case} of seed {chosen.seed}: {name}")
                sys.exit(1)
            finally:
                signal.alarm(0)
            case += 1
            if chosen.only is not None:
                break
    print(f"{case} cases")


if __name__ == "__main__":
    main()
