"""`edm2 import`, stopped at every operation on files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from crashes import check_every_interruption
from torch import Tensor

from edm2.interop import fetch as fetching
from edm2.interop.convert import import_named, import_path, import_preset
from edm2.interop.released import sampling_preset

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def release(official: Any, tiny_state: dict[str, Tensor], tmp_path: Path) -> Path:
    """A folder of two snapshots of one training, and of a published setting's network and guide."""
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    folder = tmp_path / "release"
    folder.mkdir()
    preset = sampling_preset("edm2-img64-s-autog-fid")
    for name in (str(preset.network), str(preset.guide), "run-0000008-0.050.pkl", "run-0000016-0.100.pkl"):
        official.write(folder / name, official.network(tiny_state, official.tiny))
    import_path(folder, tmp_path / "warm", prefix="run")  # what loads late is loaded here, not in every child
    return folder


def test_a_setting_goes_on_after_any_interruption(release: Path, tmp_path: Path) -> None:
    preset = sampling_preset("edm2-img64-s-autog-fid")

    def work(root: Path) -> None:
        import_preset(preset, root / "out", source=str(release))

    assert check_every_interruption(tmp_path, work) > 10


def test_snapshots_go_on_after_any_interruption(release: Path, tmp_path: Path) -> None:
    def work(root: Path) -> None:
        import_path(release, root / "out", prefix="run")

    assert check_every_interruption(tmp_path, work) > 10


def test_a_download_goes_on_after_any_interruption(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "run-0000008-0.050.pkl"
    content = (release / name).read_bytes()

    def receive(url: str, part: Path, version: Any) -> None:
        have = part.stat().st_size if part.exists() else 0
        with open(part, "ab") as file:
            file.write(content[have:])
            file.flush()
            fetching.os.fsync(file.fileno())

    monkeypatch.setattr(fetching, "_identify", lambda url: fetching._Version(len(content), '"v1"'))
    monkeypatch.setattr(fetching, "_receive", receive)

    def work(root: Path) -> None:
        import_named(name, root / "out", source="http://somewhere")

    assert check_every_interruption(tmp_path, work) > 10
