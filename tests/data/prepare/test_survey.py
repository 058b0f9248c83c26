import tracemalloc

import numpy as np
import pytest
from PIL import Image

from edm2.data.prepare.describe import describe
from edm2.data.prepare.survey import survey
from edm2.data.sources import open_catalog

RNG = np.random.default_rng(0)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def look(path, **options):
    found = survey(open_catalog(path), quiet=True, **options)
    return found, describe(found)


def test_counts_and_moments(tmp_path):
    images = RNG.integers(60, 200, (9, 4, 6, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        save(tmp_path / ("cat" if i < 3 else "dog") / f"{i}.png", image)
    found, text = look(tmp_path)
    scaled = images / 127.5 - 1
    assert found.mean == pytest.approx(scaled.mean((0, 1, 2)))
    assert found.std == pytest.approx(scaled.std((0, 1, 2)))
    assert (found.num_images, found.minimum, found.maximum) == (9, images.min(), images.max())
    assert found.num_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.png"))
    assert found.sizes == {(4, 6): 9}
    assert found.class_sizes.tolist() == [3, 6]
    for line in (
        "images    9, ",
        "4x6 (height x width)",
        "mode      RGB",
        "2, of 3 (cat) to 6 (dog) images",
        "  dog: 6",
    ):
        assert line in text
    assert "3 channels of uint8" in text


def test_a_sample_is_said_to_be_one(tmp_path):
    for i in range(9):
        save(tmp_path / f"{i}.png", RNG.integers(0, 256, (4, 4), dtype=np.uint8))
    found, text = look(tmp_path, sample=5)
    assert found.num_decoded == 5
    assert "on 5 images" in text
    assert "classes   none" in text
    with pytest.raises(ValueError, match="sample 0 must be at least 1"):
        look(tmp_path, sample=0)


def test_everything_that_needs_fixing_is_said(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a" / "0.png", RNG.integers(0, 256, (4, 4), dtype=np.uint8))
    save(tmp_path / "a" / "1.jpg", RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8), exif=exif)
    save(tmp_path / "b" / "2.png", RNG.integers(0, 256, (9, 9, 4), dtype=np.uint8))
    (tmp_path / "b" / "3.png").write_bytes(b"x")
    whole = (tmp_path / "b" / "2.png").read_bytes()
    (tmp_path / "b" / "4.png").write_bytes(whole[: len(whole) // 2])
    found, text = look(tmp_path)
    text += "\n"
    assert [name for name, _ in found.damaged] == ["b/3.png", "b/4.png"]
    for line in (
        "cannot be read: 2 images: 'b/3.png' (",
        f"3 different sizes: run 'edm2 data convert {tmp_path} --out NEW.zip --size N', N up to 4 enlarges no image",
        "different modes: all with 3 channels",
        "turned upright as EXIF says: 1 image\n",
    ):
        assert line in text
    changes, problems = text.split("to fix")
    assert "turned upright" in changes.split("when read")[1]
    assert "damaged" in problems
    assert found.sizes == {(4, 4): 1, (6, 4): 1, (9, 9): 2}


def test_different_kinds_have_no_moments(tmp_path):
    save(tmp_path / "0.png", np.zeros((4, 4), np.uint8))
    np.save(tmp_path / "1.npy", np.zeros((5, 4, 4), np.float32))
    found, text = look(tmp_path)
    assert found.mean is None
    assert (
        "different kinds of images (1 channel of uint8: 1; 5 channels of float32: 1): train on each separately"
        in text
    )


def test_magnitude_and_constant_channels(tmp_path):
    np.save(tmp_path / "x.npy", RNG.normal(100, 7, (20, 1, 8, 8)).astype(np.float32))
    text = look(tmp_path / "x.npy")[1]
    assert (
        "coding    measured (the default) brings these to 0 and 0.5; plain would leave the magnitude 100, far"
        in text
    )
    assert text.endswith("\nto fix    nothing")
    np.save(tmp_path / "x.npy", RNG.normal(0, 0.5, (20, 1, 8, 8)).astype(np.float32))
    text = look(tmp_path / "x.npy")[1]
    assert "coding" not in text
    assert text.endswith("\nto fix    nothing")
    np.save(tmp_path / "x.npy", np.full((3, 2, 4, 4), 7, np.uint8))
    assert "channel 0, 1 is constant" in look(tmp_path / "x.npy")[1]


def test_classes_without_images(tmp_path):
    save(tmp_path / "0.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "dataset.json").write_text('{"labels": [["0.png", 2]]}')
    assert "classes without images: 2" in look(tmp_path)[1]


def test_files_that_are_passed_over_are_counted(tmp_path):
    save(tmp_path / "0.png", RNG.integers(0, 256, (4, 4), dtype=np.uint8))
    for name in ("a.heic", "b.avif", "notes.txt", "LICENCE"):
        (tmp_path / name).write_bytes(b"x")
    _, text = look(tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("others    "))
    assert all(f"{kind}: 1" in line for kind in (".heic", ".avif", ".txt", "no suffix"))
    assert "2 pictures in formats that are not read (.avif 1, .heic 1): convert them to PNG" in text


def test_a_large_picture_takes_a_few_copies_of_memory(tmp_path):
    image = np.full((4000, 4000), 7, np.uint8)
    save(tmp_path / "0.png", image)
    catalog = open_catalog(tmp_path)
    tracemalloc.start()
    found = survey(catalog, workers=1, quiet=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.mean == pytest.approx((7 / 127.5 - 1,))
    assert peak < 4 * image.nbytes
