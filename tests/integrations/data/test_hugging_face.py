"""The real library `datasets`, offline: what it wrote is read."""

import io
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

datasets = pytest.importorskip("datasets")

from edm2.cli import main  # noqa: E402
from edm2.data import open_dataset, stream_hugging_face  # noqa: E402
from edm2.data.prepare import convert  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the library
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (8, 7, 5, 3), dtype=np.uint8)
EXPECTED = PIXELS.transpose(0, 3, 1, 2)
ALL = np.arange(8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def table(pixels=PIXELS, labels=(0, 1, 2, 0, 1, 2, 0, 1)):
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["a", "b", "c"]),
        }
    )
    content = {
        "id": [str(i) for i in range(len(pixels))],
        "image": [Image.fromarray(image) for image in pixels],
        "label": list(labels),
    }
    return datasets.Dataset.from_dict(content, features=features)


def check(data):
    assert np.array_equal(data.images(ALL), EXPECTED)
    assert (data.num_classes, data.class_names) == (3, ("a", "b", "c"))
    assert data.labels(ALL).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_a_folder_written_by_save_to_disk(tmp_path):
    table().save_to_disk(tmp_path / "saved")
    check(open_dataset(tmp_path / "saved"))
    assert open_dataset(tmp_path / "saved", labels=False).num_classes == 0
    with pytest.raises(ValueError, match=r"has no split 'test': its splits are train"):
        open_dataset(tmp_path / "saved", split="test")


def test_splits_of_a_saved_folder(tmp_path):
    parts = datasets.DatasetDict({"train": table(), "test": table(PIXELS[:2], [0, 1])})
    parts.save_to_disk(tmp_path / "saved")
    check(open_dataset(tmp_path / "saved"))
    assert len(open_dataset(tmp_path / "saved", split="test")) == 2
    with pytest.raises(ValueError, match="has no split 'valid': its splits are test, train"):
        open_dataset(tmp_path / "saved", split="valid")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_files(tmp_path, kind):
    if kind == "parquet":
        path = tmp_path / "x.parquet"
        table().to_parquet(path)
    else:
        table().save_to_disk(tmp_path / "saved")
        path = next((tmp_path / "saved").glob("*.arrow"))
    check(open_dataset(path))


def test_a_folder_of_parquet_files_as_in_a_snapshot_of_the_hub(tmp_path):
    (tmp_path / "data").mkdir()
    for part in range(2):
        table(PIXELS[4 * part : 4 * part + 4], [0, 1, 2, 0] if part == 0 else [1, 2, 0, 1]).to_parquet(
            tmp_path / "data" / f"train-0000{part}-of-00002.parquet"
        )
    table(PIXELS[:3], [0, 0, 0]).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    check(open_dataset(tmp_path))
    assert len(open_dataset(tmp_path, split="test")) == 3
    with pytest.raises(ValueError, match="has no split 'valid': its splits are test, train"):
        open_dataset(tmp_path, split="valid")


def test_plain_bytes_and_whole_numbers_without_the_librarys_types(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    files = []
    for image in PIXELS:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append(file.getvalue())
    parquet.write_table(pyarrow.table({"img": files, "label": list(range(8))}), tmp_path / "x.parquet")
    data = open_dataset(tmp_path / "x.parquet")
    assert np.array_equal(data.images(ALL), EXPECTED)
    assert data.labels(ALL).tolist() == list(range(8))


def test_bands_of_floats(tmp_path):
    values = RNG.normal(size=(8, 5, 4, 6)).astype(np.float32)
    features = datasets.Features({"bands": datasets.Array3D((5, 4, 6), "float32")})
    datasets.Dataset.from_dict({"bands": list(values)}, features=features).save_to_disk(tmp_path / "saved")
    data = open_dataset(tmp_path / "saved")
    assert data.image_shape == (5, 4, 6)
    assert np.array_equal(data.images(ALL), values)


def test_pictures_in_a_table_are_read_as_those_in_files(tmp_path):
    files = []
    for i, image in enumerate(PIXELS):
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 3 if i == 0 else 1
        Image.fromarray(image).convert("L" if i == 1 else "RGB").save(file, "PNG", exif=exif)
        files.append({"bytes": b"x" if i == 2 else file.getvalue(), "path": None})
    datasets.Dataset.from_dict({"image": files}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"image 'row 000000002' in .* cannot be read"):
        open_dataset(tmp_path / "saved")
    with pytest.warns(UserWarning, match="skipped 1 of the 8"):
        data = open_dataset(tmp_path / "saved", skip_damaged=True)
    assert np.array_equal(data.images(np.array([0]))[0], EXPECTED[0][:, ::-1, ::-1])
    assert data.images(np.array([1]))[0].std(axis=0).max() == 0


def test_a_table_travels_to_worker_processes_as_its_path(tmp_path):
    table().save_to_disk(tmp_path / "saved")
    sent = pickle.dumps(open_dataset(tmp_path / "saved"))  # what multiprocessing does
    check(pickle.loads(sent))


def test_a_stream_gives_the_same_images_and_starts_anywhere(tmp_path):
    table().to_parquet(tmp_path / "x.parquet")
    data = open_dataset(tmp_path / "x.parquet")
    stream = stream_hugging_face(tmp_path / "x.parquet")
    entries = list(stream.entries)
    assert stream.class_names == ("a", "b", "c")
    assert [entry.label for entry in entries] == data.labels(ALL).tolist()
    for entry, image in zip(entries, PIXELS, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(entry.data))), image)
    assert list(stream_hugging_face(tmp_path / "x.parquet", start=5).entries) == entries[5:]


