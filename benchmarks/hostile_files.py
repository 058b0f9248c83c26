"""Mutated and hostile files through the readers of edm2: what `robustness.py mutate` and `robustness.py pickles` try.

A try writes one damaged file among whole ones and gives all of them to a command or a function. Only documented errors
may come back; nothing may run, hang, fill the memory, or be written outside the folder.
"""

import collections
import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import torch.distributed.checkpoint
from PIL import Image

from edm2.cli import main
from edm2.data import open_dataset
from edm2.data.pictures import decode, read_header
from edm2.diffusion import load_model
from edm2.ema import average_checkpoints, reconstruct
from edm2.evaluation.references import is_reference, read_reference
from edm2.evaluation.results import read_result
from edm2.files import sealed
from edm2.generate import ImageGenerator
from edm2.hub import open_pretrained, save_pretrained
from edm2.interop.ema_folders import open_ema_folder
from edm2.interop.nvlabs import load_network, open_snapshots, read_reference_statistics
from edm2.tuning.result import Knobs, Tried, Tuned, read_tuned, save_tuned

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
from mutations import mutate_bytes, mutate_json, mutate_pickle, mutate_safetensors, mutate_zip  # noqa: E402

SECONDS = 20  # a try that takes longer hangs
MEMORY = 1 << 30  # bytes of address space that a try may take before it fails with a MemoryError
GROWTH = 200 << 20  # bytes of memory that a try may take
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)
Way = Callable[[Path], object]


@dataclasses.dataclass(frozen=True)
class Target:
    """A file to damage, and the ways to read it: each takes the file's path."""

    kind: str
    path: Path
    ways: dict[str, Way]


# Reading.


def command(*words: str, up: int = 0) -> Way:
    """A command of edm2 on the file's folder of some levels up (0: the file itself); FILE and OUT are filled in."""

    def run(path: Path) -> None:
        source = path if not up else path.parents[up - 1]
        out = path.parents[0] / "out.tmp"
        texts = {"FILE": str(source), "OUT": str(out), "OUT.png": f"{out}.png", "OUT.zip": f"{out}.zip"}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
            try:
                main([texts.get(word, word) for word in words])
            except SystemExit as end:
                if end.code not in (None, 0, 1, 2):
                    raise
                if end.code:
                    raise ValueError(told.getvalue()[-300:]) from None

    return run


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


# Whole files.


def tuned(run: Path) -> None:
    knobs = Knobs(sigma_rel=0.08, guide_images=80, guide_sigma_rel=0.05, guidance=2.0, interval=(0.0, 8.0))
    found = Tuned(
        best=knobs, num_steps=2, sampler="euler", tried=[Tried(stage="length", knobs=knobs, score=1.0)],
        held_out=[1.0, 1.1, 1.0], baseline=[2.0, 2.1, 2.0], num_images=160,
    )  # fmt: skip
    save_tuned(run, found)


