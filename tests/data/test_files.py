import io
import json
import multiprocessing
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from edm2.data import open_dataset, storage

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 7, 5, 3), dtype=np.uint8)
NAMES = [f"0000{i % 2}/img{i:08d}.png" for i in range(6)]
LABELS = [[name, 3 - i % 3] for i, name in enumerate(NAMES)]
ORDER = np.argsort(NAMES)


def write_folder(root, *, labels=LABELS, names=NAMES):
    for name, pixels in zip(names, PIXELS, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name)
    if labels != "none":
        (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


def write_zip(folder, path, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images")


@pytest.mark.parametrize("kind", ["folder", "stored", "deflated"])
def test_official_layout(folder, tmp_path, kind):
    methods = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED}
    path = folder if kind == "folder" else write_zip(folder, tmp_path / "images.zip", methods[kind])
    data = open_dataset(path)
    assert (len(data), data.name, data.image_shape, data.num_classes) == (6, "images", (3, 7, 5), 4)
    assert np.array_equal(data.images(np.arange(6)), PIXELS[ORDER].transpose(0, 3, 1, 2))
    assert data.labels(np.arange(6)).tolist() == [LABELS[i][1] for i in ORDER]
    assert data.fingerprint == open_dataset(folder).fingerprint


@pytest.mark.parametrize("kind", ["folder", "stored", "deflated"])
def test_the_fingerprint_follows_content_of_equal_size(folder, tmp_path, kind):
    methods = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED}
    found = set()
    for number in range(2):
        Image.fromarray(PIXELS[number]).save(folder / NAMES[0], compress_level=0)
        path = folder if kind == "folder" else write_zip(folder, tmp_path / f"{number}.zip", methods[kind])
        found.add(open_dataset(path).fingerprint)
    assert len(found) == 2


def test_the_fingerprint_of_large_files_looks_at_blocks(tmp_path):
    values = RNG.integers(0, 256, (1, 400, 400), dtype=np.uint8)
    found = []
    for changed in (None, (0, 0), (399, 399), (133, 200)):
        array = values.copy()
        if changed:
            array[0][changed] ^= 1
        np.save(tmp_path / "a.npy", array)
        found.append(open_dataset(tmp_path).fingerprint)
    assert len(set(found[:3])) == 3
    # What the docstring says it misses: the byte lies between the blocks.
    offset = 128 + 133 * 400 + 200
    starts = [(160_128 - 16_384) * block // 3 for block in range(4)]
    inside = any(start <= offset < start + 16_384 for start in starts)
    assert (found[3] != found[0]) == inside


def test_fingerprints_know_no_file_times(folder):
    first = open_dataset(folder).fingerprint
    for file in folder.rglob("*.png"):
        os.utime(file, (0, 0))
    assert open_dataset(folder).fingerprint == first


def test_fingerprint_follows_names_and_labels(folder, tmp_path):
    prints = {open_dataset(folder).fingerprint, open_dataset(folder, labels=False).fingerprint}
    prints.add(open_dataset(write_folder(tmp_path / "b", labels=None)).fingerprint)
    prints.add(open_dataset(write_folder(tmp_path / "c", labels=[[n, 1] for n in NAMES])).fingerprint)
    renamed = [name.replace("img", "pic") for name in NAMES]
    prints.add(open_dataset(write_folder(tmp_path / "d", labels=None, names=renamed)).fingerprint)
    # The second and the third are the same images without labels.
    assert len(prints) == 4


def test_class_folders(tmp_path):
    names = ["dog/a.png", "cat/b.png", "cat/deep/c.png", "eel/d.png", "dog/e.png", "cat/f.png"]
    data = open_dataset(write_folder(tmp_path, labels="none", names=names))
    assert data.class_names == ("cat", "dog", "eel")
    assert data.num_classes == 3
    assert data.labels(np.arange(6)).tolist() == [0, 0, 0, 1, 1, 2]


def test_without_labels(folder, tmp_path):
    flat = write_folder(tmp_path / "flat", labels="none", names=[f"{i}.png" for i in range(6)])
    for data in (
        open_dataset(folder, labels=False),
        open_dataset(write_folder(tmp_path / "null", labels=None)),
        open_dataset(flat),
    ):
        assert data.num_classes == 0


def test_one_class_folder_warns(tmp_path):
    write_folder(tmp_path, labels="none", names=[f"all/{i}.png" for i in range(6)])
    with pytest.warns(UserWarning, match="are in one folder, 'all', so there is one class"):
        data = open_dataset(tmp_path)
    assert data.num_classes == 1


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("LA", 2), ("RGB", 3), ("P", 3), ("RGBA", 4)]
)
def test_modes_keep_their_channels(tmp_path, mode, channels):
    source = Image.fromarray(PIXELS[0]).convert(mode)
    source.save(tmp_path / "a.png")
    data = open_dataset(tmp_path)
    assert data.image_shape == (channels, 7, 5)
    pixels = np.asarray(source.convert("L" if mode == "1" else "RGB" if mode == "P" else mode))
    assert np.array_equal(data.images(np.array([0]))[0], np.atleast_3d(pixels).transpose(2, 0, 1))