def test_a_saved_folder_is_no_stream(tmp_path):
    table().save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="cannot be streamed: leave streaming out"):
        stream_hugging_face(tmp_path / "saved")


def test_no_images(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"has no column of images \(its columns: text\)"):
        open_dataset(tmp_path / "saved")


def test_secret_labels(tmp_path):
    table(labels=[-1] * 8).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="has label -1 in column 'label': open it without labels"):
        open_dataset(tmp_path / "saved")


def test_what_the_library_cannot_open(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"could not open .*x.parquet .*check the name, the split"):
        open_dataset(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"could not open hf://edm2/no-such-set"):
        open_dataset("hf://edm2/no-such-set")


def test_a_stream_is_converted_and_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "CHUNK_IMAGES", 3)
    table().to_parquet(tmp_path / "x.parquet")
    conversion = convert.Conversion(mode="rgb")
    whole = convert.convert_stream(
        tmp_path / "x.parquet", tmp_path / "a.zip", conversion, workers=1, quiet=True
    )
    check(open_dataset(whole.path))

    calls = []
    write = convert.write_chunk

    def dies(path, chunk):
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(path, chunk)

    monkeypatch.setattr(convert, "write_chunk", dies)
    for raises in (True, False):
        context = pytest.raises(KeyboardInterrupt) if raises else nullcontext()
        with context:
            convert.convert_stream(
                tmp_path / "x.parquet", tmp_path / "b.zip", conversion, workers=1, quiet=True
            )
    assert calls == ["000000.zip", "000001.zip", "000001.zip", "000002.zip"]
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_the_command_streams(tmp_path, capsys):
    table().to_parquet(tmp_path / "x.parquet")
    out = tmp_path / "a.zip"
    words = ["--out", str(out), "--stream", "--mode", "gray", "--size", "4", "--workers", "1"]
    main(["data", "convert", str(tmp_path / "x.parquet"), *words])
    assert capsys.readouterr().out == f"{out}: 8 images\n"
    assert open_dataset(out).image_shape == (1, 4, 4)


def test_a_stream_that_changed_since_is_not_mixed_in(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "CHUNK_IMAGES", 3)
    conversion, path = convert.Conversion(mode="rgb"), tmp_path / "x.parquet"
    write = convert.write_chunk

    def dies(path, chunk):
        if path.name == "000002.zip":
            raise KeyboardInterrupt
        write(path, chunk)

    table().to_parquet(path)
    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_chunk", dies)
        with pytest.raises(KeyboardInterrupt):
            convert.convert_stream(path, tmp_path / "a.zip", conversion, workers=1, quiet=True)
    path.unlink()
    table(PIXELS[::-1]).to_parquet(path)
    with pytest.raises(
        ValueError,
        match=r"holds unfinished work on other images \(image 3 and later ones come out differently",
    ):
        convert.convert_stream(path, tmp_path / "a.zip", conversion, workers=1, quiet=True)
    path.unlink()
    table().to_parquet(path)
    check(
        open_dataset(convert.convert_stream(path, tmp_path / "a.zip", conversion, workers=1, quiet=True).path)
    )


