"""Runs, snapshots, models, results and pickles to damage, and the ways to read them; see `hostile_files`."""

import hashlib
import json
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile_files
import numpy as np
import safetensors.numpy
import torch
import torch.distributed.checkpoint
from hostile_files import ROOT, Target, Way, command

from edm2.data import ArrayDataset, PairedDataset
from edm2.diffusion import load_model
from edm2.ema import average_checkpoints, reconstruct
from edm2.evaluation.images import open_images
from edm2.evaluation.references import read_reference
from edm2.evaluation.results import read_result
from edm2.generate import ImageGenerator
from edm2.hub import open_pretrained, save_pretrained
from edm2.interop.ema_folders import open_ema_folder
from edm2.interop.nvlabs import load_network, open_snapshots, read_reference_statistics
from edm2.train import EMAConfig, NetworkConfig, TrainConfig, train
from edm2.tuning.result import Knobs, Tried, Tuned, read_tuned, save_tuned


def tuned(run: Path) -> None:
    knobs = Knobs(sigma_rel=0.08, guide_images=80, guide_sigma_rel=0.05, guidance=2.0, interval=(0.0, 8.0))
    found = Tuned(
        best=knobs, num_steps=2, sampler="euler", tried=[Tried(stage="length", knobs=knobs, score=1.0)],
        held_out=[1.0, 1.1, 1.0], baseline=[2.0, 2.1, 2.0], num_images=160,
    )  # fmt: skip
    save_tuned(run, found)


def _resealed_snapshot(path: Path) -> dict[Path, bytes]:
    """The manifest with the sums of a snapshot as it is now."""
    manifest, data = path.with_name("manifest.json"), path.read_bytes()
    content = json.loads(manifest.read_bytes())
    length = 8 + struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    sums = {
        "num_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "header_sha256": hashlib.sha256(data[:length]).hexdigest(),
    }
    content["snapshots"] = [s | sums if s["file"] == path.name else s for s in content["snapshots"]]
    return {manifest: json.dumps(hostile_files.resealed(content)).encode()}


def _resealed_checkpoint(path: Path) -> dict[Path, bytes]:
    """The checkpoint's manifest with the sums of a file as it is now."""
    manifest, data = path.with_name("manifest.json"), path.read_bytes()
    if path == manifest:
        return {}
    content = json.loads(manifest.read_bytes())
    content["files"][path.name] = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {manifest: json.dumps(hostile_files.resealed(content)).encode()}


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
    for name in ("log.jsonl", "magnitudes.jsonl", "validation.jsonl", "validation.json"):
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
        yield Target("safetensors", path, ema, _resealed_snapshot)
    for path in sorted((run / "checkpoints").rglob("*.*")):
        kind = "JSON" if path.suffix == ".json" else "safetensors"
        yield Target(kind, path, {"train": train}, _resealed_checkpoint)
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


def outputs(folder: Path, run: Path) -> Iterator[Target]:
    """What commands left in their outputs, read when the same command is given again."""
    ensemble = {"format": "edm2 ensemble 1", "made_by": {}, "scores": {}}
    (folder / "scores.json").write_text(json.dumps(ensemble))
    samples, again = (
        folder / "samples",
        command(
            "sample", str(run), "--seeds", "0-9", "--num-steps", "2", "--ema", "0.08", "--out", "FILE", up=1
        ),
    )
    again(samples / "samples.json")
    yield Target(
        "JSON", samples / "samples.json", {"again": again, "open": lambda p: open_images(str(p.parent))}
    )
    for step in (1, 2, 3):
        place = folder / "weights" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        (place / "model.safetensors").write_bytes(
            safetensors.numpy.save({"a": np.full((2, 3), step, np.float32)})
        )
    merge = command("ema", "merge", str(folder / "weights"), "--target", "0.1", "--out", "FILE", up=1)
    merge(folder / "merged" / "merged.json")
    yield Target("JSON", folder / "merged" / "merged.json", {"again": merge})


def residual(folder: Path) -> Iterator[Target]:
    """A run of residuals, with the regression beside it."""
    rng = np.random.default_rng(0)
    images, conditions = (rng.normal(size=(32, 1, 4, 4)).astype(np.float32) for _ in range(2))
    data = PairedDataset(ArrayDataset(images, name="pairs"), ArrayDataset(conditions))

    def run(name: str, **changes: Any) -> Path:
        network = NetworkConfig(
            model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8
        )
        config = TrainConfig(
            num_images=32, batch_size=8, snapshot_images=16, checkpoint_images=16, log_images=16, device="cpu",
            network=network, ema=EMAConfig(sigma_rels=(0.05, 0.1)), **changes,
        )  # fmt: skip
        train(config, folder / name, dataset=data, quiet=True)
        return folder / name

    mean = run("mean", objective="mean")

    def again() -> Path:
        return run("rest", residual=str(mean))

    rest = again()
    ways: dict[str, Way] = {
        "train": lambda _: again(),
        "info": command("info", "FILE", up=1),
        "report": command("report", "FILE", "--no-samples", up=1),
        "load": lambda p: ImageGenerator.load(p.parent).images([0], conditions=conditions[:1], num_steps=1),
    }
    for name in ("residual.json", "mean.safetensors", "model.safetensors"):
        yield Target("JSON" if name.endswith("json") else "safetensors", rest / name, ways)


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
