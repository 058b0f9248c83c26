"""Samples in a folder of numbered files or one archive, with the settings that made them."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import edm2
from edm2.data.pictures import encoded
from edm2.diffusion import guided
from edm2.files import claimed, read_json, write_json
from edm2.generate.archive import ARCHIVES, SETTINGS_FILE, read_settings, write_npz, write_zip
from edm2.generate.checks import check_guide, check_inputs, warn_of_strange
from edm2.generate.generator import ImageGenerator
from edm2.generate.image_files import PNG_CHANNELS, missing_files, read_images, write_image
from edm2.generate.parts import Parts
from edm2.generate.sampler_options import SamplerOptions
from edm2.progress import Progress
from edm2.report import class_grid, save_png
from edm2.train.run_folder import difference, flat_settings
from edm2.train.world import World

_GRID = "grid.png"
_WRITERS = 8  # threads, because each waits for the disk
_MADE_WITH = "made_with"  # noted, but need not agree to continue


def write_samples(
    generator: ImageGenerator,
    out: Path,
    seeds: list[int],
    *,
    labels: int | np.ndarray | None = None,
    conditions: np.ndarray | None = None,
    vectors: np.ndarray | None = None,
    guide: ImageGenerator | None = None,
    batch_size: int = 250,
    grid: int = 400,
    quiet: bool = False,
    world: World | None = None,
    **options: Any,
) -> Path:
    """Sample into a folder, one file per seed, and a grid of the first ones; or into one `.zip` or `.npz`.

    The same call continues interrupted work: whole images of the same model and settings are kept. An archive is packed
    from the batches in the folder `NAME.parts` once all are there. Under torchrun the processes share the seeds.

    Args:
        generator: The model to sample from.
        out: Folder, made if missing; or a file that ends in .zip or .npz.
        seeds: One seed per image.
        labels: Class of all images, or an array whose row `seed modulo rows` is an image's class or vector;
            default: seed modulo the number of classes.
        conditions: Condition images, as in `ImageGenerator.images`, chosen like the rows of labels.
        vectors: Vectors, chosen in the same way.
        guide: Model to guide with.
        batch_size: Images at a time.
        grid: Maximum number of images in the grid; 0 for no grid.
        quiet: Whether to show no progress.
        world: The processes that share the work; default: this one alone.
        **options: Fields of `SamplerOptions`.

    Returns:
        The grid's file for a folder of pictures; otherwise `out`.

    Raises:
        ValueError: If inputs do not fit the model, `out` holds samples of another model or other settings, or another
            process is writing it; nothing is changed then.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    if grid < 0:
        raise ValueError(f"grid {grid} must be at least 0; 0 makes no grid")
    given = {"conditions": conditions, "vectors": vectors}
    for name, array in (("labels", labels), *given.items()):
        if isinstance(array, np.ndarray) and not len(array):
            raise ValueError(f"{name} is an array without rows: each image takes row `seed modulo rows`")
    rows = _rows_of(generator, labels, seeds)
    # Views: a row for each of many seeds would not fit into memory.
    first = {
        name: None if array is None else np.broadcast_to(array[0], (len(seeds), *array.shape[1:]))
        for name, array in given.items()
    }
    check_inputs(generator, len(seeds), rows, **first)
    warn_of_strange(generator, conditions, vectors)
    if guide is not None:
        check_guide(generator, guide)
    world = World(rank=0, size=1, device=torch.device("cpu")) if world is None else world
    chosen_options = generator.sampler_options(**options)
    guided(generator.denoiser, None if guide is None else guide.denoiser, chosen_options.guidance)
    settings = sampling_record(generator, guide, chosen_options, labels, given)
    packed = out.suffix.lower() in ARCHIVES
    folder = out.with_name(f"{out.name}.parts") if packed else out
    suffix = ".png" if generator.pixel_channels in PNG_CHANNELS else ".npy"
    files = [folder / f"{seed:06d}{suffix}" for seed in seeds]
    parts = Parts(folder, ".npy" if out.suffix.lower() == ".npz" else suffix) if packed else None
    work = _Work(generator, guide, seeds, rows, given, options, files, parts)
    if packed and out.exists():
        check_same(out, read_settings(out), {**settings, "seeds": digest(np.asarray(seeds))})
        if folder.exists():  # left by a kill after the archive was written
            world.on_first(lambda: _remove_parts(work, out))
        return out
    with ExitStack() as stack:
        world.on_first(lambda: _claim(stack, folder, out, settings))
        _sample(work, world, batch_size, quiet)
        world.any(False)
        if packed:
            world.on_first(lambda: _pack(work, out, settings))
        elif grid and suffix == ".png":
            # Only images of classes in turn stand in columns of one class.
            turn = labels is None and seeds == [*range(seeds[0], seeds[0] + len(seeds))]
            turn = turn and not seeds[0] % max(generator.num_classes, 1)
            names = generator.class_names if turn else ()
            world.on_first(lambda: _save_grid(files[:grid], folder / _GRID, generator.num_classes, names))
            return folder / _GRID
    return out


class _Work(NamedTuple):
    generator: ImageGenerator
    guide: ImageGenerator | None
    seeds: list[int]
    rows: np.ndarray | None
    given: dict[str, np.ndarray | None]
    options: dict[str, Any]
    files: list[Path]
    parts: Parts | None

    def missing(self, *, warn: bool) -> list[int]:
        """Which images are missing or damaged."""
        if self.parts is None:
            return missing_files(self.files, warn=warn)
        found = self.parts.find(check=True, warn=warn)
        return [i for i, seed in enumerate(self.seeds) if seed not in found]

    def store(self, pool: ThreadPoolExecutor, part: list[int], images: np.ndarray) -> None:
        """Write some of the images."""
        if self.parts is None:
            list(pool.map(write_image, [self.files[i] for i in part], images))
        else:
            suffix = self.parts.suffix
            contents = list(pool.map(lambda image: encoded(image, suffix), images))
            self.parts.add([self.seeds[i] for i in part], contents)