def test_jpeg_with_a_header_longer_than_the_first_read(tmp_path):
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.jpg", comment=b"x" * 20_000)
    data = open_dataset(tmp_path)
    assert data.image_shape == (3, 7, 5)
    assert data.images(np.array([0])).shape == (1, 3, 7, 5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_float_arrays(tmp_path, dtype):
    values = RNG.normal(size=(2, 8, 4, 6)).astype(dtype)
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", values[i])
    data = open_dataset(tmp_path)
    batch = data.images(np.array([1, 0]))
    assert batch.dtype == np.float32
    assert data.image_shape == (8, 4, 6)
    assert np.array_equal(batch, values[::-1].astype(np.float32))


def test_byte_arrays_and_arrays_without_channels(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS[0, ..., 0])
    data = open_dataset(tmp_path)
    assert data.dtype == np.uint8
    assert np.array_equal(data.images(np.array([0]))[0, 0], PIXELS[0, ..., 0])


def test_files_of_the_operating_system_are_not_images(folder):
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "00000" / "._img00000000.png").write_bytes(b"x")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "a.png").write_bytes(b"x")
    assert len(open_dataset(folder)) == 6


def test_threads_read_the_same(folder, tmp_path):
    data = open_dataset(write_zip(folder, tmp_path / "images.zip"))
    expected = data.images(np.arange(6))
    chosen = [RNG.permutation(6) for _ in range(60)]
    with ThreadPoolExecutor(4) as pool:
        for order, batch in zip(chosen, pool.map(data.images, chosen), strict=True):
            assert np.array_equal(batch, expected[order])


def read_in_child(data, expected, queue):
    queue.put(all(np.array_equal(data.images(np.arange(6)), expected) for _ in range(20)))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_the_same(folder, tmp_path, method):
    # Spawned children load torch anew, so one is enough.
    count = 3 if method == "fork" else 1
    data = open_dataset(write_zip(folder, tmp_path / "images.zip"))
    expected = data.images(np.arange(6))
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    children = [context.Process(target=read_in_child, args=(data, expected, queue)) for _ in range(count)]
    for child in children:
        child.start()
    assert np.array_equal(data.images(np.arange(6)), expected)
    assert all(queue.get(timeout=60) for _ in children)
    for child in children:
        child.join()


def test_mixed_sizes_name_the_first_offenders(folder):
    for i, size in ((1, (4, 4)), (4, (9, 2))):
        Image.new("RGB", size).save(folder / NAMES[i])
    with pytest.raises(ValueError, match="mixed sizes") as caught:
        open_dataset(folder)
    message = str(caught.value)
    assert "4 are 7x5 (height x width) with 3 channels" in message
    assert f"{NAMES[1]!r} is 4x4" in message
    assert f"{NAMES[4]!r} is 2x9" in message
    assert "(2 in all): remove them, or bring all to one size with 'edm2 data convert" in message


def test_arrays_and_pictures_of_other_channels_are_mixed_sizes(folder):
    np.save(folder / "00000" / "x.npy", np.zeros((1, 7, 5), np.uint8))
    with pytest.raises(ValueError, match=r"7x5 .* with 1 channel,"):
        open_dataset(folder, labels=False)


