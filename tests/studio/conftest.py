"""Tiny runs on pairs for the studio."""

import dataclasses

import numpy as np
import pytest

from edm2.data import open_dataset
from edm2.train import DataConfig, train

SIZE = 64


def digits():
    data = open_dataset("digits")
    return data.images(np.arange(SIZE)), data.labels(np.arange(SIZE))


def trained(tmp_path_factory, tiny_digits, *, name, validation=None, dataset=None, **arrays):
    folder = tmp_path_factory.mktemp(name)
    np.savez(folder / "pairs.npz", **arrays)
    config = tiny_digits(
        data=str(folder / "pairs.npz"),
        dataset=dataset or DataConfig(),
        validation=validation,
        num_images=400,
        snapshot_images=100,
    )
    train(dataclasses.replace(config, record_magnitudes=False), folder / "run", quiet=True)
    return folder / "run"


@pytest.fixture(scope="session")
def pixels(tmp_path_factory, tiny_digits):
    """Digits from their left halves, with classes; a quarter is held out."""
    images, labels = digits()
    options = {"conditions": images[..., :4], "labels": labels, "validation": "0.25"}
    resampled = DataConfig(resample="nearest")
    return trained(tmp_path_factory, tiny_digits, name="pixels", images=images, dataset=resampled, **options)


@pytest.fixture(scope="session")
def floats(tmp_path_factory, tiny_digits):
    """Fields of two channels from fields of three and a vector."""
    rng = np.random.default_rng(0)
    fields = rng.normal(280, 8, (SIZE, 5, 8, 8)).astype(np.float32)
    vectors = rng.normal(size=(SIZE, 2)).astype(np.float32)
    return trained(
        tmp_path_factory, tiny_digits, name="floats", images=fields[:, :2], conditions=fields[:, 2:], vectors=vectors
    )  # fmt: skip
