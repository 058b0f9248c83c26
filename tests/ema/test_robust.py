"""Kills, a full disk and misuse: nothing is lost, and the message says what to do."""

import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from edm2.ema import PowerEMA, reconstruct
from edm2.ema.storage import snapshots
from edm2.ema.storage.manifest import read_manifest
from edm2.ema.storage.replacing import folder_lock
from edm2.ema.storage.snapshots import damaged


def tracker(size: int = 8) -> tuple[nn.Linear, PowerEMA]:
    torch.manual_seed(0)
    model = nn.Linear(size, size)
    return model, PowerEMA(model, run_id="run")


def write_until_killed(folder: Path, written: int) -> None:
    """Add snapshots, and tell of each one through a pipe."""
    model, ema = tracker()
    t = max((s.t for s in read_manifest(folder).snapshots), default=0) if folder.exists() else 0
    while True:
        t += 1
        with torch.no_grad():
            model.weight.add_(0.01)
        ema.update(t)
        ema.snapshot(folder, keep=6)
        os.write(written, b".")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_leave_a_folder_that_opens_and_verifies(tmp_path: Path, kills: int) -> None:
    folder = tmp_path / "snapshots"
    _, ema = tracker()
    ema.update(1)
    ema.snapshot(folder, keep=6)
    rng = random.Random(0)
    interrupted = 0
    for _ in range(kills):
        reader, writer = os.pipe()
        began = time.monotonic()
        child = os.fork()
        if not child:
            try:
                write_until_killed(folder, writer)
            finally:
                os._exit(1)
        os.close(writer)
        os.read(reader, 1)
        # Anywhere in the next snapshot or two, however fast the machine writes them.
        time.sleep(rng.uniform(0, min(time.monotonic() - began, 0.5)))
        os.kill(child, signal.SIGKILL)
        os.close(reader)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert list(damaged(folder, read_manifest(folder))) == []
        manifest = read_manifest(folder)
        assert 2 <= len(manifest.snapshots) <= 6
        names = {s.file for s in manifest.snapshots} | {"manifest.json"}
        interrupted += {p.name for p in folder.iterdir()} != names
    assert interrupted > 0, "no kill fell into the middle of a write"
    assert read_manifest(folder).snapshots[-1].t > kills, "each child wrote one at least"
    assert reconstruct(folder, sigma_rel=0.1, warn_above=1.0).tensors["weight"].shape == (8, 8)


@contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_no_space_for_a_snapshot_loses_nothing(tmp_path: Path) -> None:
    model, ema = tracker(64)
    ema.update(1)
    ema.snapshot(tmp_path)
    before = contents(tmp_path)
    ema.update(2)
    with (
        files_no_larger_than(10_000),
        pytest.raises(OSError, match="the folder holds what it held before; put that right and") as caught,
    ):
        ema.snapshot(tmp_path)
    assert caught.value.filename == str(tmp_path)
    assert contents(tmp_path) == before
    ema.snapshot(tmp_path)
    assert len(read_manifest(tmp_path).snapshots) == 4
    torch.testing.assert_close(reconstruct(tmp_path, sigma_rel=0.1).tensors["weight"], model.weight.detach())


@pytest.mark.parametrize("moment", ["before", "after"])
def test_no_space_for_the_manifest_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    _, ema = tracker()
    ema.update(1)
    ema.snapshot(tmp_path)
    before = contents(tmp_path)
    ema.update(2)
    original = snapshots.write_manifest

    def full(*args: object) -> None:
        if moment == "after":
            original(*args)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots, "write_manifest", full)
    with pytest.raises(OSError, match=r"\(No space left on device\).* before; make room and"):
        ema.snapshot(tmp_path)
    assert list(damaged(tmp_path, read_manifest(tmp_path))) == []
    assert moment == "after" or contents(tmp_path) == before


def test_time_must_increase() -> None:
    _, ema = tracker()
    ema.update(5)
    for t in (5, 4, float("nan")):
        with pytest.raises(ValueError, match="after time 5: t must increase from update to update"):
            ema.update(t)
    assert ema.t == 5


def test_snapshots_of_a_changed_model_are_refused(tmp_path: Path) -> None:
    _, ema = tracker()
    ema.update(1)
    ema.snapshot(tmp_path)
    _, other = tracker(9)
    other.update(2)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"a model with other tensors \(names or shapes changed\)"):
        other.snapshot(tmp_path)
    assert contents(tmp_path) == before


def test_what_the_tracks_cannot_express_is_refused(tmp_path: Path) -> None:
    model, ema = tracker()
    for t in range(1, 30):
        with torch.no_grad():
            model.weight.add_(0.01)
        ema.update(t)
    ema.snapshot(tmp_path)
    with pytest.raises(
        ValueError, match=r"sigma_rel 0\.005 at t 29 cannot be expressed .* another track near 0\.005"
    ):
        reconstruct(tmp_path, sigma_rel=0.005)
    with pytest.raises(
        ValueError, match=r"t 30 is beyond the last snapshot of .*, at 29: choose a time up to that"
    ):
        reconstruct(tmp_path, sigma_rel=0.1, t=30)
    with pytest.raises(ValueError, match=r"t 20 is before the first snapshot of .*, at 29"):
        reconstruct(tmp_path, sigma_rel=0.1, t=20)


def test_one_snapshot_only(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    ema = PowerEMA(model, (0.1,))
    with pytest.raises(ValueError, match="snapshot before the first update"):
        ema.snapshot(tmp_path)
    ema.update(1)
    ema.snapshot(tmp_path)
    assert reconstruct(tmp_path, sigma_rel=0.1).coefficients
    with pytest.raises(
        ValueError, match=r"a single snapshot, of sigma_rel 0\.1, cannot give sigma_rel 0\.13"
    ):
        reconstruct(tmp_path, sigma_rel=0.13)


def test_one_writer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    refused = []
    original = snapshots.write_manifest

    def other_writer_comes(folder: Path, manifest: snapshots.Manifest) -> None:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refused.append(manifest)
        finally:
            os.close(handle)
        original(folder, manifest)

    monkeypatch.setattr(snapshots, "write_manifest", other_writer_comes)
    _, ema = tracker()
    ema.update(1)
    ema.snapshot(tmp_path)
    assert len(refused) == 2  # the empty manifest of a new folder, and the one with the snapshots
    with folder_lock(tmp_path):
        pass


def test_opening_twice_and_writing_from_two_places_is_safe(tmp_path: Path) -> None:
    (model, one), (_, two) = tracker(), tracker()
    for t in range(1, 5):
        with torch.no_grad():
            model.weight.add_(0.01)
        one.update(t)
        two.update(t)
        one.snapshot(tmp_path)
        assert reconstruct(tmp_path, sigma_rel=0.1).t == t
    read_manifest(tmp_path)
    two.t = 5
    two.snapshot(tmp_path)
    assert list(damaged(tmp_path, read_manifest(tmp_path))) == []
    assert len(read_manifest(tmp_path).snapshots) == 10