def test_a_gray_picture_among_colour_is_read_as_colour(folder):
    gray = Image.fromarray(PIXELS[2]).convert("L")
    gray.save(folder / NAMES[2])
    with pytest.warns(UserWarning, match=r"of several modes \(5 RGB, 1 L\): read as RGB"):
        data = open_dataset(folder)
    image = data.images(np.array([ORDER.tolist().index(2)]))[0]
    assert data.image_shape == (3, 7, 5)
    assert np.array_equal(image, np.stack([np.asarray(gray)] * 3))


def test_transparent_parts_among_colour_are_laid_on_white(folder):
    pixels = np.dstack([PIXELS[0], np.full((7, 5), 255, np.uint8)])
    pixels[0, 0, 3] = 0
    Image.fromarray(pixels).save(folder / NAMES[0])
    with pytest.warns(UserWarning, match=r"5 RGB, 1 RGBA"):
        image = open_dataset(folder).images(np.array([0]))[0]
    expected = PIXELS[0].copy()
    expected[0, 0] = 255
    assert np.array_equal(image, expected.transpose(2, 0, 1))


def test_no_images(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images \(0 files"):
        open_dataset(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        ValueError, match=r"holds no images \(1 files.*give the folder or ZIP that holds them"
    ):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="holds no images"):
        open_dataset(write_zip(tmp_path, tmp_path / "a.zip"))


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_named_at_opening(folder, content):
    (folder / NAMES[3]).write_bytes(content)
    with pytest.raises(ValueError, match=f"image '{NAMES[3]}' in .* cannot be read"):
        open_dataset(folder)


def test_a_truncated_image_is_named_at_reading(folder):
    whole = (folder / NAMES[3]).read_bytes()
    (folder / NAMES[3]).write_bytes(whole[: len(whole) // 2])
    data = open_dataset(folder)
    with pytest.raises(ValueError, match=f"image '{NAMES[3]}' in .* cannot be read"):
        data.images(np.arange(6))


def test_an_image_that_changed_since_is_named(folder):
    data = open_dataset(folder)
    Image.new("RGB", (4, 4)).save(folder / NAMES[3])
    with pytest.raises(ValueError, match=rf"image '{NAMES[3]}' .*it was \(3, 7, 5\) at opening"):
        data.images(np.arange(6))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_in_a_zip_is_found(folder, tmp_path, compression):
    path = write_zip(folder, tmp_path / "images.zip", compression)
    content = bytearray(path.read_bytes())
    at = content.index(NAMES[0].encode()) + len(NAMES[0]) + 60
    content[at] ^= 1
    path.write_bytes(content)
    data = open_dataset(path)
    with pytest.raises(ValueError, match=f"image '{NAMES[0]}' in .*images.zip cannot be read"):
        data.images(np.arange(6))


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    scandir = os.scandir

    def refuses(path):
        if str(path).endswith("00001"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(
        ValueError, match=r"the folder .*00001 cannot be read \(Permission denied\), so its images"
    ):
        open_dataset(folder)


def test_links_are_followed_but_not_in_circles(folder, tmp_path):
    (tmp_path / "linked").symlink_to(folder)
    assert len(open_dataset(tmp_path / "linked")) == 6
    (folder / "00000" / "back").symlink_to(folder)
    with pytest.raises(ValueError, match=r"00000/back/? is a link to a folder that contains it: delete"):
        open_dataset(folder)


def test_broken_links_and_pipes_are_damaged_images(folder):
    (folder / NAMES[1]).unlink()
    (folder / NAMES[1]).symlink_to("nowhere.png")
    (folder / NAMES[2]).unlink()
    os.mkfifo(folder / NAMES[2])
    with pytest.raises(
        ValueError, match=rf"image '{NAMES[2]}' .*broken link, or not a regular file\), and 1 more"
    ):
        open_dataset(folder)
    with pytest.warns(UserWarning, match="skipped 2 of the 6"):
        assert len(open_dataset(folder, skip_damaged=True)) == 4


def test_names_that_are_not_utf8_are_refused(folder):
    Image.fromarray(PIXELS[0]).save(os.fsencode(folder) + b"/\xff.png")
    with pytest.raises(ValueError, match=r"the file name '.udcff.png' in .* is not UTF-8: rename it"):
        open_dataset(folder)


def zip_of(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            file = io.BytesIO()
            Image.fromarray(PIXELS[0]).save(file, "PNG")
            archive.writestr(name, file.getvalue())
    return path


def test_names_in_a_zip_that_begin_with_a_dot_and_slash(tmp_path):
    data = open_dataset(zip_of(tmp_path / "a.zip", ["./", "./a/", "./a/0.png", "b/./1.png"]))
    assert [data.image_name(i) for i in range(2)] == ["a/0.png", "b/1.png"]
    assert data.class_names == ("a", "b")


@pytest.mark.parametrize("name", ["../0.png", "a/../../0.png", "/a/0.png"])
def test_names_that_lead_out_of_a_zip_are_refused(tmp_path, name):
    message = rf"'{name}' in .*a.zip is not the name of a file inside the ZIP: make the ZIP again"
    with pytest.raises(ValueError, match=message):
        open_dataset(zip_of(tmp_path / "a.zip", ["b/1.png", name]))


def test_a_zip_with_a_file_without_name(tmp_path):
    path = zip_of(tmp_path / "a.zip", ["b/1.png", "0000.png"])
    path.write_bytes(path.read_bytes().replace(b"0000.png", b"\x00000.png"))
    with pytest.raises(ValueError, match=r"'' in .*a.zip is not the name of a file inside the ZIP"):
        open_dataset(path)


def test_a_name_that_a_zip_holds_twice(tmp_path):
    with pytest.raises(ValueError, match=r"a.zip holds 'a/0.png' twice: make the ZIP again"):
        open_dataset(zip_of(tmp_path / "a.zip", ["a/0.png", "./a/0.png"]))


def test_suffixes_in_capitals(folder, tmp_path):
    path = write_zip(folder, tmp_path / "x.ZIP")
    assert open_dataset(path).fingerprint == open_dataset(folder).fingerprint
    Image.fromarray(PIXELS[0]).save(folder / "00000" / "X.PNG")
    assert len(open_dataset(folder, labels=False)) == 7


def test_a_truncated_zip_is_no_zip(folder, tmp_path):
    path = write_zip(folder, tmp_path / "images.zip")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"images.zip is neither a folder nor a ZIP"):
        open_dataset(path)


def test_other_compression_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="compressed by another method than deflate: make the ZIP again"):
        open_dataset(write_zip(folder, tmp_path / "images.zip", zipfile.ZIP_LZMA))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2), np.int32), "type int32, but must be bool, float, or integers of 8 or 16"),
        (np.zeros((1, 2, 3, 4), np.float32), r"shape \[1, 2, 3, 4\], but must have \[C, H, W\]"),
    ],
)
def test_arrays_of_other_kinds_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=f"image 'a.npy' .*{message}"):
        open_dataset(tmp_path)


