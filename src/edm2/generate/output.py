"""Writing samples: numbered PNG files, a contact sheet, and the settings they were made with."""

import json
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edm2.files import write_atomic, write_json
from edm2.generate.generator import Generator
from edm2.progress import Progress
from edm2.report import image_grid, save_png

SETTINGS_FILE = "samples.json"
_GRID_LIMIT = 400
_PNG_MODES = (1, 3, 4)  # channels that a PNG holds: grey, RGB, RGBA


def parse_seeds(text: str) -> list[int]:
    """Seeds from text such as `0-63` or `1,5,10-12`.

    Raises:
        ValueError: for text of another form, an empty range, or a seed given twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match:
            raise ValueError(
                f"seeds {text!r}: {part!r} is neither a number nor a range; write 0-63 or 1,5,10-12"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"seeds {text!r}: the range {part.strip()} ends before it begins")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        raise ValueError(f"seeds {text!r}: seed {twice} is given twice; each seed is one image")
    return seeds


def write_samples(
    generator: Generator,
    out: Path,
    seeds: list[int],
    *,
    labels: list[int] | None = None,
    batch_size: int = 250,
    quiet: bool = False,
    **options: Any,
) -> Path:
    """Sample into a folder, one file a seed, and a grid of the first ones.

    A folder that holds samples of the same model and settings is continued: seeds that are there are kept.

    Args:
        generator: what to sample from.
        out: folder; made where missing.
        seeds: one per image.
        labels: class of each image; default: seed modulo the number of classes.
        batch_size: images at a time.
        quiet: show no progress.
        **options: options of the sampler.

    Returns:
        The grid's file for pixels; the folder for data that is no picture, whose samples are .npy files.

    Raises:
        ValueError: if the folder holds samples of another model or made with other settings.
    """
    classes = list(generator.labels_for(seeds)) if labels is None and generator.num_classes else labels
    settings = {
        "model": {key: generator.info.get(key) for key in ("run_id", "num_images", "sigma_rel", "data")},
        "labels": "seed modulo classes" if labels is None else "given",
        "sampler": options,
    }
    _claim(out, settings)
    pixels = generator.coding.kind == "pixels" and generator.denoiser.img_channels in _PNG_MODES
    name = "{:06d}.png" if pixels else "{:06d}.npy"
    todo = [i for i, seed in enumerate(seeds) if labels is not None or not (out / name.format(seed)).exists()]
    with Progress("sampling", len(seeds), "images", done=len(seeds) - len(todo), quiet=quiet) as progress:
        for start in range(0, len(todo), batch_size):
            part = todo[start : start + batch_size]
            chosen = None if classes is None else [int(classes[i]) for i in part]
            images = generator.images([seeds[i] for i in part], chosen, batch_size=batch_size, **options)
            for i, image in zip(part, images, strict=True):
                _write_image(out / name.format(seeds[i]), image, pixels)
            progress.advance(len(part))
    if not pixels:
        return out
    shown = read_images([out / name.format(seed) for seed in seeds[:_GRID_LIMIT]])
    columns = generator.num_classes if 4 <= generator.num_classes <= 32 else max(1, round(len(shown) ** 0.5))
    grid = out / "grid.png"
    save_png(image_grid(shown, columns=min(columns, len(shown)), scale=_zoom(shown.shape[-1])), grid)
    return grid


def _claim(out: Path, settings: dict[str, Any]) -> None:
    path = out / SETTINGS_FILE
    settings = json.loads(json.dumps(settings))
    if path.exists():
        old = json.loads(path.read_text())
        if old != settings:
            differing = [key for key in settings if old.get(key) != settings[key]]
            raise ValueError(
                f"{out} holds samples made otherwise ({', '.join(differing)} differ): choose another --out"
            )
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no samples of edm2: choose another --out")
    else:
        write_json(path, settings)


def _write_image(path: Path, image: np.ndarray, pixels: bool) -> None:
    content = BytesIO()
    if pixels:
        array = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(array)).save(content, format="PNG")
    else:
        np.save(content, image, allow_pickle=False)
    write_atomic(path, content.getvalue(), durable=False)


def read_images(paths: Sequence[Path]) -> np.ndarray:
    """PNG files of one size as an array, `[N, C, H, W]` uint8."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            array = np.asarray(image)
        images.append(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
    return np.stack(images)


def _zoom(side: int) -> int:
    return max(1, 32 // side)
