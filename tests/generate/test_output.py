"""What sampling writes: continued where it stopped, never mixed with other samples, whole in an archive."""

import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import latent_coding, small_generator, small_model

from edm2.cli import main
from edm2.data import open_dataset
from edm2.files import claimed
from edm2.generate import ImageGenerator, parse_seeds, read_images, write_samples


def content_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def write(out: Path, seeds: str = "0-5", **options: Any) -> Path:
    settings: dict[str, Any] = {"num_steps": 2, "quiet": True, **options}
    return write_samples(settings.pop("generator", small_generator()), out, parse_seeds(seeds), **settings)


def test_seeds() -> None:
    assert parse_seeds("3") == [3]
    assert parse_seeds("0-2, 7,10 - 11") == [0, 1, 2, 7, 10, 11]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "'' is neither a number nor a range; write 0-63 or 1,5,10-12"),
        ("1,,2", "'' is neither a number nor a range"),
        ("-3", "'-3' is neither a number nor a range"),
        ("a", "'a' is neither a number nor a range"),
        ("1.5", r"'1\.5' is neither"),
        ("9-3", "the range 9-3 ends before it begins"),
        ("1,0-4", "seed 1 is given twice; each seed is one image"),
        ("9223372036854775808", "9223372036854775808 is too large; seeds must be below"),
        ("0-99999999999", "more than 10,000,000 images"),
    ],
)
def test_bad_seeds(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_seeds(text)


def test_a_folder_is_continued(tmp_path: Path) -> None:
    assert write(tmp_path / "a", "0-3") == tmp_path / "a" / "grid.png"
    before = (tmp_path / "a" / "000002.png").stat().st_mtime_ns
    write(tmp_path / "a", "0-5", batch_size=3)
    write(tmp_path / "b", "5,4,3,2,1,0")
    one, other = ([tmp_path / f / f"{seed:06d}.png" for seed in range(6)] for f in "ab")
    assert np.abs(read_images(one).astype(int) - read_images(other)).max() <= 1
    assert (tmp_path / "a" / "000002.png").stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["png", "npy"])
@pytest.mark.parametrize("left", [0, 40, -20])
def test_damaged_files_are_made_again(tmp_path: Path, kind: str, left: int) -> None:
    generator = small_generator() if kind == "png" else small_generator(channels=2, coding=latent_coding())
    write(tmp_path, "0-3", generator=generator)
    before = content_of(tmp_path)
    file = tmp_path / f"000001.{kind}"
    file.write_bytes(file.read_bytes()[:left])
    (tmp_path / f"000003.{kind}").unlink()
    with pytest.warns(
        UserWarning, match=rf"1 files are damaged and will be made again, such as .*000001\.{kind}"
    ):
        write(tmp_path, "0-3", generator=generator, batch_size=1)
    after = content_of(tmp_path)
    assert after.keys() == before.keys()
    images = [small_pixels(tmp_path / f"{seed:06d}.{kind}") for seed in range(4)]
    write(tmp_path / "b", "0-3", generator=generator)
    others = [small_pixels(tmp_path / "b" / f"{seed:06d}.{kind}") for seed in range(4)]
    assert np.abs(np.stack(images) - np.stack(others)).max() <= 1


def test_a_picture_with_a_wrong_byte_is_made_again(tmp_path: Path) -> None:
    write(tmp_path, "0-1")
    file = tmp_path / "000000.png"
    content = bytearray(whole := file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="1 files are damaged"):
        write(tmp_path, "0-1", batch_size=2)
    assert file.read_bytes() == whole


def small_pixels(path: Path) -> np.ndarray:
    return (np.load(path) if path.suffix == ".npy" else read_images([path])[0]).astype(float)