def test_arrays_with_objects_are_never_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[{}]]), allow_pickle=True)
    with pytest.raises(ValueError, match="type object, but must be"):
        open_dataset(tmp_path)


def test_values_that_are_not_finite_are_named(tmp_path):
    np.save(tmp_path / "a.npy", np.full((1, 2, 2), np.inf, np.float32))
    data = open_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"'a.npy' of .*not finite"):
        data.images(np.array([0]))


def test_damaged_images_are_skipped_where_that_is_wanted(folder):
    whole = (folder / NAMES[3]).read_bytes()
    (folder / NAMES[3]).write_bytes(whole[: len(whole) // 2])
    (folder / NAMES[4]).write_bytes(b"x")
    match = rf"image '{NAMES[4]}' .*cannot identify.* or leave it out with --skip-damaged"
    with pytest.raises(ValueError, match=match):
        open_dataset(folder)
    with pytest.warns(
        UserWarning,
        match=rf"skipped 2 of the 6 images of .*, which cannot be read: the first is '{NAMES[4]}'",
    ):
        data = open_dataset(folder, skip_damaged=True, pad_to=8)
    assert [skipped.name for skipped in data.skipped] == [NAMES[4], NAMES[3]]
    kept = [i for i in ORDER if i not in (3, 4)]
    assert np.array_equal(data.images(np.arange(4))[:, :, :7, 1:6], PIXELS[kept].transpose(0, 3, 1, 2))
    assert data.labels(np.arange(4)).tolist() == [LABELS[i][1] for i in kept]
    assert data.image_name(3) == NAMES[5]


def test_verify_finds_damage_at_opening(folder):
    assert open_dataset(folder, verify=True).skipped == ()
    for name in NAMES[2:4]:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"image '{NAMES[2]}' .*, and 1 more: replace it"):
        open_dataset(folder, verify=True)


def test_the_fingerprint_follows_what_was_skipped(folder):
    first = open_dataset(folder)
    (folder / NAMES[3]).write_bytes(b"x" * (folder / NAMES[3]).stat().st_size)
    with pytest.warns(UserWarning, match="skipped 1 of the 6"):
        second = open_dataset(folder, skip_damaged=True)
    assert second.num_classes == first.num_classes
    assert second.fingerprint != first.fingerprint


def test_nothing_left(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"none of the 1 images of .* can be read"):
        open_dataset(tmp_path, skip_damaged=True)
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:80])
    with pytest.raises(ValueError, match=r"none of the 1 images of .* can be read"):
        open_dataset(tmp_path, skip_damaged=True)


