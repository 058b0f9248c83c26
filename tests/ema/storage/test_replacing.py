"""Files and folders that appear whole, beside other writers, after kills and without going through links."""

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from edm2.ema import PowerEMA, reconstruct
from edm2.ema.storage.replacing import make_folder, remove_folder, replacing, replacing_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_name_given_at_the_end_and_a_path_for_libraries(tmp_path: Path) -> None:
    with replacing(tmp_path / "aside", name=lambda: "final") as file:
        Path(file.name).write_bytes(b"by name")
    assert (tmp_path / "final").read_bytes() == b"by name"
    assert names(tmp_path) == ["final"]


def test_a_planted_link_is_removed_and_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / ".out.tmp").symlink_to(victim)
    with replacing(tmp_path / "out") as file:
        file.write(b"new")
    assert victim.read_bytes() == b"precious"
    assert names(tmp_path) == ["out", "victim"]


def test_two_writers_at_once_write_two_files(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with replacing(path) as first:
        first.write(b"first")
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["out"]


def _stop_half_way(folder: Path, kind: str) -> None:
    if kind == "file":
        with replacing(folder / "out") as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        with replacing_folder(folder / "out") as aside:
            (aside / "half").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path, kind: str) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        process = context.Process(target=_stop_half_way, args=(tmp_path, kind))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert names(tmp_path) == [".out.tmp"]
    if kind == "file":
        with replacing(tmp_path / "out") as file:
            file.write(b"whole")
    else:
        with replacing_folder(tmp_path / "out") as aside:
            (aside / "whole").touch()
    assert names(tmp_path) == ["out"]


def test_a_second_leftover_goes_too(tmp_path: Path) -> None:
    for name in (".out.tmp", ".out.2.tmp", ".out.3.tmp"):
        (tmp_path / name).write_bytes(b"left")
    with replacing(tmp_path / "out") as file:
        file.write(b"whole")
    assert names(tmp_path) == ["out"]


def test_many_writers_leave_one_whole_file(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(20):
            with replacing(tmp_path / "out", durable=False) as file:
                file.write(bytes([number]) * 20_000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = (tmp_path / "out").read_bytes()
    assert len(content) == 20_000
    assert len(set(content)) == 1
    assert names(tmp_path) == ["out"]


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with replacing_folder(tmp_path / "out") as aside:
            (aside / content).touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]
    with pytest.raises(KeyError), replacing_folder(tmp_path / "out"):
        raise KeyError
    assert names(tmp_path / "out") == ["new"]
    remove_folder(tmp_path / "out")
    assert names(tmp_path) == []


def test_snapshots_are_written_into_a_folder_that_is_being_filled(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    ema = PowerEMA(model)
    with replacing_folder(tmp_path / "out") as aside:
        for t in (1, 2):
            ema.update(t)
            ema.snapshot(aside)
    assert names(tmp_path) == ["out"]
    assert torch.equal(reconstruct(tmp_path / "out", 0.1).tensors["weight"], model.weight)


def test_errors_name_what_could_not_be_written_and_leave_others_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"could not write .*out \(File exists\)"),
        replacing(tmp_path / "file" / "out"),
    ):
        pass
    with (
        pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*source'"),
        replacing(tmp_path / "out"),
    ):
        (tmp_path / "source").read_bytes()
    with (
        pytest.raises(OSError, match=r"could not write .*out \(No such file or directory\)"),
        replacing_folder(tmp_path / "out") as aside,
    ):
        (aside / "missing" / "file").write_bytes(b"")
    assert names(tmp_path) == ["file"]


def test_files_are_written_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(38, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".out.tmp").write_bytes(b"perhaps of another writer")
    with replacing(tmp_path / "out") as file:
        file.write(b"whole")
    assert names(tmp_path) == [".out.tmp", "out"]


def test_new_folders_are_flushed_into_their_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr("edm2.ema.storage.replacing.sync_folder", lambda folder: flushed.append(Path(folder)))
    make_folder(tmp_path / "a" / "b")
    assert flushed == [tmp_path, tmp_path / "a"]
