"""Writing samples: a folder of numbered files, or one archive, with the settings they were made with."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import edm2
from edm2.diffusion import guided
from edm2.files import write_atomic, write_json
from edm2.generate.archive import ARCHIVES, SETTINGS_FILE, read_settings, write_npz, write_zip
from edm2.generate.generator import ImageGenerator
from edm2.generate.sampler_options import SamplerOptions
from edm2.progress import Progress
from edm2.report import image_grid, save_png
from edm2.train.world import World

_PNG_MODES = (1, 3, 4)  # channels that a PNG holds: grey, RGB, RGBA
_WRITERS = 8  # each waits for the disk; together they wait a tenth of the time
_MADE_WITH = "made_with"  # noted, but no part of what must agree to continue


def write_samples(
    generator: ImageGenerator,
    out: Path,
    seeds: list[int],
    *,
    labels: int | np.ndarray | None = None,
    conditions: np.ndarray | None = None,
    guide: ImageGenerator | None = None,
    batch_size: int = 250,
    grid: int = 400,
    quiet: bool = False,
    world: World | None = None,
    **options: Any,
) -> Path:
    """Sample into a folder, one file a seed, and a grid of the first ones; or into one `.zip` or `.npz`.

    What holds samples of the same model and settings is continued: seeds that are there and whole are kept. An
    archive is packed from the folder `NAME.parts` once that is complete. Under torchrun the processes share the seeds.

    Args:
        generator: what to sample from.
        out: folder, made where missing; or a file that ends in .zip or .npz.
        seeds: one per image.
        labels: class of all images, or an array whose row `seed modulo rows` is an image's class or vector;
            default: seed modulo the number of classes.
        conditions: `[N, cond_channels, H, W]`, chosen like the rows of labels.
        guide: model to guide with.
        batch_size: images at a time.
        grid: most images on the grid; 0 for no grid.
        quiet: show no progress.
        world: the processes that share the work; default: this one alone.
        **options: fields of `SamplerOptions`.

    Returns:
        The grid's file for a folder of pictures; else `out`.

    Raises:
        ValueError: if inputs do not fit the model, or `out` holds samples of another model or made with other
            settings; nothing is changed then.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    if grid < 0:
        raise ValueError(f"grid {grid} must be at least 0; 0 is none")
    for name, array in (("labels", labels), ("conditions", conditions)):
        if isinstance(array, np.ndarray) and not len(array):
            raise ValueError(f"{name} is an array without rows: an image takes the row `seed modulo rows`")
    rows = _rows_of(generator, labels, seeds)
    # All conditions have one shape; a row for each of many seeds would not fit into memory.
    first = (
        None if conditions is None else np.broadcast_to(conditions[0], (len(seeds), *conditions.shape[1:]))
    )
    generator.check_inputs(len(seeds), rows, first)
    if guide is not None:
        generator.check_guide(guide)
    world = World(rank=0, size=1, device=torch.device("cpu")) if world is None else world
    chosen_options = SamplerOptions(**options)
    guided(generator.denoiser, None if guide is None else guide.denoiser, chosen_options.guidance)
    settings = _settings(generator, guide, labels, conditions, chosen_options)
    packed = out.suffix.lower() in ARCHIVES
    if packed and out.exists():
        _check_same(out, read_settings(out), {**settings, "seeds": _digest(np.asarray(seeds))})
        return out
    folder = out.with_name(f"{out.name}.parts") if packed else out
    world.on_first(lambda: _claim(folder, settings))
    pixels = generator.pixel_channels in _PNG_MODES
    files = [folder / f"{seed:06d}.{'png' if pixels else 'npy'}" for seed in seeds]
    todo = _missing(files, warn=world.is_first)
    world.any(False)  # all have seen what is to be done before the first file is added
    todo = todo[world.rank :: world.size]
    done = len(seeds) - len(todo) if world.size == 1 else 0
    total = len(seeds) if world.size == 1 else len(todo)
    with Progress("sampling", total, "images", done=done, quiet=quiet or not world.is_first) as progress:
        for start in range(0, len(todo), batch_size):
            part = todo[start : start + batch_size]
            chosen = [seeds[i] for i in part]
            images = generator.images(
                chosen,
                None if rows is None else rows[part],
                conditions=None if conditions is None else conditions[np.array(chosen) % len(conditions)],
                batch_size=batch_size,
                guide=guide,
                **options,
            )
            with ThreadPoolExecutor(_WRITERS) as pool:
                list(pool.map(_write_image, [files[i] for i in part], images))
            progress.advance(len(part))
    world.any(False)
    if packed:
        world.on_first(lambda: _pack(out, settings, files, seeds, rows))
    shown = files[:grid] if pixels and not packed else []
    if shown:
        world.on_first(lambda: _save_grid(shown, folder / "grid.png", generator.num_classes))
    return folder / "grid.png" if shown else out


