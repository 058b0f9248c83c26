"""Damaged checkpoints are named, kept and passed over; a run never silently starts afresh."""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import files_of, tiny_config, tiny_data

from edm2.train import TrainConfig, Trainer, train
from edm2.train.checkpoint import StoredTensors, find_newest, prune, read_checkpoint, save_checkpoint, verify

_NEWEST, _OLDER = "000000000160", "000000000120"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "finished"
    run(out)
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def run(out: Path, config: TrainConfig | None = None) -> None:
    train(config or tiny_config(), out, dataset=tiny_data(), quiet=True)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [truncate, flip_bit, empty, delete])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damaged_file_of_the_newest(
    copy: Path, finished: Path, file: str, harm: Callable[[Path], None]
) -> None:
    harm(copy / "checkpoints" / _NEWEST / file)
    with pytest.warns(UserWarning, match=f"{_NEWEST} is damaged: {file} is .*continues from {_OLDER}"):
        run(copy)
    files = files_of(copy)
    assert (copy / "checkpoints" / f"{_NEWEST}.damaged").is_dir()
    files = {name: digest for name, digest in files.items() if ".damaged" not in name}
    assert files == files_of(finished)


@pytest.mark.parametrize(
    "harm",
    [
        delete,
        empty,
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"files": {}}'),
        lambda path: path.write_text('{"files": 3}'),
        lambda path: path.write_text('{"files": {"state.json": {}}}'),
        lambda path: path.write_bytes(b"\xff\xfe"),
    ],
)
def test_damaged_manifest(copy: Path, harm: Callable[[Path], None]) -> None:
    harm(copy / "checkpoints" / _NEWEST / "manifest.json")
    with pytest.warns(UserWarning, match=r"manifest.json (is missing|cannot be read).*kept as .damaged"):
        run(copy)


def test_file_that_cannot_be_read(copy: Path) -> None:
    path = copy / "checkpoints" / _NEWEST / "state.json"
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match=f"{_NEWEST} is damaged"):
        run(copy)


def test_foreign_checkpoint(copy: Path, finished: Path, tmp_path: Path) -> None:
    run(tmp_path / "foreign", tiny_config(seed=7, num_images=168))
    shutil.copytree(tmp_path / "foreign/checkpoints/000000000168", copy / "checkpoints/000000000168")
    with pytest.warns(UserWarning, match=r"000000000168 is of another run, \w{16}; it is kept as .damaged"):
        run(copy)
    kept = {name: d for name, d in files_of(copy).items() if ".damaged" not in name}
    assert kept == files_of(finished)


def test_two_damaged_ones_keep_their_names(copy: Path) -> None:
    for _ in range(2):
        empty(copy / "checkpoints" / _NEWEST / "ema.safetensors")
        with pytest.warns(UserWarning, match="ema.safetensors is not as it was written"):
            run(copy)
    names = sorted(p.name for p in (copy / "checkpoints").iterdir())
    assert names == [_OLDER, _NEWEST, f"{_NEWEST}.damaged", f"{_NEWEST}.damaged2"]


def test_all_damaged_is_an_error_and_changes_nothing(copy: Path) -> None:
    for name in (_NEWEST, _OLDER):
        truncate(copy / "checkpoints" / name / "model.safetensors")
    before = files_of(copy)
    with pytest.raises(ValueError, match=f"no checkpoint can be used: .*{_NEWEST}.*{_OLDER}.*another --out"):
        run(copy)
    assert files_of(copy) == before


