"""Tiny-ImageNet as published: archive and folder, three splits, names of classes; damaged lists."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edm2.cli import main
from edm2.data import open_dataset

CLASSES = ("n02", "n01", "n10")  # as in wnids.txt: not sorted
WORDS = "n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tEuropean fire salamander, Salamandra\nn10\tscorpion\n"
TOP = "tiny-imagenet-200"


def files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)

    def picture() -> bytes:
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
        return file.getvalue()

    made = {"wnids.txt": "\n".join(CLASSES).encode(), "words.txt": WORDS.encode()}
    for name in CLASSES:
        made[f"train/{name}/{name}_boxes.txt"] = f"{name}_0.JPEG\t0\t10\t63\t58\n".encode()
        made |= {f"train/{name}/images/{name}_{i}.JPEG": picture() for i in range(2)}
    made |= {f"{split}/images/{split}_{i}.JPEG": picture() for split in ("val", "test") for i in range(4)}
    lines = [f"val_{i}.JPEG\t{CLASSES[i % 3]}\t0\t32\t44\t62\n" for i in range(4)]
    return {**made, "val/val_annotations.txt": "".join(lines).encode()}


def write(root: Path, how: str, **changes: bytes | None) -> Path:
    changed = {name.replace("__", "/").replace("_txt", ".txt"): data for name, data in changes.items()}
    content = {name: data for name, data in (files() | changed).items() if data is not None}
    if how == "zip":
        with zipfile.ZipFile(root / f"{TOP}.zip", "w") as archive:
            for name, data in content.items():
                archive.writestr(f"{TOP}/{name}", data)
        return root / f"{TOP}.zip"
    for name, data in content.items():
        path = root / TOP / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root / TOP if how == "folder" else root


@pytest.mark.parametrize("how", ["zip", "folder", "folder above"])
def test_the_splits_and_their_classes(how: str, tmp_path: Path) -> None:
    path = write(tmp_path, how)
    train, val = open_dataset(path, verify=True), open_dataset(path, split="val")
    assert (len(train), train.image_shape, train.name) == (6, (3, 64, 64), "tiny-imagenet")
    assert train.class_names == ("goldfish", "European fire salamander", "scorpion")
    assert train.labels(np.arange(6)).tolist() == [0, 0, 1, 1, 2, 2]
    assert val.labels(np.arange(4)).tolist() == [1, 0, 2, 1]
    assert val.class_names == train.class_names
    test = open_dataset(path, split="test", labels=False)
    assert (len(test), test.num_classes) == (4, 0)
    with pytest.raises(ValueError, match="published without labels: take the split val"):
        open_dataset(path, split="test")
    with pytest.raises(ValueError, match="has no split 'valid': its splits are test, train, val"):
        open_dataset(path, split="valid")


def test_archive_and_folder_are_one_data_set(tmp_path: Path) -> None:
    one, other = (write(tmp_path, how) for how in ("zip", "folder"))
    found = [open_dataset(path).images(np.arange(6)) for path in (one, other)]
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    ("changes", "split", "told"),
    [
        ({"wnids_txt": b"n01\nn02"}, "train", r"n10_0.JPEG' of .* belongs to no class of wnids.txt: unpack or down"),
        ({"val__val_annotations_txt": b"val_0.JPEG\tn01\n"}, "val", "val_1.JPEG' of .* belongs to no class"),
        ({"val__val_annotations_txt": None}, "val", r"val_annotations.txt of .* cannot be read"),
        ({"words_txt": b"\xff\xfe"}, "train", r"words.txt of .* cannot be read \('utf-8' codec"),
        ({"words_txt": b"x" * (1 << 25)}, "train", "cannot be read .it has 33,554,432 bytes"),
    ],
)  # fmt: skip
def test_damaged_lists(changes: dict[str, bytes | None], split: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        open_dataset(write(tmp_path, "folder", **changes), split=split)


def test_a_split_without_images(tmp_path: Path) -> None:
    gone = {f"val__images__val_{i}.JPEG": None for i in range(4)}
    with pytest.raises(ValueError, match=r"has no images in tiny-imagenet-200/val/"):
        open_dataset(write(tmp_path, "zip", **gone), split="val")


def test_the_commands_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "zip")
    main(["data", "info", str(path)])
    assert "goldfish: 2" in capsys.readouterr().out
    main(
        ["data", "convert", str(path), "--size", "16", "--out", str(tmp_path / "small.zip"), "--split", "val"]
    )
    assert open_dataset(tmp_path / "small.zip").class_names[0] == "goldfish"
