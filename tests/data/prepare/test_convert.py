import hashlib
import json
import multiprocessing
import os
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edm2.data import open_dataset
from edm2.data.prepare import convert as convert_module
from edm2.data.prepare.chunks import begin, image_name
from edm2.data.prepare.convert import Conversion, convert, convert_stream
from edm2.data.prepare.resize import crop_centre, stretch
from edm2.data.sources import open_catalog

RNG = np.random.default_rng(0)
SHAPES = [(9, 7), (12, 12), (8, 20), (5, 6), (16, 16), (8, 8), (10, 9)]
PICTURES = [RNG.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "mixed"
    for i, pixels in enumerate(PICTURES):
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(convert_module, "CHUNK_IMAGES", 2)


def run(source, dest, workers=1, skip_damaged=False, **options):
    return convert(
        open_catalog(source),
        dest,
        Conversion(**options),
        workers=workers,
        skip_damaged=skip_damaged,
        quiet=True,
    )


def expected(function, size):
    order = [0, 2, 4, 6, 1, 3, 5]  # class a, then class b
    return np.stack([function(PICTURES[i].transpose(2, 0, 1), size) for i in order])


@pytest.mark.parametrize(("method", "function"), [("center-crop", crop_centre), ("resize", stretch)])
@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_every_image_is_brought_to_the_size(folder, tmp_path, method, function, dest):
    done = run(folder, tmp_path / dest, size=(8, 6), method=method)
    assert (done.path, done.num_images, done.skipped, done.enlarged) == (tmp_path / dest, 7, [], 1)
    data = open_dataset(tmp_path / dest)
    assert np.array_equal(data.images(np.arange(7)), expected(function, (8, 6)))
    assert data.labels(np.arange(7)).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert data.class_names == ("a", "b")
    assert not (tmp_path / f"{dest}.partial").exists()


def test_a_zip_in_the_official_layout_uncompressed(folder, tmp_path):
    run(folder, tmp_path / "out.zip", size=(8, 8))
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        names = archive.namelist()
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        labels = json.loads(archive.read("dataset.json"))["labels"]
    assert names == [f"00000/img0000000{i}.png" for i in range(7)] + ["dataset.json"]
    assert labels[0] == ["00000/img00000000.png", 0]
    assert image_name(1_234_567, ".png") == "01234/img01234567.png"


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_workers_or_interruptions(folder, tmp_path, monkeypatch):
    hashes = set()
    for name, workers in (("one", 1), ("two", 2)):
        run(folder, tmp_path / f"{name}.zip", workers, size=(8, 8))
        hashes.add(hashlib.sha256((tmp_path / f"{name}.zip").read_bytes()).hexdigest())

    calls = []
    real = convert_module.write_chunk

    def dies(path, chunk):
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, chunk)

    monkeypatch.setattr(convert_module, "write_chunk", dies)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "three.zip", size=(8, 8))
    assert not (tmp_path / "three.zip").exists()
    run(folder, tmp_path / "three.zip", size=(8, 8))
    assert calls == ["000000.zip", "000001.zip", "000002.zip", "000002.zip", "000003.zip"]
    hashes.add(hashlib.sha256((tmp_path / "three.zip").read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_part_of_other_work_is_refused(folder, tmp_path):
    with begin(tmp_path / "out.zip", {"size": [8, 8]}):
        pass
    told = r"out.zip.partial holds unfinished work with other settings \(.*source was None, is .*delete it"
    with pytest.raises(ValueError, match=told):
        run(folder, tmp_path / "out.zip", size=(8, 8))
    (tmp_path / "out.zip.partial" / "settings.json").write_text("")
    with pytest.raises(ValueError, match=r"settings.json is damaged .*delete .*out.zip.partial, or choose"):
        run(folder, tmp_path / "out.zip", size=(8, 8))


def cut_off(folder, dest, monkeypatch, after=2, **options):
    real = convert_module.write_chunk

    def dies(path, chunk):
        if path.name == f"{after:06d}.zip":
            raise KeyboardInterrupt
        real(path, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "write_chunk", dies)
        with pytest.raises(KeyboardInterrupt):
            run(folder, dest, size=(8, 8), **options)


@pytest.mark.parametrize("source", ["folder", "zip", "npy", "npz"])
def test_images_that_changed_since_are_not_mixed_in(tmp_path, monkeypatch, source):
    # Of the same names and sizes.
    def make(seed):
        images = np.random.default_rng(seed).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
        path = tmp_path / ("in" if source == "folder" else f"in.{source}")
        if source == "npy":
            np.save(path, images)
        elif source == "npz":
            np.savez(path, images=images)
        else:
            (tmp_path / "in").mkdir(exist_ok=True)
            for number, image in enumerate(images):
                Image.fromarray(image).save(tmp_path / "in" / f"{number}.png", compress_level=0)
            if source == "zip":
                with zipfile.ZipFile(path, "w") as archive:
                    for file in sorted((tmp_path / "in").iterdir()):
                        archive.write(file, file.name)
        return path

    cut_off(make(0), tmp_path / "out.zip", monkeypatch)
    path = make(1)
    with pytest.raises(
        ValueError,
        match=r"holds unfinished work with other settings \(fingerprint of the images was \w+, is \w+",
    ):
        run(path, tmp_path / "out.zip", size=(8, 8))
    run(make(0), tmp_path / "out.zip", size=(8, 8))


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: bytes(len(data))]
)
def test_a_chunk_that_is_not_whole_is_made_again(folder, tmp_path, monkeypatch, damage):
    run(folder, tmp_path / "whole.zip", size=(8, 8))
    cut_off(folder, tmp_path / "cut.zip", monkeypatch)
    chunk = tmp_path / "cut.zip.partial" / "000001.zip"
    chunk.write_bytes(damage(chunk.read_bytes()))
    with pytest.warns(UserWarning, match=r"000001.zip is damaged and will be made again \("):
        run(folder, tmp_path / "cut.zip", size=(8, 8))
    assert (tmp_path / "cut.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()


def test_a_chunk_that_is_damaged_inside_is_named(folder, tmp_path, monkeypatch):
    cut_off(folder, tmp_path / "cut.zip", monkeypatch)
    chunk = tmp_path / "cut.zip.partial" / "000001.zip"
    data = bytearray(chunk.read_bytes())
    data[80] ^= 1
    chunk.write_bytes(data)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"000001.zip is damaged \(Bad CRC-32 .*delete it and run the same"
        ):
            run(folder, tmp_path / "cut.zip", size=(8, 8))
    chunk.unlink()
    assert run(folder, tmp_path / "cut.zip", size=(8, 8)).num_images == 7