def test_values_that_are_not_finite_are_no_picture(tmp_path: Path) -> None:
    generator = small_generator()
    with torch.no_grad():
        next(generator.denoiser.parameters()).fill_(math.nan)
    with pytest.raises(
        FloatingPointError, match="not finite, first for seed 4: its weights are broken, float32"
    ):
        write(tmp_path / "a", "4-5", generator=generator)
    assert content_of(tmp_path / "a").keys() == {"samples.json"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"generator": small_generator(1)}, r"model\.digest \w+ there, \w+ here"),
        ({"num_steps": 3}, "sampler.num_steps 2 there, 3 here"),
        ({"sampler": "euler"}, "sampler.name dpmpp-3m there, euler here"),
        ({"labels": 2}, "labels seed modulo classes there"),
        ({"labels": np.array([0, 1])}, r"labels\.array None there"),
        ({"guide": small_generator(1), "guidance": 2.0}, r"guide\.digest None there, \w+ here"),
    ],
)
def test_samples_made_otherwise_are_not_touched(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    write(tmp_path / "a", "0-2")
    before = content_of(tmp_path / "a")
    with pytest.raises(ValueError, match=f"holds samples of other settings .*{told}.*: choose another --out"):
        write(tmp_path / "a", "0-5", **changes)
    assert content_of(tmp_path / "a") == before


def test_a_temporary_file_of_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".samples.json.tmp").write_text("{")
    write(tmp_path, "0")
    for left in (".000001.png.tmp", ".grid.png.tmp"):
        (tmp_path / left).write_bytes(b"half")
    write(tmp_path, "0-1")
    assert content_of(tmp_path).keys() == {"000000.png", "000001.png", "grid.png", "samples.json"}


@pytest.mark.parametrize("name", ["a", "a.zip", "a.npz"])
def test_two_processes_never_write_one_output(tmp_path: Path, name: str) -> None:
    folder = tmp_path / (name if name == "a" else f"{name}.parts")
    with (
        claimed(folder, tmp_path / name),
        pytest.raises(
            ValueError, match=f"another process is writing .*{name}: wait until it is done, or choose"
        ),
    ):
        write(tmp_path / name)
    write(tmp_path / name)
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["a.zip", "a.npz"])
@pytest.mark.parametrize("left", [[], ["samples.json"], ["000001.zip", "samples.json"]])
def test_a_kill_after_the_archive_was_whole_leaves_nothing(
    tmp_path: Path, name: str, left: list[str]
) -> None:
    write(tmp_path / name, "0-1")
    before = content_of(tmp_path)
    (tmp_path / f"{name}.parts").mkdir()
    for file in left:
        (tmp_path / f"{name}.parts" / file).write_bytes(b"x")
    write(tmp_path / name, "0-1")
    assert content_of(tmp_path) == before


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(
        ValueError, match="is not empty and does not hold samples of edm2: choose another --out"
    ):
        write(tmp_path)
    assert content_of(tmp_path).keys() == {"mine.txt"}
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "samples.json").write_text(text)
        with pytest.raises(ValueError, match=r"samples\.json is damaged"):
            write(tmp_path)


