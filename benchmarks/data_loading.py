"""How long a training step waits for its images, by kind of storage and number of workers.

    python benchmarks/data_loading.py

The step is a sleep that leaves the processors to the workers, as a step on a GPU does. The share of time
spent waiting is what training would lose. On a machine that trains on its processors, workers compete with
the step.
"""

import json
import os
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from common import machine, options
from PIL import Image

from edm2.data import Batches, ImageDataset, open_dataset


def pictures(count: int, size: int) -> np.ndarray:
    """Smooth colour pictures with a little noise, which compress about as photographs do."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    smooth = [
        np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in small
    ]
    noise = rng.integers(-6, 7, (count, size, size, 3))
    return np.clip(np.stack(smooth) + noise, 0, 255).astype(np.uint8)


def make_sources(root: Path, images: np.ndarray) -> dict[str, Path]:
    """The same images as a folder of PNG, of JPEG, a ZIP of PNG, and one array."""
    sources = {"PNG folder": root / "png", "JPEG folder": root / "jpg"}
    for folder in sources.values():
        folder.mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{number:06d}.{folder.name}")
    sources["PNG in a ZIP"] = root / "png.zip"
    with zipfile.ZipFile(sources["PNG in a ZIP"], "w") as archive:
        for file in sorted((root / "png").iterdir()):
            archive.write(file, file.name)
        archive.writestr("dataset.json", json.dumps({"labels": None}))
    sources["one .npy"] = root / "x.npy"
    np.save(sources["one .npy"], images.transpose(0, 3, 1, 2))
    return sources


def measure(
    dataset: ImageDataset, batch: int, steps: int, step_seconds: float, workers: int, processes: bool
) -> tuple[float, float]:
    """Images a second, and the share of time spent waiting, after two steps to fill the queue."""
    with Batches(dataset, batch, seed=0, workers=workers, processes=processes) as batches:
        for _ in range(2):
            next(batches)
            time.sleep(step_seconds)
        waited, start = batches.wait_seconds, time.perf_counter()
        for _ in range(steps):
            next(batches)
            time.sleep(step_seconds)
        seconds = time.perf_counter() - start
        return batch * steps / seconds, (batches.wait_seconds - waited) / seconds


def main() -> None:
    arguments = options(
        __doc__,
        images=2000,
        size=64,
        batch=256,
        steps=20,
        step_seconds=0.25,
        workers=(0, 1, 2, 4),
        processes=False,
    )
    kind = "processes" if arguments.processes else "threads"
    print(f"{machine(torch.device('cpu'))}; {os.cpu_count()} processors, workers are {kind}")
    print(
        f"{arguments.images} images of {arguments.size}x{arguments.size}x3, batches of {arguments.batch}, "
        f"a step of {arguments.step_seconds} s"
    )
    print(f"{'storage':<14} {'workers':>7} {'images/s':>9} {'waiting':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, path in make_sources(Path(folder), pictures(arguments.images, arguments.size)).items():
            dataset = open_dataset(path)
            for workers in arguments.workers:
                rate, waiting = measure(
                    dataset,
                    arguments.batch,
                    arguments.steps,
                    arguments.step_seconds,
                    workers,
                    arguments.processes,
                )
                print(f"{name:<14} {workers:>7} {rate:>9.0f} {100 * waiting:>7.1f}%", flush=True)


if __name__ == "__main__":
    main()
