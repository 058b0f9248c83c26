"""The notebook of the first hour runs from top to bottom, with small arguments."""

import io
import json
import runpy
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edm2.forecast import Forecast, write_forecast

NOTEBOOK = Path(__file__).parent.parent / "examples" / "first_hour.ipynb"


def test_the_first_hour_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: str(tmp_path))
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # outputs would make every run a change of the file
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert {"images", "num_seeds", "num_steps"} <= names.keys()
                names |= {"images": 640, "num_seeds": 6, "num_steps": 2}
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert names["averaged"] < names["raw"]
    assert "images of (1, 8, 8), 10 classes" in capsys.readouterr().out


def test_emoji_of_a_package_become_folders_of_classes(tmp_path: Path) -> None:
    def emoji(name: str, category: str, has_img_twitter: bool = True) -> dict[str, object]:
        return {
            "category": category, "has_img_twitter": has_img_twitter, "image": f"{name}.png", "short_name": name
        }  # fmt: skip

    table = [emoji("smile", "Smileys & Emotion"), emoji("de", "Flags"), emoji("abc", "Symbols")]
    files = {"emoji.json": json.dumps([*table, emoji("none", "Flags", False)]).encode()}
    files |= {f"img/twitter/64/{e['image']}": b"png" for e in table}
    package = tmp_path / "package.tgz"
    with tarfile.open(package, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    script = runpy.run_path(str(NOTEBOOK.parent / "emoji_folder.py"))
    counts = script["make_folder"](package, tmp_path / "emoji")
    assert {name: count for name, count in counts.items() if count} == {"faces": 1, "flags": 1}
    found = sorted(str(p.relative_to(tmp_path / "emoji")) for p in (tmp_path / "emoji").rglob("*.png"))
    assert found == ["faces/smile-smile.png", "flags/de-de.png"]


def test_pairs_of_pictures(tmp_path: Path) -> None:
    script = runpy.run_path(str(NOTEBOOK.parent / "picture_pairs.py"))
    script["write_sizes"]("digits", 5, tmp_path)
    with np.load(tmp_path / "pairs.npz") as pairs:
        images, small = pairs["images"], pairs["conditions"]
    assert (images.shape[1:], small.shape[1:]) == ((1, 8, 8), (1, 4, 4))
    assert len(images) == len(small)
    assert small[3, 0, 1, 2] == np.rint(images[3, 0, 2:4, 4:6].mean())
    script["write_films"](6, 2, tmp_path)
    with np.load(tmp_path / "test.npz") as films:
        frames = films["frames"]
    assert frames.shape == (2, script["FILM"], 1, 16, 16)
    assert len(set(frames[0].sum((1, 2, 3)))) == 1  # the digit never leaves the picture
    assert (frames[0, 1:] != frames[0, :-1]).any((1, 2, 3)).all()  # and never rests
    with np.load(tmp_path / "pairs.npz") as pairs:
        assert pairs["images"].shape == (6 * (script["FILM"] - 2), 1, 16, 16)
        # The first moment of each film comes first: 6 pairs later, the image has become the later condition.
        np.testing.assert_array_equal(pairs["images"][0, 0], pairs["conditions"][6, 1])
    made = np.zeros((2, 5, 3, 1, 16, 16), np.uint8)
    for leads in (1, 3):
        forecast = Forecast(members=made[:, :, :leads], truth=made[:, 0, :leads])
        write_forecast(tmp_path / f"{leads}.npz", forecast)
        script["draw"](tmp_path / f"{leads}.npz", tmp_path / "picture.png", cases=2)
        with Image.open(tmp_path / "picture.png") as picture:
            assert picture.width > leads * 64
            assert picture.height > 8 * 64