def test_the_fingerprint_follows_content_and_suffixes_may_be_capitals(tmp_path):
    found = set()
    for name, pixels in (("a.parquet", PIXELS), ("B.PARQUET", PIXELS), ("c.parquet", PIXELS // 2 * 2)):
        table(pixels).to_parquet(tmp_path / name)
        found.add(open_dataset(tmp_path / name).fingerprint)
    assert len(found) == 2


def test_a_row_without_an_image_is_damaged_and_labels_are_bounded(tmp_path):
    rows = [{"bytes": None, "path": None}, {"bytes": b"x", "path": None}]
    datasets.Dataset.from_dict({"image": rows}).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        ValueError, match=r"image 'row 000000000' .* cannot be read .*the row holds no image\), and 1 more"
    ):
        open_dataset(tmp_path / "saved")
    content = {"image": [np.zeros((4, 4), np.float32)] * 2, "label": [0, 10**12]}
    features = datasets.Features(
        {"image": datasets.Array2D((4, 4), "float32"), "label": datasets.Value("int64")}
    )
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "large")
    with pytest.raises(ValueError, match="label 1000000000000 is too large: labels count classes from 0"):
        open_dataset(tmp_path / "large")


def labelled(tmp_path, kind, labels):
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    pictures = [Image.fromarray(image) for image in PIXELS[: len(labels)]]
    path = tmp_path / "x.parquet"
    datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features).to_parquet(path)
    return path


def test_words_are_classes_in_their_order(tmp_path):
    path = labelled(tmp_path, datasets.Value("string"), ["cat", "ant", "cat"])
    data = open_dataset(path)
    assert data.class_names == ("ant", "cat")
    assert data.labels(np.arange(3)).tolist() == [1, 0, 1]
    with pytest.raises(
        ValueError, match=r"are words \(column 'label'\), and a stream does not list their classes"
    ):
        stream_hugging_face(path)


def test_booleans_are_classes(tmp_path):
    data = open_dataset(labelled(tmp_path, datasets.Value("bool"), [True, False, True]))
    assert data.labels(np.arange(3)).tolist() == [1, 0, 1]


@pytest.mark.parametrize("kind", [datasets.ClassLabel(num_classes=2), datasets.Value("string")])
def test_a_missing_label_is_named(tmp_path, kind):
    words = isinstance(kind, datasets.Value)
    path = labelled(tmp_path, kind, ["a", None, "b"] if words else [0, None, 1])
    with pytest.raises(
        ValueError, match=r"row 1 of .*x.parquet has no label in column 'label': add it, remove"
    ):
        open_dataset(path)
    assert len(open_dataset(path, labels=False)) == 3
    if not words:
        with pytest.raises(ValueError, match=r"row 1 of .*x.parquet has no label in column 'label'"):
            list(stream_hugging_face(path).entries)


@pytest.mark.filterwarnings("default")
def test_a_column_of_labels_that_is_not_used_is_told(tmp_path):
    path = labelled(tmp_path, datasets.Value("float32"), [0.5, 1.0])
    with pytest.warns(
        UserWarning, match=r"column 'label' of .* is not read as labels, .*cast it to datasets.Class"
    ):
        assert open_dataset(path).num_classes == 0


@pytest.mark.filterwarnings("default")
def test_the_choice_among_several_columns_is_told(tmp_path):
    content = {
        "front": [Image.fromarray(image) for image in PIXELS],
        "back": [Image.fromarray(255 - image) for image in PIXELS],
        "fine_label": list(range(8)),
        "class": [0] * 8,
    }
    features = datasets.Features(
        {
            "front": datasets.Image(),
            "back": datasets.Image(),
            "fine_label": datasets.ClassLabel(num_classes=8),
            "class": datasets.ClassLabel(num_classes=1),
        }
    )
    datasets.Dataset.from_dict(content, features=features).to_parquet(tmp_path / "x.parquet")
    with (
        pytest.warns(UserWarning, match=r"several columns of images \(front, back\): 'front' is read"),
        pytest.warns(
            UserWarning, match=r"several columns of labels \(fine_label, class\): 'fine_label' is read"
        ),
    ):
        data = open_dataset(tmp_path / "x.parquet")
    assert np.array_equal(data.images(ALL), EXPECTED)


@pytest.mark.filterwarnings("default")
def test_tables_that_are_passed_over_are_told(tmp_path):
    table().to_parquet(tmp_path / "train-0.parquet")
    table().to_parquet(tmp_path / "more.parquet")
    with pytest.warns(
        UserWarning, match=r"1 files of .*, such as more.parquet, are not read, because their names"
    ):
        assert len(open_dataset(tmp_path)) == 8
    (tmp_path / "more.parquet").rename(tmp_path / "test-0.arrow")
    with pytest.warns(
        UserWarning, match=r"two kinds: only the 1 that end in .parquet are read, not the other 1"
    ):
        assert len(open_dataset(tmp_path)) == 8