def test_class_names_in_the_label_file(folder):
    content = {"labels": LABELS, "class_names": ["a", "b", "c", "d"]}
    (folder / "dataset.json").write_text(json.dumps(content))
    assert open_dataset(folder).class_names == ("a", "b", "c", "d")
    (folder / "dataset.json").write_text(json.dumps({**content, "class_names": ["a"]}))
    with pytest.raises(ValueError, match="label 3 has no name among the 1 'class_names'"):
        open_dataset(folder)
    (folder / "dataset.json").write_text(json.dumps({**content, "class_names": [1]}))
    with pytest.raises(ValueError, match="'class_names' must be a list of names"):
        open_dataset(folder)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:2], r"has no label for 4 images, such as '00000/img00000002.png'"),
        ([*LABELS, ["00009/x.png", 1]], r"has labels for '00009/x.png', which do not exist"),
        ([[NAMES[0], 1.5], *LABELS[1:]], r"label of '00000/img00000000.png' is 1.5, but must be a whole"),
        ([[NAMES[0], "1"], *LABELS[1:]], r"is '1', but must be a whole number"),
        ([[NAMES[0], True], *LABELS[1:]], r"is True, but must be a whole number"),
        ([[NAMES[0], -1], *LABELS[1:]], r"is -1, but must be a whole number"),
        (
            [[NAMES[0], 10**6], *LABELS[1:]],
            r"is 1000000, too large: labels count classes from 0 and stay below",
        ),
        ([[NAMES[0], 10**999], *LABELS[1:]], r"is 10{39}, too large"),
        ([*LABELS, [NAMES[0], 0]], r"'00000/img00000000.png' has two labels, 3 and 0"),
        ([NAMES[0]], r"an entry is 00000/img00000000.png"),
        ({"a": 1}, r"'labels' is a dict"),
    ],
)
def test_label_files_that_do_not_fit(tmp_path, labels, message):
    write_folder(tmp_path, labels=labels)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path, labels=False)) == 6


