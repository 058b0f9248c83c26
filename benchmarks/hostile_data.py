"""Data sets, conditions, forecasts and settings to damage, and the ways to read them; see `hostile_files`."""

import gzip
import io
import json
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray
import zarr
from hostile_files import Target, Way, command
from PIL import Image

from edm2.data import open_dataset
from edm2.data.pictures import decode, read_header
from edm2.data.sources import read_given
from edm2.evaluation.references import is_reference, read_reference
from edm2.forecast.cases import read_cases
from edm2.forecast.files import Forecast, read_forecast, write_forecast
from edm2.train import TrainConfig
from edm2.train.settings_file import read_settings

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)


def dataset(path: Path) -> None:
    data = open_dataset(path, verify=True)
    data.images(np.arange(min(len(data), 4)))


def skipping(path: Path) -> None:
    data = open_dataset(path, skip_damaged=True)
    data.images(np.arange(min(len(data), 4)))


def picture(path: Path) -> None:
    data = path.read_bytes()
    header = read_header(path.name, data, size=len(data))
    image = decode(path.name, data, random.choice([None, "L", "RGB", "RGBA"]))
    assert image.shape[1:] == (header.height, header.width), (header, image.shape)


def archives(folder: Path) -> Iterator[Target]:
    """ZIP archives of pictures and of arrays, and files of torch.save."""
    labels = json.dumps({"labels": [["a/0.png", 1], ["b/1.png", 0]], "class_names": ["x", "y"]}).encode()
    png = saved(PIXELS[:8, :8, :3], "PNG")
    ways = {"dataset": dataset, "skipping": skipping, "data info": command("data", "info", "FILE"),
            "convert": command("data", "convert", "FILE", "--out", "OUT.zip", "--size", "4")}  # fmt: skip
    for name, method in (("stored.zip", zipfile.ZIP_STORED), ("deflated.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(folder / name, "w", method) as archive:
            for inner, content in {"a/0.png": png, "b/1.png": png, "dataset.json": labels}.items():
                archive.writestr(inner, content)
        yield Target("ZIP", folder / name, ways)
    np.savez_compressed(
        folder / "x.npz", images=np.stack([PIXELS.transpose(2, 0, 1)] * 3), labels=np.arange(3)
    )
    yield Target("ZIP", folder / "x.npz", {"dataset": dataset, "data info": command("data", "info", "FILE")})
    np.savez(folder / "moments.npz", mu=np.zeros(3), sigma=np.eye(3))
    yield Target("ZIP", folder / "moments.npz", {"read": read_reference, "is reference": is_reference})


def pictures(folder: Path) -> Iterator[Target]:
    """Images of every kind, arrays, and IDX files."""
    for name, content in images().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        ways: dict[str, Way] = {"picture": picture}
        yield Target("pictures", folder / name, ways)
    box = folder / "mixed"
    for name in ("a/0.png", "b/1.png"):
        (box / name).parent.mkdir(parents=True)
        (box / name).write_bytes(saved(PIXELS, "PNG"))
    data: dict[str, Way] = {
        "dataset": lambda p: dataset(p.parents[1]),
        "skipping": lambda p: skipping(p.parents[1]),
        "data info": command("data", "info", "FILE", up=2),
        "convert": command("data", "convert", "FILE", "--out", "OUT.zip", "--size", "4", up=2),
    }
    yield Target("pictures", box / "a" / "0.png", data)
    (folder / "batch.npy").write_bytes(npy(np.stack([PIXELS.transpose(2, 0, 1)] * 3)))
    yield Target(
        "pictures", folder / "batch.npy", {"dataset": dataset, "data info": command("data", "info", "FILE")}
    )
    digits = {
        "train-images-idx3-ubyte.gz": gzip.compress(idx(PIXELS)),
        "train-labels-idx1-ubyte": idx(np.arange(20, dtype=np.uint8)),
    }
    for name, content in digits.items():
        (folder / "idx").mkdir(exist_ok=True)
        (folder / "idx" / name).write_bytes(content)
    for name in digits:
        yield Target(
            "pictures",
            folder / "idx" / name,
            {"dataset": lambda p: dataset(p.parent), "data info": command("data", "info", "FILE", up=1)},
        )


def folders(folder: Path) -> Iterator[Target]:
    """Folders of pictures with labels and vectors in files of their own."""
    for name in ("a/0.png", "b/1.png"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(saved(PIXELS[:8, :8, :3], "PNG"))
    ways: dict[str, Way] = {
        "dataset": lambda p: dataset(p.parent),
        "data info": command("data", "info", "FILE", up=1),
        "convert": command("data", "convert", "FILE", "--out", "OUT.zip", "--size", "4", up=1),
    }
    labels = {"labels": [["a/0.png", 1], ["b/1.png", 0]], "class_names": ["x", "y"]}
    (folder / "dataset.json").write_text(json.dumps(labels))
    yield Target("JSON", folder / "dataset.json", ways)
    (folder / "vectors.csv").write_text("image,hour,lead\na/0.png,6,1.5\nb/1.png,12,-2e-1\n")
    yield Target("fields", folder / "vectors.csv", ways)


def fields(folder: Path) -> Iterator[Target]:
    """Pairs in zarr groups, NetCDF files and archives of arrays, and CIFAR."""
    rng = np.random.default_rng(0)
    arrays = {
        "images": rng.normal(size=(3, 2, 4, 4)).astype(np.float32),
        "conditions": rng.normal(size=(3, 1, 4, 4)).astype(np.float32),
        "vectors": rng.normal(size=(3, 2)).astype(np.float32),
        "labels": np.arange(3),
    }
    named = xarray.Dataset(
        {name: ([f"{name}{i}" for i in range(array.ndim)], array) for name, array in arrays.items()}
    )
    named.images.attrs.update(scale_factor=2.0, add_offset=1.0)

    def ways(up: int = 0) -> dict[str, Way]:
        def source(path: Path) -> Path:
            return path.parents[up - 1] if up else path

        return {
            "dataset": lambda p: dataset(source(p)),
            "given": lambda p: read_given(str(source(p))),
            "data info": command("data", "info", "FILE", up=up),
            "convert": command("data", "convert", "FILE", "--out", "OUT.zip", "--size", "4", up=up),
        }

    named.to_zarr(folder / "named.zarr", consolidated=False, zarr_format=3)
    named.to_zarr(folder / "second.zarr", consolidated=True, zarr_format=2)
    plain = zarr.open_group(str(folder / "plain.zarr"), mode="w")
    for name, array in arrays.items():
        plain.create_array(name, data=array, chunks=(2, *array.shape[1:]))
    for group in ("named.zarr", "second.zarr", "plain.zarr"):
        for path in _parts(folder / group):
            yield Target("fields", path, ways(len(path.relative_to(folder / group).parts)))
    named.to_netcdf(folder / "third.nc", engine="scipy")
    named.to_netcdf(folder / "fourth.nc", engine="h5netcdf")
    np.savez(folder / "pairs.npz", mask=np.ones((3, 2, 4, 4), bool), **arrays)
    for name in ("third.nc", "fourth.nc", "pairs.npz"):
        yield Target("fields", folder / name, ways())
    yield from _cifar(folder)


def _parts(group: Path) -> list[Path]:
    """The metadata of a zarr group, and a chunk of each of its arrays."""
    files = sorted(path for path in group.rglob("*") if path.is_file())
    chunks = {path.relative_to(group).parts[0]: path for path in files if path.name[0].isdigit()}
    return [path for path in files if not path.name[0].isdigit()] + list(chunks.values())


def _cifar(folder: Path) -> Iterator[Target]:
    data: dict[str, Way] = {"dataset": dataset, "data info": command("data", "info", "FILE")}
    inner: dict[str, Way] = {
        "dataset": lambda p: dataset(p.parent), "data info": command("data", "info", "FILE", up=1)
    }  # fmt: skip
    batch = pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}, 3)
    names = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    files = dict.fromkeys(names, batch)
    files["batches.meta"] = pickle.dumps({b"label_names": [b"a", b"b"]}, 3)
    binary = {f"{name}.bin": bytes(3073) + b"\1" + bytes(3072) for name in names}
    binary["batches.meta.txt"] = b"a\nb\n"
    for where, contents in (("cifar-10-batches-py", files), ("cifar-10-batches-bin", binary)):
        (folder / where).mkdir()
        for name, content in contents.items():
            (folder / where / name).write_bytes(content)
    for name in ("data_batch_3", "batches.meta"):
        yield Target("pickles", folder / "cifar-10-batches-py" / name, inner)
    for name in ("data_batch_3.bin", "batches.meta.txt"):
        yield Target("fields", folder / "cifar-10-batches-bin" / name, inner)
    for name, mode in (("cifar-10-python.tar.gz", "w:gz"), ("cifar-10-python.tar", "w:")):
        with tarfile.open(folder / name, mode) as archive:  # type: ignore[call-overload]
            archive.add(folder / "cifar-10-batches-py", "cifar-10-batches-py")
        yield Target("fields", folder / name, data)


def forecasts(folder: Path) -> Iterator[Target]:
    """Forecasts, and what they start from."""
    rng = np.random.default_rng(0)
    made = Forecast(
        members=rng.normal(size=(2, 3, 2, 1, 4, 4)).astype(np.float32),
        truth=rng.normal(size=(2, 2, 1, 4, 4)).astype(np.float32),
        start=rng.normal(size=(2, 1, 1, 4, 4)).astype(np.float32),
        settings={"seed": 0, "num_steps": 8},
    )
    for name in ("made.npz", "made.nc", "made.zarr"):
        path = write_forecast(folder / name, made)
        for file in _parts(path) if path.is_dir() else [path]:
            up = len(file.relative_to(folder).parts) - 1
            yield Target("fields", file, {
                "read": lambda p, up=up: read_forecast(p.parents[up - 1] if up else p),
                "start": lambda p, up=up: read_cases(p.parents[up - 1] if up else p, frames=1, channels=1),
                "metrics": command("metrics", "ensemble", "FILE", "--out", "OUT.json", up=up),
            })  # fmt: skip


SETTINGS = {
    "a.json": b'{"images": "8Mi", "batch": 64, "network": {"model_channels": 32, "channel_mult": [1, 2]}, "ema": {}}',
    "b.yaml": b"images: 8Mi\nbatch: 64\nnetwork:\n  model_channels: 32\n  channel_mult: [1, 2]\nloss: {}\n",
    "c.toml": b'images = "8Mi"\nbatch = 64\n[network]\nmodel_channels = 32\nchannel_mult = [1, 2]\n',
}  # fmt: skip


def settings(folder: Path) -> Iterator[Target]:
    """Settings of a run in a file."""
    (folder / "images.npy").write_bytes(npy(np.zeros((3, 3, 16, 16), np.uint8)))
    for name, content in SETTINGS.items():
        (folder / name).write_bytes(content)
        yield Target("JSON" if name.endswith("json") else "fields", folder / name, {
            "read": lambda p: read_settings(p).apply(TrainConfig()),
            "train": command("train", "--settings", "FILE", "--data", str(folder / "images.npy"), "--out", "OUT",
                "--print-settings"),
        })  # fmt: skip


def saved(pixels: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def images() -> dict[str, bytes]:
    """Name -> bytes of one image."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    rgb, rgba, gray = PIXELS[..., :3], PIXELS, PIXELS[..., 0]
    two = [Image.fromarray(gray), Image.fromarray(255 - gray)]
    return {
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
        "a.gif": saved(two[0], "GIF", save_all=True, append_images=two[1:]),
        "rgb.tif": saved(rgb, "TIFF", exif=exif),
        "lzw.tif": saved(rgb, "TIFF", compression="tiff_lzw"),
        "float.tif": saved(gray.astype(np.float32), "TIFF"),
        "32.tif": saved(gray.astype(np.int32), "TIFF"),
        "bytes.npy": npy(rgb),
        "float.npy": npy(rgb.astype(np.float64)),
    }  # fmt: skip
