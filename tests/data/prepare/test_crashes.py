"""`edm2 data convert` and `encode`, stopped at every operation on files."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from crashes import check_every_interruption
from PIL import Image

from edm2.data import ArrayDataset
from edm2.data.prepare import convert as convert_module
from edm2.data.prepare import latents
from edm2.data.prepare.convert import Conversion, convert
from edm2.data.sources import open_catalog

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_convert_goes_on_after_any_interruption(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(convert_module, "CHUNK_IMAGES", 2)

    def work(root: Path) -> None:
        convert(open_catalog(pictures), root / name, Conversion(size=(4, 4)), workers=1, quiet=True)

    assert check_every_interruption(tmp_path, work) > 20


@pytest.mark.slow
def test_encode_goes_on_after_any_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "_CHUNK_IMAGES", 2)
    monkeypatch.setattr(
        latents, "encode_images", lambda autoencoder, images, pixel_range: images.repeat(1, 2, 1, 1) / 2
    )
    dataset = ArrayDataset(np.random.default_rng(0).integers(0, 256, (3, 3, 4, 4), dtype=np.uint8))

    class Autoencoder:
        config = SimpleNamespace(in_channels=3, block_out_channels=(4,))

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"weight": torch.ones(1)}

    def work(root: Path) -> None:
        latents.encode_latents(dataset, root / "out.zip", Autoencoder(), quiet=True)

    assert check_every_interruption(tmp_path, work) > 20


def test_the_check_finds_work_that_trusts_what_lies_there(tmp_path: Path) -> None:
    def careless(root: Path) -> None:
        if not (root / "out").exists():
            (root / "out").write_text("content")
            (root / "done").touch()

    for kind in ("kill", "half written", "failing disk"):
        (tmp_path / kind).mkdir()
        with pytest.raises(
            AssertionError, match=f"{kind} at operation 2 of 2: the same again gives something else"
        ):
            check_every_interruption(tmp_path / kind, careless, kinds=(kind,))