def json_and_safetensors(folder: Path, run: Path, train: Way) -> Iterator[Target]:
    """The files of a run (`train` gives its command again), a shared model, results, and checkpoints in shards."""
    tuned(run)
    ema = {
        "list": command("ema", "list", "FILE", up=2),
        "verify": command("ema", "verify", "FILE", up=2),
        "reconstruct": lambda p: reconstruct(p.parent, 0.08, warn_above=np.inf),
        "ema reconstruct": command("ema", "reconstruct", "FILE", "--sigma-rel", "0.08", "--out", "OUT", up=2),
    }
    info, report = command("info", "FILE", up=1), command("report", "FILE", "--no-samples", up=1)
    data = {
        "dataset": lambda p: dataset(p.parent),
        "data info": command("data", "info", "FILE", up=1),
        "convert": command("data", "convert", "FILE", "--out", "OUT.zip", "--size", "4", up=1),
    }
    yield Target(
        "JSON",
        run / "config.json",
        {"info": info, "report": report, "train": train, "load": lambda p: load_model(p.parent)},
    )
    yield Target(
        "JSON",
        run / "snapshots" / "manifest.json",
        {
            **ema,
            "train": train,
            "report": command("report", "FILE", up=2),
            "load": lambda p: ImageGenerator.load(p.parents[1], 0.08).images([0], num_steps=1),
            "sample": command(
                "sample", "FILE", "--ema", "0.08", "--seeds", "0", "--num-steps", "2", "--out", "OUT", up=2
            ),
        },
    )
    for name in ("log.jsonl", "magnitudes.jsonl"):
        yield Target("JSON", run / name, {"info": info, "report": report, "train": train})
    yield Target(
        "JSON", run / "tuning" / "tuned.json",
        {"read": lambda p: read_tuned(p.parents[1]), "open": lambda p: open_pretrained(p.parents[1]),
         "sample": command("sample", "FILE", "--seeds", "0-1", "--out", "OUT", "--num-steps", "2", up=2)},
    )  # fmt: skip
    model = run / "model.safetensors"
    ways = {
        "info": command("info", "FILE"),
        "load": load_model,
        "sample": lambda p: ImageGenerator.load(p).images([0], num_steps=1),
    }
    yield Target("safetensors", model, ways)
    for path in sorted((run / "snapshots").glob("*.safetensors"))[:2]:
        yield Target("safetensors", path, ema)
    for path in sorted((run / "checkpoints").rglob("*.*")):
        yield Target("JSON" if path.suffix == ".json" else "safetensors", path, {"train": train})
    shared = save_pretrained(model, folder / "shared")
    ways = {"info": command("info", "FILE", up=1), "open": lambda p: open_pretrained(p.parent)}
    yield Target("JSON", shared / "config.json", ways)
    yield Target("safetensors", shared / "model.safetensors", ways)
    result = {
        "format": "edm2 metrics 1", "extractor": {"name": "e", "num_features": 2, "sha256": None},
        "images": {"source": "a", "num_images": 3}, "reference": {"images": {"source": "b", "num_images": 3}},
        "settings": {"seed": 0}, "versions": {}, "scores": {"frechet_distance": 1.0}, "warnings": ["w"],
    }  # fmt: skip
    for name in ("result.json", "other.json"):
        (folder / name).write_text(json.dumps(result))
    yield Target("JSON", folder / "result.json", {
        "read": read_result, "compare": command("metrics", "compare", "FILE", str(folder / "other.json")),
    })  # fmt: skip
    labels = {"labels": [["a/0.png", 1], ["b/1.png", 0]], "class_names": ["x", "y"]}
    for name in ("a/0.png", "b/1.png"):
        (folder / "data" / name).parent.mkdir(parents=True)
        (folder / "data" / name).write_bytes(saved(PIXELS[:8, :8, :3], "PNG"))
    (folder / "data" / "dataset.json").write_text(json.dumps(labels))
    yield Target("JSON", folder / "data" / "dataset.json", data)
    merge = {
        "average": lambda p: average_checkpoints(p.parents[1], [0.1]),
        "merge": command("ema", "merge", "FILE", "--target", "0.1", "--out", "OUT", up=2),
    }
    for step in (1, 2, 3):
        place = folder / "shards" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        parts = {
            "a.safetensors": {"a": np.ones((2, 3), np.float32)},
            "b.safetensors": {"b": np.ones(3, np.float32)},
        }
        for name, tensors in parts.items():
            (place / name).write_bytes(safetensors.numpy.save(tensors))
        weight_map = {"a": "a.safetensors", "b": "b.safetensors"}
        (place / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 36}, "weight_map": weight_map})
        )
    yield Target("JSON", place / "model.safetensors.index.json", merge)
    yield Target("safetensors", place / "a.safetensors", merge)
    arrays = {"fid.mu": np.zeros(3), "fid.sigma": np.eye(3)}
    (folder / "reference.safetensors").write_bytes(
        safetensors.numpy.save(arrays, {"edm2": json.dumps({"format": "edm2.reference/1", "num_images": 9})})
    )
    yield Target(
        "safetensors",
        folder / "reference.safetensors",
        {"read": read_reference, "statistics": read_reference_statistics},
    )


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