def test_chunks_are_on_the_disk_before_they_have_their_name(folder, tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("fsync"), fsync(file))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(Path(b).name), replace(a, b))[1])
    run(folder, tmp_path / "out.zip", size=(8, 8))
    for number in range(4):
        assert events[events.index(f"{number:06d}.zip") - 1] == "fsync"


def test_work_that_skipped_damage_does_not_go_on_unasked(folder, tmp_path, monkeypatch):
    (folder / "a" / "0.png").write_bytes((folder / "a" / "0.png").read_bytes()[:80])
    cut_off(folder, tmp_path / "out.zip", monkeypatch, skip_damaged=True)
    with pytest.raises(ValueError, match=r"image 'a/0.png' in .*mixed cannot be read"):
        run(folder, tmp_path / "out.zip", size=(8, 8))
    assert run(folder, tmp_path / "out.zip", skip_damaged=True, size=(8, 8)).num_images == 6


def test_a_destination_that_exists_is_left_alone(folder, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists already: choose another --out, or delete it"):
        run(folder, tmp_path / "out", size=(8, 8))
    with pytest.raises(ValueError, match=r"out.tar must be a folder or end in .zip"):
        run(folder, tmp_path / "out.tar", size=(8, 8))


@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_the_same_command_again_finds_the_work_done(folder, tmp_path, dest):
    done = run(folder, tmp_path / dest, size=(8, 8))
    before = sorted(tmp_path.rglob("*"))
    assert run(folder, tmp_path / dest, size=(8, 8)) == done
    # As a kill after the last renaming leaves it.
    for left in ([], ["settings.json"], ["settings.json", "000000.zip"]):
        (tmp_path / f"{dest}.partial").mkdir()
        for name in left:
            (tmp_path / f"{dest}.partial" / name).write_bytes(b"x")
        assert run(folder, tmp_path / dest, size=(8, 8)) == done
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match=f"{dest} exists already: choose another --out, or delete it"):
        run(folder, tmp_path / dest, size=(8, 4))


def test_finished_work_that_skipped_damage_is_not_taken_for_whole(folder, tmp_path):
    path = folder / "b" / "3.png"
    path.write_bytes(path.read_bytes()[:70])
    done = run(folder, tmp_path / "out", 1, True, size=(8, 8))
    assert run(folder, tmp_path / "out", 1, True, size=(8, 8)) == done
    with pytest.raises(ValueError, match=r"image 'b/3.png' in .*mixed cannot be read"):
        run(folder, tmp_path / "out", size=(8, 8))


