"""A training run so small that a step takes milliseconds; shared by tests and the processes they start."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from edm2.data import ArrayDataset
from edm2.train import EMAConfig, NetworkConfig, OptimizerConfig, TrainConfig
from edm2.train.logs import LOG_FILE, read_log

CHANGING = {"seconds", "images_per_second"}  # what the log says about the machine and the day


def tiny_data(count: int = 40) -> ArrayDataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)
    return ArrayDataset(images, np.arange(count) % 3, name="tiny")


def tiny_config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "num_images": 160,
        "batch_size": 8,
        "snapshot_images": 80,
        "checkpoint_images": 40,
        "log_images": 16,
        "device": "cpu",
        "network": tiny_network(),
        "ema": EMAConfig(sigma_rels=(0.05, 0.10)),
        "optimizer": OptimizerConfig(ref_lr=0.02, ref_batches=10, rampup_mimg=0.00003),
    }
    return TrainConfig(**{**settings, **changes})


def tiny_network(**changes: Any) -> NetworkConfig:
    settings: dict[str, Any] = {
        "model_channels": 8,
        "channel_mult": (1,),
        "num_blocks": 1,
        "attn_resolutions": (),
        "channels_per_head": 8,
        "dropout": 0.1,
    }
    return NetworkConfig(**{**settings, **changes})


def files_of(out: Path) -> dict[str, str]:
    """Digest of every file of a run but its logs, hidden leftovers included."""
    found = (Path(folder) / name for folder, _, names in os.walk(out) for name in names)
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(found)
        if path.suffix != ".jsonl"
    }


def log_of(out: Path, name: str = LOG_FILE) -> list[dict[str, Any]]:
    """What the log says of the run, without times."""
    return [{k: v for k, v in record.items() if k not in CHANGING} for record in read_log(out, name)]
