"""The example for azula runs: an adapter to another library's solvers of inverse problems."""

import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("azula")
# azula imports code with deprecated annotations.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
EXAMPLE = Path(__file__).parents[3] / "examples" / "azula_inpainting.py"


def test_known_pixels_stay_and_hidden_ones_are_filled(digits_run, tmp_path, capsys):
    example = runpy.run_path(str(EXAMPLE))
    from edm2 import ImageGenerator

    generator = ImageGenerator.load(digits_run)
    prior = example["Azula"](generator.denoiser)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor(0.5), torch.tensor([1, 2])
    expected = generator.denoiser(x, prior.schedule.sigma(t), labels)
    assert torch.equal(prior(x, t, labels=labels).mean, expected)

    errors = example["main"](
        [str(digits_run), "--count", "3", "--steps", "8", "--out", str(tmp_path / "made.png")]
    )
    assert len(errors) == 2
    assert "mean error of the hidden pixels" in capsys.readouterr().out
    with Image.open(tmp_path / "made.png") as picture:
        assert picture.size[0] > 100


def test_known_pixels_are_kept(digits_run):
    from edm2 import ImageGenerator
    from edm2.data import open_dataset

    example = runpy.run_path(str(EXAMPLE))
    images = open_dataset("digits", split="test").images(range(2))
    hidden = torch.zeros(8, 8, dtype=torch.bool)
    hidden[4:] = True
    import numpy as np

    made = example["inpaint"](ImageGenerator.load(digits_run), images, np.array([3, 4]), hidden, steps=32)
    assert np.abs(made[:, :, :4].astype(int) - images[:, :, :4]).max() < 12