def test_nothing_is_made_for_bad_input(tmp_path: Path) -> None:
    for options, told in (
        ({"labels": 3}, "class 3 is outside"),
        ({"sampler": "euler", "s_churn": 1.0}, "the sampler euler has no s_churn"),
        ({"sampler": "ddim"}, "unknown sampler 'ddim'"),
        ({"s_churn": -1.0}, r"s_churn -1\.0 must be at least 0 and finite; 0 adds no noise"),
        ({"rho": math.nan}, "rho nan must be positive and finite"),
        ({"sigma_max": math.inf}, r"sigma_max inf: 0 < sigma_min < sigma_max must hold, both finite"),
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"grid": -1}, "grid -1 must be at least 0; 0 makes no grid"),
        ({"labels": np.zeros(0, np.int64)}, "labels is an array without rows"),
        ({"conditions": np.zeros((0, 1, 8, 8))}, "conditions is an array without rows"),
        ({"conditions": np.zeros((2, 1, 8, 8))}, "this model takes none"),
    ):
        with pytest.raises(ValueError, match=told):
            write(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_labels_by_rows_of_an_array(tmp_path: Path) -> None:
    write(tmp_path / "a", "0,2", labels=np.array([2, 0]))
    write(tmp_path / "b", "0,2", labels=2)
    assert (tmp_path / "a" / "000002.png").read_bytes() == (tmp_path / "b" / "000002.png").read_bytes()


def test_zip_is_a_data_set(tmp_path: Path) -> None:
    write(tmp_path / "folder", "0-4,1000")
    out = write(tmp_path / "s.zip", "0-4,1000")
    dataset = open_dataset(str(out))
    assert dataset.num_classes == 3
    everything = np.arange(6)
    assert dataset.labels(everything).tolist() == [0, 1, 2, 0, 1, 1]
    files = [tmp_path / "folder" / f"{seed:06d}.png" for seed in (0, 1, 2, 3, 4, 1000)]
    assert np.array_equal(dataset.images(everything), read_images(files))
    assert not (tmp_path / "s.zip.parts").exists()
    before = out.read_bytes()
    assert write(out, "0-4,1000") == out
    with pytest.raises(ValueError, match=r"s\.zip holds samples of other settings \(seeds \w+ there"):
        write(out, "0-5")
    assert out.read_bytes() == before


def test_npz(tmp_path: Path) -> None:
    write(tmp_path / "folder", "3-5")
    out = write(tmp_path / "s.npz", "3-5")
    with np.load(out, allow_pickle=False) as content:
        assert content["arr_0"].shape == (3, 8, 8, 1)
        images = read_images([tmp_path / "folder" / f"{seed:06d}.png" for seed in (3, 4, 5)])
        assert np.array_equal(content["arr_0"].transpose(0, 3, 1, 2), images)
        assert content["arr_1"].tolist() == [0, 1, 2]
        assert content["seeds"].tolist() == [3, 4, 5]


@pytest.mark.parametrize("name", ["s.ZIP", "s.Npz"])
def test_endings_in_capitals(tmp_path: Path, name: str) -> None:
    out = write(tmp_path / name, "0-2")
    assert out.is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert out.read_bytes() == write(tmp_path / "other" / name.lower(), "0-2").read_bytes()


def test_archive_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "s.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"s\.zip exists and does not hold samples of edm2"):
        write(tmp_path / "s.zip")
    assert (tmp_path / "s.zip").read_bytes() == b"not a zip"
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as content:
        content.writestr("samples.json", "[]")
    with pytest.raises(ValueError, match=r"t\.zip exists and does not hold samples of edm2"):
        write(tmp_path / "t.zip")


class Stopped(Exception):
    """The stop that `interrupted` makes."""


def interrupted(out: Path, seeds: str, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stop before an archive is packed from its parts, which are returned: two seeds each."""

    def stop(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("edm2.generate.output._pack", stop)
        with pytest.raises(Stopped):
            write(out, seeds, batch_size=2)
    return sorted(out.with_name(f"{out.name}.parts").glob("*.zip"))


@pytest.mark.parametrize("name", ["s.zip", "s.npz"])
def test_an_archive_continues_from_its_parts(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, damaged, rest = interrupted(tmp_path / name, "0-4", monkeypatch)
    assert kept.name == "000000.zip"
    whole = damaged.read_bytes()
    end = whole.index(b"PK\3\4", 1)  # of the first image
    for content in (whole[:-40], b"", whole[: end - 1] + bytes([whole[end - 1] ^ 1]) + whole[end:]):
        damaged.write_bytes(content)
        with pytest.warns(
            UserWarning, match=r"1 files are damaged and will be made again, such as .*000002\.zip"
        ):
            interrupted(tmp_path / name, "0-5", monkeypatch)
        assert damaged.read_bytes() == whole
    before = kept.stat().st_mtime_ns, rest.stat().st_mtime_ns
    interrupted(tmp_path / name, "0-5", monkeypatch)
    assert before == (kept.stat().st_mtime_ns, rest.stat().st_mtime_ns)
    made = write(tmp_path / name, "0-5").read_bytes()
    assert made == write(tmp_path / "whole" / name, "0-5", batch_size=2).read_bytes()
    assert not (tmp_path / f"{name}.parts").exists()


def test_other_seeds_stay_in_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = interrupted(tmp_path / "s.npz", "0-5", monkeypatch)
    write(tmp_path / "s.npz", "0-2")
    assert [part.exists() for part in parts] == [False, True, True]
    write(tmp_path / "s.npz", "0-2")
    assert [part.exists() for part in parts] == [False, True, True]


def test_data_that_is_no_picture(tmp_path: Path) -> None:
    generator = small_generator(channels=2, coding=latent_coding())
    assert write(tmp_path / "a", "0-2", generator=generator) == tmp_path / "a"
    latents = generator.coding.decode(generator.latents([0, 1, 2], num_steps=2)).numpy()
    assert np.allclose(np.load(tmp_path / "a" / "000001.npy"), latents[1], atol=1e-4)
    dataset = open_dataset(str(write(tmp_path / "a.zip", "0-2", generator=generator)))
    assert np.allclose(dataset.images(np.arange(3)), latents, atol=1e-4)
    with np.load(write(tmp_path / "a.npz", "0-2", generator=generator), allow_pickle=False) as content:
        assert np.allclose(content["arr_0"], latents, atol=1e-4)


def test_vectors_and_images_as_conditions(tmp_path: Path) -> None:
    model = small_model(tmp_path / "m.safetensors", label_kind="vector", cond_channels=2)
    rng = np.random.default_rng(0)
    vectors, images = (
        rng.normal(size=(2, 3)).astype(np.float32),
        rng.normal(size=(4, 2, 8, 8)).astype(np.float32),
    )
    np.save(tmp_path / "v.npy", vectors)
    np.save(tmp_path / "c.npy", images)
    words = ["sample", str(model), "--num-steps", "2", "--device", "cpu", "--out", str(tmp_path / "s")]
    given = ["--labels", str(tmp_path / "v.npy"), "--conditions", str(tmp_path / "c.npy")]
    main([*words, "--seeds", "5", *given])
    main([*words, "--seeds", "4-6", *given])
    one = ImageGenerator.load(model).images([5], vectors[[1]], conditions=images[[1]], num_steps=2)
    assert np.array_equal(read_images([tmp_path / "s" / "000005.png"]), one)
    before = content_of(tmp_path / "s")
    np.save(tmp_path / "c.npy", images[::-1])
    with pytest.raises(SystemExit):
        main([*words, "--seeds", "4-7", *given])
    assert content_of(tmp_path / "s") == before


def two_processes(words: list[str]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, outputs and error outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "edm2", *words],
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    out, errors = zip(*(process.communicate(timeout=120) for process in processes), strict=True)
    return [process.returncode for process in processes], list(out), list(errors)


@pytest.mark.slow
def test_processes_share_the_seeds(tmp_path: Path) -> None:
    model = small_model(tmp_path / "m.safetensors")
    words = ["sample", str(model), "--num-steps", "2", "--seeds", "0-6", "--batch", "1", "--device", "cpu"]
    codes, printed, _ = two_processes([*words, "--out", str(tmp_path / "two")])
    assert codes == [0, 0]
    assert [bool(text) for text in printed] == [True, False]
    # Made with other settings: the first process finds out and speaks for both.
    codes, printed, errors = two_processes([*words, "--rho", "6", "--out", str(tmp_path / "two")])
    assert codes == [2, 1]
    assert printed == ["", ""]
    assert "choose another" in errors[0]
    assert "error" not in errors[1]
    assert "Traceback" not in errors[0] + errors[1]
    main([*words, "--out", str(tmp_path / "one")])
    one, two = content_of(tmp_path / "one"), content_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert one == two


def test_the_record_says_what_the_samples_are(tmp_path: Path) -> None:
    write(tmp_path, "0", guide=small_generator(1, label_dim=0), guidance=1.5, interval=(10.0, 80.0))
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["labels"] == "seed modulo classes"
    assert record["sampler"] == {
        "name": "dpmpp-3m", "num_steps": 2, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 10.0, "guidance": 1.5,
        "interval": [10.0, 80.0],
    }  # fmt: skip
    assert record["model"]["run_id"] == "r"
    assert record["guide"]["digest"] != record["model"]["digest"]
    assert record["made_with"].keys() == {"edm2", "torch"}