def test_only_damaged_ones_left_is_an_error(copy: Path) -> None:
    checkpoints = copy / "checkpoints"
    os.rename(checkpoints / _NEWEST, checkpoints / f"{_NEWEST}.damaged")
    shutil.rmtree(checkpoints / _OLDER)
    with pytest.raises(ValueError, match=f"holds only {_NEWEST}.damaged"):
        run(copy)


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond a size, for which the system answers as for a full disk: with OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_leaves_the_older_checkpoints(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    largest = (finished / "checkpoints" / _NEWEST / "optimizer.safetensors").stat().st_size
    with (
        full_disk(largest - 1),
        pytest.raises(
            OSError, match=r"could not write checkpoint .*File too large.*untouched; put that right"
        ),
    ):
        run(out, tiny_config(checkpoint_images=72))
    assert list((out / "checkpoints").iterdir()) == []
    run(out)
    assert files_of(out) == files_of(finished)


def test_full_disk_while_a_snapshot_is_written(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    size = next((finished / "snapshots").glob("*.safetensors")).stat().st_size
    with full_disk(size - 1), pytest.raises(OSError, match="could not write a snapshot"):
        run(out, tiny_config(checkpoint_images=1000))
    run(out)
    assert files_of(out) == files_of(finished)


def names(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())


def save(folder: Path, num_images: int, keep: int = 2, **options: str) -> None:
    tensors = {"model": {"w": torch.full((3,), float(num_images))}}
    save_checkpoint(folder, num_images, tensors, {"run_id": "r"}, keep=keep, **options)  # type: ignore[arg-type]


def test_newest_and_milestones_are_kept(tmp_path: Path) -> None:
    for n in range(1, 8):
        save(tmp_path, n, role="milestone" if n % 3 == 0 else "regular")
    assert names(tmp_path) == [3, 6, 7]
    save(tmp_path, 8, keep=1)
    assert names(tmp_path) == [3, 6, 8]


def test_passing_ones_count_for_nothing(tmp_path: Path) -> None:
    for n in (1, 2):
        save(tmp_path, n)
    save(tmp_path, 3, role="passing")
    assert names(tmp_path) == [1, 2, 3]
    save(tmp_path, 4, role="passing")
    assert names(tmp_path) == [1, 2, 4]
    save(tmp_path, 5)
    assert names(tmp_path) == [2, 5]


def test_what_a_killed_write_left_is_cleared(tmp_path: Path) -> None:
    for stray in (".000000000009.tmp", ".000000000001.old.tmp"):
        (tmp_path / stray).mkdir()
        (tmp_path / stray / "model.safetensors").write_bytes(b"half")
    save(tmp_path, 2)
    prune(tmp_path, keep=1)
    assert names(tmp_path) == [2]


def test_writing_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 1, role="milestone")
    manifest = json.loads((tmp_path / "000000000001/manifest.json").read_text())
    assert manifest["role"] == "milestone"
    assert verify(tmp_path / "000000000001", run_id="r") is None
    found = find_newest(tmp_path, run_id="r")
    assert found is not None
    assert torch.equal(read_checkpoint(found)[0].read("model", "w"), torch.ones(3))


def test_no_checkpoints_at_all(tmp_path: Path) -> None:
    assert find_newest(tmp_path / "missing", run_id="r") is None
    prune(tmp_path / "missing", keep=1)


def test_a_checkpoint_tells_where_it_comes_from(finished: Path) -> None:
    state = json.loads((finished / "checkpoints" / _NEWEST / "state.json").read_text())
    assert state["settings"]["network"]["model_channels"] == 8
    assert state["versions"]["torch"] == torch.__version__


def test_trainer_claims_its_folder_before_work(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"is not empty and holds no run \(notes.txt\): choose another --out"
    ):
        Trainer(tiny_config(), tiny_data(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_rows_are_read_across_parts(tmp_path: Path) -> None:
    whole = torch.arange(14.0).view(7, 2)
    for k, rows in enumerate((slice(0, 3), slice(3, 6), slice(6, 7)), start=1):
        tensors = {"w": whole[rows], **({"gain": torch.tensor(2.0)} if k == 1 else {})}
        save_file(tensors, tmp_path / f"model-0000{k}-of-00003.safetensors")
    stored = StoredTensors(tmp_path)
    assert sorted(stored.names("model")) == ["gain", "w"]
    assert torch.equal(stored.read("model", "w"), whole)
    assert float(stored.read("model", "gain")) == 2.0
    for begin in range(8):
        for end in range(begin, 8):
            assert torch.equal(stored.read("model", "w", (begin, end)), whole[begin:end])