def test_two_processes_never_make_one_output(folder, tmp_path):
    with begin(tmp_path / "out.zip", {}):
        told = r"another process is writing .*out.zip: wait until it is done, or choose another --out"
        with pytest.raises(ValueError, match=told):
            run(folder, tmp_path / "out.zip", size=(8, 8))
    with pytest.raises(ValueError, match="holds unfinished work with other settings"):
        run(folder, tmp_path / "out.zip", size=(8, 8))


def convert_or_say_why(source, dest, queue):
    try:
        queue.put(
            convert(open_catalog(source), dest, Conversion(size=(8, 8)), workers=1, quiet=True).num_images
        )
    except ValueError as error:
        queue.put(str(error))


def test_overlapping_processes_end_with_one_whole_output(folder, tmp_path):
    run(folder, tmp_path / "alone.zip", size=(8, 8))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    for number in range(5):
        dest = tmp_path / f"{number}.zip"
        pair = [context.Process(target=convert_or_say_why, args=(folder, dest, queue)) for _ in range(3)]
        for process in pair:
            process.start()
        found = [queue.get(timeout=60) for _ in pair]
        for process in pair:
            process.join()
        assert 7 in found
        assert all(answer == 7 or answer.startswith("another process is writing") for answer in found)
        assert dest.read_bytes() == (tmp_path / "alone.zip").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {
        "mixed",
        "alone.zip",
        *(f"{n}.zip" for n in range(5)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_damaged_images_are_named_or_skipped(folder, tmp_path, workers):
    path = folder / "b" / "3.png"
    path.write_bytes(path.read_bytes()[:70])
    with pytest.raises(ValueError, match=r"image 'b/3.png' in .*mixed cannot be read"):
        run(folder, tmp_path / "out", workers, size=(8, 8))
    done = run(folder, tmp_path / "out", 1, True, size=(8, 8))
    assert (done.num_images, [skipped.name for skipped in done.skipped]) == (6, ["b/3.png"])
    assert len(open_dataset(tmp_path / "out")) == 6
    (folder / "a" / "0.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"image 'a/0.png' in .*mixed cannot be read"):
        run(folder, tmp_path / "other", size=(8, 8))


def test_nothing_left(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(PICTURES[0]).save(tmp_path / "in" / "a.png")
    content = (tmp_path / "in" / "a.png").read_bytes()
    (tmp_path / "in" / "a.png").write_bytes(content[:70])
    with pytest.raises(ValueError, match=r"no image is left: 1 were damaged, the first 'a.png'"):
        run(tmp_path / "in", tmp_path / "out", 1, True)


def begin_and_pack_nothing(dest):
    with begin(dest, {}) as folder:
        folder.pack(0, ())


def test_a_stream_without_images_makes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"no image is left: 0 were damaged$"):
        begin_and_pack_nothing(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("mode", "channels"), [("auto", 3), ("gray", 1), ("rgb", 3), ("rgba", 4)])
def test_modes(folder, tmp_path, mode, channels):
    Image.fromarray(PICTURES[0]).convert("L").save(folder / "a" / "0.png")
    run(folder, tmp_path / "out", size=(8, 8), mode=mode)
    data = open_dataset(tmp_path / "out")
    assert data.image_shape == (channels, 8, 8)
    if channels == 4:
        assert (data.images(np.arange(7))[:, 3] == 255).all()


def test_gray_stays_gray_and_bands_stay_bands(tmp_path, monkeypatch):
    values = RNG.normal(size=(3, 6, 12, 10)).astype(np.float32)
    (tmp_path / "in").mkdir()
    for i, value in enumerate(values):
        np.save(tmp_path / "in" / f"{i}.npy", value)
    run(tmp_path / "in", tmp_path / "bands.zip", size=(8, 8))
    data = open_dataset(tmp_path / "bands.zip")
    assert np.array_equal(data.images(np.arange(3)), np.stack([crop_centre(v, (8, 8)) for v in values]))
    assert data.num_classes == 0
    monkeypatch.setattr(convert_module, "CHUNK_IMAGES", 500)
    run("digits", tmp_path / "digits.zip")
    copied, digits = open_dataset(tmp_path / "digits.zip"), open_dataset("digits")
    rows = np.arange(len(digits))
    assert np.array_equal(copied.images(rows), digits.images(rows))
    assert np.array_equal(copied.labels(rows), digits.labels(rows))
    assert copied.class_names == digits.class_names


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_colours_of_transparent_parts_do_not_bleed(tmp_path, mode):
    # Left half white and opaque, right half black and transparent.
    pixels = np.zeros((16, 16, len(mode)), np.uint8)
    pixels[:, :7] = 255
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    run(tmp_path / "in", tmp_path / "out", size=(8, 8))
    image = open_dataset(tmp_path / "out").images(np.array([0]))[0]
    assert len(image) == len(mode)
    assert image[-1, 0].tolist()[:3] == [255] * 3
    assert 0 < image[-1, 0, 3] < 255
    assert (image[:-1, :, :4] == 255).all()


@pytest.mark.parametrize("channels", [2, 4])
def test_the_last_band_of_an_array_is_not_taken_for_opacity(tmp_path, channels):
    images = RNG.integers(0, 256, (3, channels, 12, 10), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    run(tmp_path / "x.npy", tmp_path / "out", size=(8, 8), mode="rgba")
    data = open_dataset(tmp_path / "out")
    assert np.array_equal(data.images(np.arange(3)), np.stack([crop_centre(i, (8, 8)) for i in images]))


def test_images_that_cannot_go_together(folder, tmp_path):
    with pytest.raises(ValueError, match="have 7 different sizes: give --size"):
        run(folder, tmp_path / "out")
    np.save(folder / "a" / "x.npy", np.zeros((3, 8, 8), np.float32))
    with pytest.raises(
        ValueError, match=r"images of bytes and of floats \(1 of float32 and 7 of uint8|7 of uint8 and 1"
    ):
        run(folder, tmp_path / "out", size=(8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (0, 8)}, r"size \(0, 8\) must be at least 1 by 1"),
        (
            {"size": (100_000, 100_000)},
            "size 100000x100000 is too large: an image has at most 67,108,864 pixels",
        ),
        ({"filter": "box"}, "filter 'box' must be bicubic or lanczos"),
        ({"method": "crop"}, "method 'crop' must be center-crop, center-crop-wide, resize"),
        ({"mode": "bw"}, "mode 'bw' must be one of auto, gray, rgb, rgba"),
        ({"background": "whit"}, "background 'whit' is not a colour: give a name such as white, or #rrggbb"),
        ({"background": "red", "mode": "rgba"}, "background 'red' has no effect on mode rgba"),
    ],
)
def test_errors_of_conversions(options, message):
    with pytest.raises(ValueError, match=message):
        Conversion(**options)


def test_a_stream_needs_its_mode():
    with pytest.raises(
        ValueError,
        match="the common mode of a stream is not known before it is read: choose mode gray, rgb or rgba",
    ):
        convert_stream("hf://a/b", "out", Conversion())


def test_large_images_are_written_in_smaller_chunks(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "_CHUNK_PIXELS", 64)
    written = []
    real = convert_module.write_chunk
    monkeypatch.setattr(
        convert_module, "write_chunk", lambda p, c: (written.append(len(c.files)), real(p, c))
    )
    run(folder, tmp_path / "out.zip", size=(8, 8))
    assert written == [1] * 7


def test_a_very_long_picture_is_refused_before_it_fills_the_memory(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("L", (60_000, 2)).save(tmp_path / "in" / "a.png")
    told = (
        r"image 'a.png' .*its sides are too unequal: covering 512x512 makes it 512x15360000 before the crop"
    )
    with pytest.raises(ValueError, match=told):
        run(tmp_path / "in", tmp_path / "out", size=(512, 512))


def test_pictures_in_other_formats_are_told(folder, tmp_path):
    (folder / "a" / "x.heic").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"has 1 pictures in formats that are not read \(.heic 1\)"):
        run(folder, tmp_path / "out", size=(8, 8))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_names_the_file(folder, tmp_path, workers):
    # A limit on the size of files stands in for it: any of them is larger.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"could not write .*out.zip.partial/00000\d.zip \(File too large\)"
        ):
            run(folder, tmp_path / "out.zip", workers, size=(64, 64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run(folder, tmp_path / "out.zip", workers, size=(64, 64))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed", "out.zip"]


@pytest.mark.parametrize(
    ("mode", "background", "expected"),
    [
        ("RGBA", "#0000ff", (0, 0, 255)),
        ("RGBA", "black", (0, 0, 0)),
        ("LA", "black", (0,)),
        ("LA", "red", (255, 0, 0)),
    ],
)
def test_transparent_parts_get_the_background(tmp_path, mode, background, expected):
    (tmp_path / "in").mkdir()
    Image.new(mode, (8, 8)).save(tmp_path / "in" / "x.png")
    run(tmp_path / "in", tmp_path / "out", background=background)
    image = open_dataset(tmp_path / "out").images(np.array([0]))[0]
    np.testing.assert_array_equal(image[:, 0, 0], expected)


def test_another_background_is_other_work(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (8, 8)).save(tmp_path / "in" / "x.png")
    run(tmp_path / "in", tmp_path / "out", background="red")
    assert run(tmp_path / "in", tmp_path / "out", background="red").num_images == 1
    with pytest.raises(ValueError, match="exists already"):
        run(tmp_path / "in", tmp_path / "out", background="blue")
