import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edm2.cli import main
from edm2.data import open_dataset
from edm2.data.sources import holds_pairs

RNG = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        Image.fromarray(RNG.integers(0, 256, (8 + i, 12, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_info_then_convert_then_info(folder, tmp_path, capsys):
    main(["data", "info", str(folder)])
    assert "5 different sizes: run 'edm2 data convert" in capsys.readouterr().out
    out = tmp_path / "new" / "x.zip"
    out.parent.mkdir()
    main(["data", "convert", str(folder), "--out", str(out), "--size", "8", "--workers", "1"])
    assert capsys.readouterr().out == f"{out}: 5 images\n"
    main(["data", "info", str(out)])
    text = capsys.readouterr().out
    assert "8x8 (height x width)" in text
    assert "different sizes" not in text


def test_convert_says_what_it_enlarged_and_skipped(folder, tmp_path, capsys):
    (folder / "0.png").write_bytes(b"x")
    out = tmp_path / "out"
    words = ["data", "convert", str(folder), "--out", str(out), "--size", "10x12", "--workers", "1"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "image '0.png' in" in capsys.readouterr().err
    main([*words, "--skip-damaged", "--mode", "gray"])
    text = capsys.readouterr().out
    assert (
        f"{out}: 4 images\nenlarged because smaller: 1\nskipped because unreadable: 1\n  0.png: cannot"
        in text
    )
    assert open_dataset(out).image_shape == (1, 10, 12)


@pytest.mark.parametrize("size", ["big", "8x8x8", "x"])
def test_sizes_that_are_none(folder, tmp_path, size, capsys):
    with pytest.raises(SystemExit):
        main(["data", "convert", str(folder), "--out", str(tmp_path / "out"), "--size", size])
    assert f"--size '{size}' is not a size: write 64, or height and width as 64x96" in capsys.readouterr().err


def test_encode_without_diffusers(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit):
        main(["data", "encode", "digits", "--out", str(tmp_path / "x"), "--vae", "a/b"])
    assert "pip install -e '.[latent]'" in capsys.readouterr().err


def test_streams_need_a_mode(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["data", "convert", "hf://a/b", "--out", str(tmp_path / "x"), "--stream"])
    assert "choose mode gray, rgb or rgba" in capsys.readouterr().err


def test_info_shows_pairs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(270, 290, (12, 2, 8, 8)).astype(np.float32)
    images[:, :, :4] = np.nan
    conditions = rng.integers(0, 256, (12, 3, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, conditions=conditions, vectors=np.arange(12))
    main(["data", "info", str(tmp_path / "x.npz"), "--picture", str(tmp_path / "x.png")])
    told = capsys.readouterr()
    assert "images      2 x 8 x 8 of float32" in told.out
    assert ", missing 50.00%" in told.out
    assert "conditions  3 x 4 x 4 of uint8" in told.out
    assert "entry 0: 0 to 11, mean 5.5" in told.out
    assert "--dataset.resample bicubic --dataset.missing mask" in told.err
    with Image.open(tmp_path / "x.png") as picture:
        table = np.asarray(picture)
    # One colour picture of the condition, two fields of the image, six pairs.
    assert table.shape[1] > 3 * 96
    assert table.shape[0] > 6 * 96
    assert (table[..., 3] == 0).any()


def test_a_damaged_archive_is_left_to_the_reader_of_images(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros((4, 1, 8, 8), np.uint8), conditions=np.zeros((4, 1, 8, 8)))
    assert holds_pairs(path)
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"))  # in the table of its members
    assert not holds_pairs(path)
