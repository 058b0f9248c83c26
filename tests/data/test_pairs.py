"""Images with conditions and vectors: from one file, padded, chosen, damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edm2.data import (
    ArrayDataset,
    Batches,
    PaddedDataset,
    PairedDataset,
    Subset,
    indices,
    open_dataset,
    read_given,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(6, 2, 4, 4)).astype(np.float32)
CONDITIONS = RNG.integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)
VECTORS = RNG.normal(size=(6, 2))
LABELS = np.array([0, 1, 2, 0, 1, 2])
CHOSEN = np.array([4, 1])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.npz"
    np.savez(path, images=IMAGES, conditions=CONDITIONS, vectors=VECTORS, labels=LABELS)
    return path


def test_an_npz_holds_all_that_belongs_to_an_image(file: Path) -> None:
    data = open_dataset(file, verify=True)
    assert data.conditions is not None
    assert np.array_equal(data.conditions.images(CHOSEN), CONDITIONS[CHOSEN])
    assert np.array_equal(data.vectors(CHOSEN), VECTORS[CHOSEN].astype(np.float32))
    assert np.array_equal(data.labels(CHOSEN), LABELS[CHOSEN])
    assert (data.image_shape, data.conditions.image_shape, data.vector_dim) == ((2, 4, 4), (3, 4, 4), 2)
    given = read_given(file)
    assert np.array_equal(given.conditions, CONDITIONS)
    assert given.labels is not None
    assert np.array_equal(given.labels, LABELS)


def test_every_part_changes_the_fingerprint(file: Path) -> None:
    seen = {open_dataset(file).fingerprint, ArrayDataset(IMAGES, LABELS).fingerprint}
    for conditions, vectors in ((255 - CONDITIONS, VECTORS), (CONDITIONS, -VECTORS), (CONDITIONS, None)):
        seen.add(PairedDataset(ArrayDataset(IMAGES, LABELS), ArrayDataset(conditions), vectors).fingerprint)
    assert len(seen) == 5


def test_padding_choosing_and_reading_ahead_keep_pairs_together(file: Path) -> None:
    data = open_dataset(file, pad_to=6)
    chosen = Subset(data, np.array([5, 2, 3]))
    assert chosen.conditions is not None
    assert np.array_equal(chosen.conditions.images(np.array([1]))[0, :, 1:5, 1:5], CONDITIONS[2])
    assert np.array_equal(chosen.vectors(np.array([0]))[0], VECTORS[5].astype(np.float32))
    with Batches(data, 4, seed=3, stop=8, workers=1) as batches:
        for batch in batches:
            rows = indices(batch.position, 4, size=6, seed=3)
            assert batch.conditions is not None
            assert np.array_equal(batch.conditions.numpy()[:, :, 1:5, 1:5], CONDITIONS[rows])
            assert batch.vectors is not None
            assert np.array_equal(batch.vectors.numpy(), VECTORS[rows].astype(np.float32))


def test_a_bounded_number_of_images_is_the_same_in_every_run(file: Path) -> None:
    few, again = (open_dataset(file, max_images=4) for _ in range(2))
    assert len(few) == 4
    assert few.fingerprint == again.fingerprint
    rows = np.array(
        [np.flatnonzero((image == IMAGES).all((1, 2, 3)))[0] for image in few.images(np.arange(4))]
    )
    assert len(set(rows)) == 4
    assert few.conditions is not None
    assert np.array_equal(few.conditions.images(np.arange(4)), CONDITIONS[rows])
    assert open_dataset(file, max_images=6).fingerprint == open_dataset(file).fingerprint


def test_a_mask_and_nan_mark_missing_values(tmp_path: Path) -> None:
    mask = RNG.random((6, 1, 4, 4)) < 0.7
    np.savez(tmp_path / "masked.npz", images=IMAGES, mask=mask)
    data = open_dataset(tmp_path / "masked.npz")
    assert data.missing
    assert np.array_equal(np.isnan(data.images(np.arange(6))), ~np.repeat(mask, 2, 1))
    np.savez(tmp_path / "nan.npz", images=IMAGES, conditions=np.where(mask, IMAGES, np.nan))
    with pytest.raises(
        ValueError, match=r"conditions of .*nan.* not finite .*say so with --dataset.missing mask"
    ):
        open_dataset(tmp_path / "nan.npz")
    data = open_dataset(tmp_path / "nan.npz", missing=True)
    assert (data.missing, data.conditions is not None and data.conditions.missing) == (False, True)
    np.save(tmp_path / "nan.npy", np.where(mask, IMAGES, np.nan))
    with pytest.raises(ValueError, match=r"image 4 of .*nan\.npy holds values that are not finite"):
        open_dataset(tmp_path / "nan.npy").images(CHOSEN)
    assert open_dataset(tmp_path / "nan.npy", missing=True, verify=True).missing


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"conditions": CONDITIONS[:4]},
            "6 images of 'x' and 4 conditions of 'conditions of x': give one condition",
        ),
        ({"conditions": CONDITIONS.astype(np.int64)}, "the conditions of .*x.npz cannot be used .*int64"),
        ({"vectors": VECTORS[:4]}, r"vectors must have the shape \[6, D\], one per image, not \[4, 2\]"),
        ({"vectors": np.full((6, 2), np.nan)}, "vectors must be finite: entry 0 of image 0 is nan"),
        ({"vectors": np.full((6, 2), "a")}, "vectors must be numbers, not <U1"),
        (
            {"mask": np.ones((6, 1, 2, 2))},
            r"its mask has the shape \[6, 1, 2, 2\], but must have that of the images",
        ),
    ],
)
def test_errors(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=IMAGES, **arrays)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path / "x.npz")


def test_conditions_of_another_size_cannot_be_padded() -> None:
    data = PairedDataset(ArrayDataset(IMAGES), ArrayDataset(CONDITIONS[:, :, :2, :2]))
    with pytest.raises(
        ValueError, match=r"pad_to 8 pads .*, 4x4, but cannot pad .* another size, 2x2, with them"
    ):
        PaddedDataset(data, 8)
    same = PaddedDataset(data, 4)  # as some presets ask for
    assert same.conditions is data.conditions


def write_folders(root: Path, targets: str, inputs: str) -> tuple[Path, Path]:
    for folder, names, size in (("targets", targets, 8), ("inputs", inputs, 4)):
        (root / folder).mkdir()
        for name in names.split():
            value = ord(name[0])
            image = np.full((size, size), value, np.uint8)
            if name.endswith(".npy"):
                np.save(root / folder / name, image)
            else:
                Image.fromarray(image).save(root / folder / name)
    return root / "targets", root / "inputs"


def test_files_are_matched_by_name_whatever_their_suffix(tmp_path: Path) -> None:
    targets, inputs = write_folders(tmp_path, "a.png b.png c.png", "c.png b.npy a.png")
    (inputs / "b.npy").unlink()
    Image.fromarray(np.full((4, 4), ord("b"), np.uint8)).save(inputs / "b.bmp")
    data = open_dataset(targets, condition=inputs)
    assert data.conditions is not None
    rows = np.arange(3)
    assert data.images(rows)[:, 0, 0, 0].tolist() == data.conditions.images(rows)[:, 0, 0, 0].tolist()


def test_files_without_a_partner_are_named(tmp_path: Path) -> None:
    targets, inputs = write_folders(tmp_path, "a.png b.png c.png", "b.png c.png d.png")
    with pytest.raises(
        ValueError,
        match=r"do not match: 'a.png' of 'targets' not in 'inputs'; 'd.png' of 'inputs' not in 'targets'",
    ):
        open_dataset(targets, condition=inputs)


def test_vectors_lie_beside_the_images(tmp_path: Path) -> None:
    targets, _ = write_folders(tmp_path, "a.png b.png c.png", "a.png")
    plain = open_dataset(targets).fingerprint
    (targets / "vectors.csv").write_text("image,hour,lead\nc.png,3,30\na,1,10\nb.png,2,20\n")
    data = open_dataset(targets)
    assert data.vectors(np.arange(3)).tolist() == [[1, 10], [2, 20], [3, 30]]
    assert data.fingerprint != plain
    np.save(tmp_path / "x.npy", IMAGES)
    np.save(tmp_path / "x.vectors.npy", VECTORS)
    assert open_dataset(tmp_path / "x.npy").vectors(CHOSEN).shape == (2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,hour\na.png,1\n", r"vectors.csv has no line for 2 images|has no line for 'b.png', 'c.png'"),
        ("image,hour\na.png,one\n", r"must hold a line such as .* it cannot be read .*'one'"),
        ("image,hour\na.png,1\nb.png,1,2\nc.png,1\n", "lines have different lengths"),
        ("image,hour\na.png,1\na.png,1\nb.png,2\nc.png,3\n", "an image has two"),
        ("image,hour\n" + "x" * 2_000_000, "has 2,000,011 bytes, more than the vectors of 3 images take"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(text: str, message: str, tmp_path: Path) -> None:
    targets, _ = write_folders(tmp_path, "a.png b.png c.png", "a.png")
    (targets / "vectors.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_dataset(targets)


@pytest.mark.parametrize("part", ["images", "conditions"])
@pytest.mark.parametrize("kind", ["npz", "npy", "folder"])
def test_missing_values_are_errors_that_name_part_and_remedy(kind: str, part: str, tmp_path: Path) -> None:
    arrays = {"images": IMAGES.copy(), "conditions": IMAGES.copy()}
    arrays[part][3, 0, 1, 2] = np.nan
    paths = {name: tmp_path / name for name in arrays}
    if kind == "npz":
        np.savez(tmp_path / "x.npz", **arrays)
        data: dict[str, Any] = {"source": tmp_path / "x.npz"}
    elif kind == "npy":
        paths = {name: path.with_suffix(".npy") for name, path in paths.items()}
        for name, values in arrays.items():
            np.save(paths[name], values)
    else:
        for name, values in arrays.items():
            paths[name].mkdir()
            for i, image in enumerate(values):
                np.save(paths[name] / f"{i}.npy", image)
    if kind != "npz":
        data = {"source": paths["images"], "condition": paths["conditions"]}
    with pytest.raises(ValueError, match=r"values that are not finite \(.*--dataset.missing mask") as raised:
        open_dataset(**data, verify=True)
    assert ("condition" in str(raised.value).partition("not finite")[0].replace(str(tmp_path), "")) is (
        part == "conditions"
    )
    assert len(open_dataset(**data, verify=True, missing=True)) == 6
