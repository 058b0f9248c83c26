from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from edm2.evaluation.generated import GeneratedImages
from edm2.evaluation.images import open_images


@pytest.mark.parametrize("settings", ["", "{", "[1]", "3", "[" * 10_000])
def test_settings_of_samples_that_are_damaged(tmp_path, settings):
    for seed in range(6):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"{seed:06d}.png")
    (tmp_path / "samples.json").write_text(settings)
    with pytest.raises(ValueError, match=r"samples.json is damaged \(.*: sample again"):
        open_images(str(tmp_path))


def test_only_pictures_are_measured_without_saving_them():
    generator = SimpleNamespace(pixel_channels=0, coding=SimpleNamespace(kind="latents"))
    with pytest.raises(ValueError, match="the model makes latents, and extractors see pictures: sample with"):
        GeneratedImages(generator, range(8))