def _sample(work: _Work, world: World, batch_size: int, quiet: bool) -> None:
    """Write this process's share of the images that are missing or damaged."""
    todo = work.missing(warn=world.is_first)
    world.any(False)  # all processes have looked before the first file is added
    todo = todo[world.rank :: world.size]
    total = len(work.seeds) if world.size == 1 else len(todo)
    with (
        Progress(
            "sampling", total, "images", done=total - len(todo), quiet=quiet or not world.is_first
        ) as progress,
        ThreadPoolExecutor(_WRITERS) as pool,
    ):
        for start in range(0, len(todo), batch_size):
            part = todo[start : start + batch_size]
            chosen = [work.seeds[i] for i in part]
            given = {
                name: None if array is None else array[np.array(chosen) % len(array)]
                for name, array in work.given.items()
            }
            images = work.generator.images(
                chosen,
                None if work.rows is None else work.rows[part],
                **given,
                batch_size=batch_size,
                guide=work.guide,
                **work.options,
            )
            work.store(pool, part, images)
            progress.advance(len(part))


def _rows_of(
    generator: ImageGenerator, labels: int | np.ndarray | None, seeds: list[int]
) -> np.ndarray | None:
    if isinstance(labels, np.ndarray):
        return np.take(labels, np.asarray(seeds) % len(labels), axis=0)
    if labels is not None:
        return np.full(len(seeds), labels, np.int64)
    return generator.labels_for(seeds) if generator.num_classes else None


def sampling_record(
    generator: ImageGenerator,
    guide: ImageGenerator | None,
    options: SamplerOptions,
    labels: int | np.ndarray | None = None,
    given: dict[str, np.ndarray | None] | None = None,
) -> dict[str, Any]:
    """Everything but the seeds that images depend on, as JSON values; arguments as of `write_samples`."""
    conditions, vectors = ((given or {}).get(name) for name in ("conditions", "vectors"))
    settings = {
        "model": generator.identity(),
        "guide": None if guide is None else guide.identity(),
        "labels": "seed modulo classes" if labels is None else _named(labels),
        "conditions": None if conditions is None else digest(conditions),
        "sampler": options.to_json(),
    }
    if vectors is not None:
        settings["vectors"] = digest(vectors)
    made_with = {"edm2": edm2.__version__, "torch": torch.__version__}
    record: dict[str, Any] = json.loads(json.dumps({**settings, _MADE_WITH: made_with}))
    return record


def _named(labels: int | np.ndarray) -> dict[str, Any]:
    return {"array": digest(labels)} if isinstance(labels, np.ndarray) else {"class": labels}


def digest(array: np.ndarray) -> str:
    """Sixteen hexadecimal digits of an array's shape, type and values."""
    return hashlib.sha256(f"{array.shape}{array.dtype}".encode() + array.tobytes()).hexdigest()[:16]


def _claim(stack: ExitStack, folder: Path, out: Path, settings: dict[str, Any]) -> None:
    """Hold the folder until the stack ends, and note the settings or check that they are the same."""
    stack.enter_context(claimed(folder, out))
    path = folder / SETTINGS_FILE
    if path.exists():
        try:
            old = read_json(path)
            if not isinstance(old, dict):
                raise ValueError("it does not hold a table of settings")
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): choose another --out") from error
        check_same(folder, old, settings)
    elif any(not entry.name.startswith(f".{SETTINGS_FILE}") for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and does not hold samples of edm2: choose another --out")
    else:
        write_json(path, settings)


def check_same(where: Path, old: dict[str, Any], new: dict[str, Any], *, what: str = "samples") -> None:
    """Raise ValueError unless what lies somewhere was made with the same settings; versions may differ."""
    old, new = (
        {name: value for name, value in flat_settings(x).items() if not name.startswith(_MADE_WITH)}
        for x in (old, new)
    )
    if old != new:
        raise ValueError(
            f"{where} holds {what} of other settings ({difference(old, new)}): choose another --out"
        )


def _pack(work: _Work, out: Path, settings: dict[str, Any]) -> None:
    parts = work.parts
    assert parts is not None
    parts.find()
    settings = {**settings, "seeds": digest(np.asarray(work.seeds))}
    contents = map(parts.read, work.seeds)
    if out.suffix.lower() == ".zip":
        write_zip(out, settings, contents, parts.suffix, work.seeds, work.rows)
    else:
        write_npz(out, settings, contents, work.seeds, work.rows)
    _clear(work)


def _remove_parts(work: _Work, out: Path) -> None:
    assert work.parts is not None
    with claimed(work.parts.folder, out):
        _clear(work)


def _clear(work: _Work) -> None:
    assert work.parts is not None
    work.parts.remove(work.seeds)
    folder = work.parts.folder
    if not any(path.name != SETTINGS_FILE for path in folder.iterdir()):  # else it holds other seeds
        (folder / SETTINGS_FILE).unlink(missing_ok=True)
        folder.rmdir()


def _save_grid(files: list[Path], path: Path, classes: int, names: Sequence[str]) -> None:
    save_png(class_grid(read_images(files), classes, names), path)