def _rows_of(
    generator: ImageGenerator, labels: int | np.ndarray | None, seeds: list[int]
) -> np.ndarray | None:
    if isinstance(labels, np.ndarray):
        return labels[np.asarray(seeds) % len(labels)]
    if labels is not None:
        return np.full(len(seeds), labels, np.int64)
    return generator.labels_for(seeds) if generator.num_classes else None


def _settings(
    generator: ImageGenerator,
    guide: ImageGenerator | None,
    labels: int | np.ndarray | None,
    conditions: np.ndarray | None,
    options: SamplerOptions,
) -> dict[str, Any]:
    settings = {
        "model": generator.identity(),
        "guide": None if guide is None else guide.identity(),
        "labels": "seed modulo classes" if labels is None else _named(labels),
        "conditions": None if conditions is None else _digest(conditions),
        "sampler": options.to_json(),
    }
    made_with = {"edm2": edm2.__version__, "torch": torch.__version__}
    return json.loads(json.dumps({**settings, _MADE_WITH: made_with}))


def _named(labels: int | np.ndarray) -> dict[str, Any]:
    return {"array": _digest(labels)} if isinstance(labels, np.ndarray) else {"class": labels}


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.shape}{array.dtype}".encode() + array.tobytes()).hexdigest()[:16]


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS_FILE
    if path.exists():
        try:
            old = json.loads(path.read_text())
            if not isinstance(old, dict):
                raise ValueError("it holds no table of settings")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}): choose another --out") from error
        _check_same(folder, old, settings)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no samples of edm2: choose another --out")
    else:
        write_json(path, settings)


def _check_same(where: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    old, new = _flat(old), _flat(new)
    differing = [
        f"{key} {old.get(key)} there, {new.get(key)} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(_MADE_WITH)
    ]
    if differing:
        raise ValueError(
            f"{where} holds samples made otherwise ({'; '.join(differing)}): choose another --out"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _pack(
    out: Path, settings: dict[str, Any], files: list[Path], seeds: list[int], rows: np.ndarray | None
) -> None:
    settings = {**settings, "seeds": _digest(np.asarray(seeds))}
    if out.suffix.lower() == ".zip":
        write_zip(out, settings, files, seeds, rows)
    else:
        write_npz(out, settings, (_read(file) for file in files), seeds, rows)
    folder = files[0].parent
    for file in files:
        file.unlink()
    if not any(path.name != SETTINGS_FILE for path in folder.iterdir()):  # else it holds other seeds
        (folder / SETTINGS_FILE).unlink()
        folder.rmdir()


def _save_grid(files: list[Path], path: Path, classes: int) -> None:
    shown = read_images(files)
    columns = classes if 4 <= classes <= 32 else max(1, round(len(shown) ** 0.5))
    save_png(image_grid(shown, columns=min(columns, len(shown)), scale=_zoom(shown.shape[-1])), path)


def _missing(files: Sequence[Path], *, warn: bool) -> list[int]:
    """Which files are not there, or not whole: as other programs and full disks leave them."""
    missing, damaged = [], []
    for i, file in enumerate(files):
        if not file.exists():
            missing.append(i)
        elif not _is_whole(file):
            damaged.append(i)
    if damaged and warn:
        warnings.warn(
            f"{len(damaged)} files are damaged and made again, such as {files[damaged[0]]}", stacklevel=3
        )
    return sorted(missing + damaged)


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)
            return True
        with Image.open(path) as image:
            image.verify()  # checksums of all parts, which takes less than decoding them
    # Pillow's error of a broken PNG is a SyntaxError.
    except (OSError, ValueError, EOFError, SyntaxError):
        return False
    return True


def _write_image(path: Path, image: np.ndarray) -> None:
    content = BytesIO()
    if path.suffix == ".png":
        array = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(array)).save(content, format="PNG")
    else:
        np.save(content, image, allow_pickle=False)
    write_atomic(path, content.getvalue())


def read_images(paths: Sequence[Path]) -> np.ndarray:
    """PNG files of one size as an array, `[N, C, H, W]` uint8."""
    return np.stack([_read(path) for path in paths])


def _read(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    with Image.open(path) as image:
        array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _zoom(side: int) -> int:
    return max(1, 32 // side)
