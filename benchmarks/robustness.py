"""How files and outputs fare: flipped bits, two processes with one output, reads beside a writer, hostile files.

    python benchmarks/robustness.py flips --count 10000
    python benchmarks/robustness.py pairs --count 200
    python benchmarks/robustness.py reads --count 1000
    python benchmarks/robustness.py mutate --count 20000
    python benchmarks/robustness.py values
    python benchmarks/robustness.py pickles --count 20000

Each prints a count of outcomes, and ends with exit code 1 if one of them is silent, wrong or a traceback, or if a file
of the last three kinds runs something, hangs, takes 200 MB, or writes outside its folder.
"""

import argparse
import collections
import hashlib
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from edm2.data import ArrayDataset
from edm2.data.prepare.convert import Conversion, convert
from edm2.data.sources import open_catalog
from edm2.diffusion import load_model
from edm2.ema import PowerEMA, reconstruct
from edm2.ema.storage.manifest import read_manifest
from edm2.ema.storage.snapshots import damaged
from edm2.generate import ImageGenerator, reconstruct_models, write_samples
from edm2.train import EMAConfig, NetworkConfig, TrainConfig, train
from edm2.train.checkpoint import verify
from edm2.train.logs import LOG_FILE, MAGNITUDES_FILE, read_log
from edm2.train.run_folder import CHECKPOINTS, SNAPSHOTS, read_config

sys.path.insert(0, str(Path(__file__).parent))
import hostile_data
import hostile_files
import hostile_runs

LENGTH = 0.08
BAD = (
    "silent",
    "unnamed",
    "traceback",
    "wrong",
    "left over",
    "executed",
    "hang",
    "memory",
    "written outside",
)


def make_run(folder: Path, **changes: Any) -> Path:
    """Train a network of a few thousand parameters, with two checkpoints and four snapshots."""
    images = np.random.default_rng(0).integers(0, 256, (24, 1, 4, 4), dtype=np.uint8)
    network = NetworkConfig(
        model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8
    )
    config = TrainConfig(
        num_images=160, batch_size=8, snapshot_images=80, checkpoint_images=80, log_images=16, device="cpu",
        network=network, ema=EMAConfig(sigma_rels=(0.05, 0.1)), **changes,
    )  # fmt: skip
    data = ArrayDataset(images, np.arange(24) % 3, name="noise")
    train(config, folder / "run", dataset=data, quiet=True)
    return folder / "run"


def readings(run: Path) -> dict[str, Callable[[], Any]]:
    """Everything that reads a file of a run, by what it reads; the results are compared."""

    def tensors(state: dict[str, torch.Tensor]) -> str:
        return hashlib.sha256(b"".join(v.numpy().tobytes() for _, v in sorted(state.items()))).hexdigest()

    def checked(problems: list[str]) -> None:
        if problems:
            raise ValueError("; ".join(problems))

    def snapshots() -> Any:
        manifest = read_manifest(run / SNAPSHOTS)
        checked(list(damaged(run / SNAPSHOTS, manifest)))
        found = reconstruct(run / SNAPSHOTS, LENGTH, warn_above=np.inf)
        return manifest, found.expected_error, tensors(found.tensors)

    def model() -> Any:
        denoiser, info = load_model(run)
        return info, denoiser.options, tensors(denoiser.state_dict())

    def checkpoints() -> None:
        run_id = read_config(run)["run_id"]
        checked([p for c in sorted((run / CHECKPOINTS).iterdir()) if (p := verify(c, run_id=run_id))])

    return {
        "config.json": lambda: [read_config(run)[key] for key in ("run_id", "identity", "settings")],
        LOG_FILE: lambda: read_log(run),
        MAGNITUDES_FILE: lambda: read_log(run, MAGNITUDES_FILE),
        "model.safetensors": model,
        SNAPSHOTS: snapshots,
        CHECKPOINTS: checkpoints,
    }


def flips(folder: Path, count: int) -> collections.Counter[str]:
    """Flip one bit of one file of a run, and read everything that reads it."""
    run, rng = make_run(folder), random.Random(0)
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
    whole = {name: reading() for name, reading in readings(run).items()}
    found: collections.Counter[str] = collections.Counter()
    for _ in range(count):
        path = rng.choice(files)
        old = path.read_bytes()
        new = bytearray(old)
        new[rng.randrange(len(new))] ^= 1 << rng.randrange(8)
        path.write_bytes(new)
        part = path.relative_to(run).parts[0]
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                content = readings(run)[part]()
            is_log = part in (LOG_FILE, MAGNITUDES_FILE)
            if content == whole[part]:
                found["changes nothing"] += 1
            elif is_log and len(content) == len(whole[part]) - 1 and path.name in str(told[0].message):
                found["one log line lost, and named"] += 1
            else:
                found[f"silent: {part}"] += 1
        except (ValueError, OSError) as error:
            named = path.name in str(error) or path.parent.name in str(error)
            found["named" if named else f"unnamed: {error}"] += 1
        except Exception as error:  # what a user would see as a traceback
            found[f"traceback: {part}: {error!r}"] += 1
        path.write_bytes(old)
    return found