def pickles(folder: Path) -> Iterator[Target]:
    """Official networks, snapshots and statistics; files of torch.save; metadata of torch.distributed.checkpoint."""
    official = next((ROOT / "tests" / "golden" / "nvlabs_snapshots").glob("*.pkl"))
    place = folder / "official" / official.name
    place.parent.mkdir(parents=True)
    place.write_bytes(official.read_bytes())
    ways = {
        "network": load_network,
        "import": command("import", "FILE", "--out", "OUT"),
        "snapshots": lambda p: open_snapshots(p.parent),
        "list": command("ema", "list", "FILE", up=1),
    }
    yield Target("pickles", place, ways)
    statistics = {"num_images": 9, "fid": {"mu": np.zeros(3), "sigma": np.eye(3)}}
    (folder / "statistics.pkl").write_bytes(pickle.dumps(statistics, 4))
    yield Target(
        "pickles",
        folder / "statistics.pkl",
        {"read": read_reference, "statistics": read_reference_statistics},
    )
    cifar = folder / "cifar-10-batches-py"
    cifar.mkdir()
    batch = pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}, 3)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (cifar / name).write_bytes(batch)
    (cifar / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"a", b"b"]}, 3))
    for name in ("data_batch_3", "batches.meta"):
        yield Target("pickles", cifar / name, {"dataset": lambda p: dataset(p.parent)})
    state = {"a": torch.linspace(0.1, 1, 6).reshape(2, 3), "b": torch.linspace(0.2, 1, 3)}
    merge = {
        "average": lambda p: average_checkpoints(p.parents[1], [0.1]),
        "merge": command("ema", "merge", "FILE", "--target", "0.1", "--out", "OUT", up=2),
    }
    for step in (1, 2, 3):
        for kind in ("torch", "distributed"):
            (folder / kind / f"checkpoint-{step}").mkdir(parents=True)
        torch.save(state, folder / "torch" / f"checkpoint-{step}" / "model.pt")
        torch.distributed.checkpoint.save(
            state, checkpoint_id=folder / "distributed" / f"checkpoint-{step}", no_dist=True
        )
    yield Target("pickles", folder / "torch" / "checkpoint-3" / "model.pt", merge)
    yield Target("pickles", folder / "distributed" / "checkpoint-3" / ".metadata", merge)
    yield Target("pickles", next((folder / "distributed" / "checkpoint-3").glob("*.distcp")), merge)
    for track in (0, 1):
        for step in (1000, 2000):
            content = {
                "initted": torch.tensor(True),
                "step": torch.tensor(step),
                **{f"ema_model.{n}": x for n, x in state.items()},
            }
            (folder / "averages").mkdir(exist_ok=True)
            torch.save(content, folder / "averages" / f"{track}.{step}.pt")
    averages = {
        "open": lambda p: open_ema_folder(p.parent, sigma_rels=(0.05, 0.28), update_every=10),
        "list": command("ema", "list", "FILE", "--given-sigma-rels", "0.05,0.28", "--update-every", "10", up=1),
    }  # fmt: skip
    yield Target("pickles", folder / "averages" / "1.2000.pt", averages)


# Damage.


