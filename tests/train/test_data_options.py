"""Damaged images and mirroring, as a run meets them."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import tiny_config, tiny_data

from edm2.data import mirror
from edm2.train import DataConfig, Trainer, train


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    content = (folder / "05.png").read_bytes()
    (folder / "05.png").write_bytes(content[:50])  # the header is whole, the pixels are not
    return folder


def test_a_damaged_image_stops_the_run_before_it_starts(images, tmp_path):
    with pytest.raises(ValueError, match=r"05\.png"):
        train(tiny_config(data=str(images)), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_damaged_images_are_skipped_and_counted_where_wanted(images, tmp_path):
    config = tiny_config(data=str(images), num_images=16, dataset=DataConfig(skip_damaged=True))
    with pytest.warns(UserWarning, match="1 "):
        train(config, tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_mirroring_is_a_function_of_the_position(tmp_path):
    config = tiny_config(num_images=16)
    seen = []

    class Watched(Trainer):
        pass

    for mirrored in (False, True):
        trainer = Watched(
            dataclasses.replace(config, dataset=DataConfig(mirror=mirrored)),
            tiny_data(),
            tmp_path / str(mirrored),
        )
        noisy = []
        hook = trainer.denoiser.register_forward_pre_hook(
            lambda _, inputs, kept=noisy: kept.append(inputs[0])
        )
        trainer.step()
        hook.remove()
        trainer.close()
        seen.append(noisy[0])
    plain, turned = seen
    where = torch.arange(8)
    chosen = (mirror(torch.arange(4.0).expand(8, 1, 4, 4), where, seed=config.seed)[:, 0, 0, 0] == 3).tolist()
    assert 0 < sum(chosen) < 8
    assert [not torch.equal(a, b) for a, b in zip(plain, turned, strict=True)] == chosen