def tree(path: Path) -> dict[str, str]:
    """Hash of each file below a path, or of the file itself."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def pairs(folder: Path, count: int) -> collections.Counter[str]:
    """Start two processes with the same output at nearly the same time."""
    run, rng, source = make_run(folder), random.Random(0), folder / "pictures"
    source.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(source / f"{i}.png")
    generator = ImageGenerator.load(run)
    size = Conversion(size=(4, 4))
    works: dict[str, Callable[[Path], Any]] = {
        "convert.zip": lambda out: convert(open_catalog(source), out, size, workers=1, quiet=True),
        "convert": lambda out: convert(open_catalog(source), out, size, workers=1, quiet=True),
        "sample": lambda out: write_samples(generator, out, [0, 1, 2], batch_size=1, num_steps=1, quiet=True),
        "sample.npz": lambda out: write_samples(
            generator, out, [0, 1, 2], batch_size=1, num_steps=1, quiet=True
        ),
        "reconstruct": lambda out: list(reconstruct_models(run, [LENGTH, 0.2], out)),
    }
    found: collections.Counter[str] = collections.Counter()
    for name, work in works.items():
        work(folder / f"alone-{name}")
        expected = tree(folder / f"alone-{name}")
        for n in range(count):
            box = folder / f"{n}-{name}"
            box.mkdir()
            codes = [_forked(work, box / name, rng.random() * 0.03) for _ in range(2)]
            statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in codes]
            right = 0 in statuses and tree(box / name) == expected
            left = [p.name for p in box.iterdir()] != [name]
            told = "both done" if statuses == [0, 0] else "one refused" if 2 in statuses else "traceback"
            found[f"{name}: {told if right else 'wrong'}{', left over' if left else ''}"] += 1
    return found


def _forked(work: Callable[[Path], Any], out: Path, wait: float) -> int:
    process = os.fork()
    if process == 0:
        code = 0
        try:
            time.sleep(wait)
            work(out)
        except (ValueError, FileExistsError):
            code = 2
        except BaseException as error:
            print(f"{error!r}", file=sys.stderr)
            code = 1
        os._exit(code)
    return process


def reads(folder: Path, count: int) -> collections.Counter[str]:
    """Reconstruct from a folder while another process adds snapshots to it and keeps six."""
    out = folder / "snapshots"
    process = os.fork()
    if process == 0:
        model = torch.nn.Linear(32, 32)
        ema = PowerEMA(model, run_id="run")
        for step in range(1, 10**9):
            with torch.no_grad():
                model.weight.add_(0.01)
            ema.update(step)
            ema.snapshot(out, keep=6)
    found: collections.Counter[str] = collections.Counter()
    while not (out / "manifest.json").exists() or len(read_manifest(out).snapshots) < 6:
        time.sleep(0.05)
    for _ in range(count):
        try:
            reconstruct(out, LENGTH, warn_above=np.inf)
            found["read"] += 1
        except Exception as error:
            found[f"traceback: {error!r}"] += 1
    os.kill(process, 9)
    os.waitpid(process, 0)
    return found


def hostile_targets(folder: Path) -> list[hostile_files.Target]:
    """All files but pickles that are damaged."""

    def place(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    def validated(folder: Path) -> Path:
        return make_run(folder, validation="0.25")

    files = place("files")
    return [
        *hostile_runs.json_and_safetensors(files, validated(files), lambda _: validated(files)),
        *hostile_runs.outputs(place("outputs"), files / "run"),
        *hostile_runs.residual(place("residual")),
        *hostile_data.archives(place("archives")),
        *hostile_data.pictures(place("pictures")),
        *hostile_data.folders(place("folders")),
        *hostile_data.fields(place("fields")),
        *hostile_data.forecasts(place("forecasts")),
        *hostile_data.settings(place("settings")),
    ]


def mutate(folder: Path, count: int, **chosen: Any) -> hostile_files.Outcomes:
    """Damage JSON, safetensors, ZIP archives, pictures, and fields of numbers, each kind in turn."""
    targets = [target for target in hostile_targets(folder) if target.kind != "pickles"]
    return hostile_files.try_all(folder, targets, hostile_files.at_random(targets, count, **chosen))


def values(folder: Path, match: str = "") -> hostile_files.Outcomes:
    """Put absurd values into every place of every JSON text."""
    targets = hostile_targets(folder)
    return hostile_files.try_all(folder, targets, hostile_files.every_value(targets, match))


def pickles(folder: Path, count: int, **chosen: Any) -> hostile_files.Outcomes:
    """Damage pickles, and put hostile calls into them."""
    targets = [
        *hostile_runs.pickles(folder),
        *(t for t in hostile_data.fields(folder) if t.kind == "pickles"),
    ]
    return hostile_files.try_all(folder, targets, hostile_files.at_random(targets, count, **chosen))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    works: dict[str, Callable[..., collections.Counter[str]]] = {
        work.__name__: work for work in (flips, pairs, reads, mutate, values, pickles)
    }
    parser.add_argument("what", choices=works)
    parser.add_argument("--count", type=int, default=100, help="tries (pairs: of each output)")
    parser.add_argument("--seed", type=int, default=0, help="of mutate and pickles")
    parser.add_argument("--only", type=int, help="the one try of mutate or pickles with this number")
    parser.add_argument("--match", default="", help="values: part of the paths of the files to change")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        if chosen.what == "values":
            found = values(Path(folder), chosen.match)
        else:
            seeded = (
                {"seed": chosen.seed, "only": chosen.only} if chosen.what in ("mutate", "pickles") else {}
            )
            found = works[chosen.what](Path(folder), chosen.count, **seeded)
    for outcome, number in sorted(found.items()):
        print(f"{number:7,}  {outcome}")
    raise SystemExit(any(word in outcome for outcome in found for word in BAD))


if __name__ == "__main__":
    main()