def damaged(target: Target, good: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """The file with bytes changed, or with its content changed and written well."""
    if rng.random() < 0.3:
        return mutate_bytes(good, rng, others)
    if target.kind == "JSON":
        return mutated_json(target, good, rng)
    if target.kind == "safetensors":
        return mutate_safetensors(good, rng)
    if target.kind == "ZIP":
        return mutate_zip(good, rng, others)
    if target.kind == "pickles":
        return mutated_pickle(good, rng)
    return mutate_bytes(good, rng, others)


def mutated_json(target: Target, good: bytes, rng: random.Random) -> bytes:
    lines = good.splitlines() if target.path.suffix == ".jsonl" else [good]
    chosen = rng.randrange(len(lines))
    content = json.loads(lines[chosen])
    for _ in range(rng.choice((1, 1, 2, 3))):
        changed = mutate_json(content, rng)
        content = changed if isinstance(changed, dict) else content
    if rng.random() < 0.8:  # a stranger knows how checksums are made
        content = resealed(target.path.name, content)
    lines[chosen] = json.dumps(content).encode()
    return b"\n".join(lines)


def resealed(name: str, content: dict[str, Any]) -> dict[str, Any]:
    if name == "manifest.json":
        content.pop("checksum", None)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return {**content, "checksum": hashlib.sha256(text.encode()).hexdigest()}
    if name.endswith(".jsonl"):
        text = json.dumps({key: value for key, value in content.items() if key != "crc32"})
        return {**json.loads(text), "crc32": zlib.crc32(text.encode())}
    if "sha256" in content:
        return sealed({key: value for key, value in content.items() if key != "sha256"})
    return content


def mutated_pickle(good: bytes, rng: random.Random) -> bytes:
    """The pickle, or the one inside an archive of torch.save, with other instructions."""
    if not zipfile.is_zipfile(io.BytesIO(good)):
        return mutate_pickle(good, rng) if good.startswith(b"\x80") else mutate_bytes(good, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            new.writestr(
                member.filename,
                mutate_pickle(content, rng) if member.filename.endswith("data.pkl") else content,
            )
    return out.getvalue()


# Trying.

# A compiled text does nothing before "exec", and NumPy compiles the headers of arrays to read them.
_EXECUTING = (
    "pickle.find_class",
    "exec",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_watched: list[str] | None = None
_inside = ""


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event in _EXECUTING and not (event == "exec" and Path(args[0].co_filename).is_file()):  # an import
        _watched.append(f"executed: {event} {str(args)[:80]}")
    writes = event == "open" and isinstance(args[0], str) and (args[2] or 0) & _WRITING
    if writes and not args[0].startswith((_inside, "/dev/")):
        _watched.append(f"written outside: {args[0]}")


class TooLong(BaseException):
    """No Exception, because a reader would take it for damage."""


def _too_long(*_: Any) -> None:
    raise TooLong


def virtual_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def resident(what: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))
    return int(line.split()[1]) << 10


def try_all(
    folder: Path, targets: list[Target], count: int, seed: int, only: int | None = None
) -> collections.Counter[str]:
    """Damage the files in turn, and read each in one of its ways, chosen at random; the slow report rarely."""
    global _watched, _inside
    _inside = str(folder)
    sys.addaudithook(_audit)
    repr(torch.zeros(1))  # imports what torch needs for that
    _watched = []
    eval("0")
    assert _watched, "what is executed is not seen"
    _watched = None
    signal.signal(signal.SIGALRM, _too_long)
    whole = {target.path: target.path.read_bytes() for target in targets}
    others = [x for path, x in whole.items() if path.suffix in (".png", ".jpg", ".webp", ".gif", ".tif")]
    for target in targets:  # imports what readers need, and shows that the whole files are read
        for name, way in target.ways.items():
            try:
                way(target.path)
            except ValueError as error:
                raise AssertionError(f"{target.path} is refused by {name} although it is whole") from error
            tidy(target.path)
    kinds = sorted({target.kind for target in targets})
    by_kind = {kind: [t for t in targets if t.kind == kind] for kind in kinds}
    limit = virtual_memory() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found: collections.Counter[str] = collections.Counter()
    most = dict.fromkeys(kinds, 0)
    for case in range(count * len(kinds)) if only is None else [only]:
        rng = random.Random(f"{seed} {case}")
        random.seed(case)
        target = rng.choice(by_kind[kinds[case % len(kinds)]])
        name = rng.choice([n for n in target.ways if n != "report" or rng.random() < 0.1])
        target.path.write_bytes(damaged(target, whole[target.path], others, rng))
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        before, _watched = resident("VmRSS"), []
        signal.alarm(SECONDS)
        try:
            target.ways[name](target.path)
            outcome = "read"
        except (ValueError, OSError) as error:
            outcome = "refused"
            if not str(error).strip():
                outcome = f"traceback: {error!r} without words"
        except TooLong:
            outcome = "hang"
        except (Exception, SystemExit) as error:
            outcome = f"traceback: {type(error).__name__}"
            traceback.print_exc()
        finally:
            signal.alarm(0)
            events, _watched = _watched, None
        grown = resident("VmHWM") - before
        most[target.kind] = max(most[target.kind], grown)
        for bad in [
            *events,
            *([f"memory: {grown >> 20} MB"] if grown > GROWTH else []),
            *([outcome] if outcome not in ("read", "refused") else []),
        ]:
            print(
                f"case {case}: {target.path.relative_to(folder)} by {name}: {bad}",
                file=sys.stderr,
                flush=True,
            )
            found[f"{target.kind}: {bad.split(':')[0]}"] += 1
        found[f"{target.kind}: {outcome.split(':')[0]}"] += outcome in ("read", "refused")
        target.path.write_bytes(whole[target.path])
        tidy(target.path)
    for kind, number in most.items():
        print(f"{kind}: at most {number / 2**20:.0f} MB more memory during a try")
    return found


def tidy(path: Path) -> None:
    """Remove what a command wrote."""
    for left in [*path.parent.glob("out.tmp*"), *path.parent.glob(".out.tmp*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