@pytest.mark.parametrize(
    ("text", "message"), [("{", "it is not JSON"), ("[]", "it has no 'labels'"), ("{}", "it has no 'labels'")]
)
def test_label_files_that_cannot_be_read(folder, text, message):
    (folder / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_dataset(folder)


def test_a_label_file_in_the_wrong_place(tmp_path):
    write_folder(tmp_path / "inner")
    with pytest.raises(
        ValueError, match=r"is 'inner/dataset.json', but must be at the top: open .*inner instead"
    ):
        open_dataset(tmp_path)


def test_loose_images_beside_class_folders(tmp_path):
    write_folder(
        tmp_path, labels="none", names=["a/0.png", "a/1.png", "b/2.png", "3.png", "b/4.png", "b/5.png"]
    )
    with pytest.raises(ValueError, match=r"has class folders, but '3.png' outside them"):
        open_dataset(tmp_path)


def test_folders_that_are_splits_are_not_classes(tmp_path):
    write_folder(tmp_path, labels="none", names=[f"{'train' if i else 'test'}/{i}.png" for i in range(6)])
    with pytest.raises(ValueError, match="are test, train: these look like splits, not classes"):
        open_dataset(tmp_path)


def test_a_label_file_that_unpacks_to_far_more_than_labels_is_refused(folder, tmp_path):
    (folder / "dataset.json").write_text('{"labels": [' + " " * 2_000_000 + "]}")
    told = r"dataset.json has 2,000,014 bytes, more than the labels of 6 images take: write it"
    for source in (folder, write_zip(folder, tmp_path / "a.zip", zipfile.ZIP_DEFLATED)):
        with pytest.raises(ValueError, match=told):
            open_dataset(source)


def test_a_file_that_unpacks_to_gigabytes_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_MAX_UNPACKED", 100)
    data = open_dataset(write_zip(folder, tmp_path / "stored.zip"))
    assert data.images(np.arange(6)).shape == (6, 3, 7, 5)
    with pytest.raises(ValueError, match=r"unpacks to \d+ bytes, more than 100: make the ZIP again"):
        open_dataset(write_zip(folder, tmp_path / "packed.zip", zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JFIF", "pjpeg"])
def test_other_names_of_jpeg_are_read(tmp_path, suffix):
    Image.fromarray(PIXELS[0]).save(tmp_path / f"a.{suffix}", format="JPEG")
    assert open_dataset(tmp_path).image_shape == (3, 7, 5)


def test_pictures_in_other_formats_are_counted(folder, tmp_path):
    for name in ("a.heic", "b.HEIC", "c.ppm", "notes.txt"):
        (folder / name).write_bytes(b"x")
    told = (
        r"images has 3 pictures in formats that are not read \(.heic 2, .ppm 1\): convert them to PNG or JPEG to "
        "include them"
    )
    for source in (folder, write_zip(folder, tmp_path / "a.zip")):
        with pytest.warns(UserWarning, match=told.replace("images", source.name)):
            assert len(open_dataset(source)) == 6


def test_a_folder_inside_a_zip(tmp_path):
    names = [f"photos/{'ab'[i % 2]}/{i}.png" for i in range(6)]
    path = write_zip(write_folder(tmp_path / "x", labels="none", names=names), tmp_path / "x.zip")
    with pytest.warns(UserWarning, match=r"one class: open .*x.zip/photos if its subfolders are the classes"):
        assert open_dataset(path).num_classes == 1
    data = open_dataset(path / "photos")
    assert (data.name, data.class_names, len(data)) == ("photos", ("a", "b"), 6)
    assert np.array_equal(data.images(np.array([0])), PIXELS[:1].transpose(0, 3, 1, 2))
    assert data.fingerprint == open_dataset(tmp_path / "x" / "photos").fingerprint
    with pytest.raises(ValueError, match=r"x.zip/other holds no images \(0 files"):
        open_dataset(path / "other")


def test_a_zip_of_splits_says_what_to_open(tmp_path):
    names = [f"train/{'ab'[i % 2]}/{i}.png" for i in range(6)]
    path = write_zip(write_folder(tmp_path / "x", labels="none", names=names), tmp_path / "x.zip")
    with pytest.raises(
        ValueError, match=r"look like splits, not classes; open one of them, such as .*x.zip/train"
    ):
        open_dataset(path)
    assert open_dataset(path / "train").class_names == ("a", "b")


def test_a_label_file_inside_a_folder_of_a_zip(folder, tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, f"inner/{file.relative_to(folder).as_posix()}")
    with pytest.raises(ValueError, match=r"must be at the top: open .*a.zip/inner instead"):
        open_dataset(path)
    assert open_dataset(path / "inner").num_classes == 4
