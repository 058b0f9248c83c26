"""`edm2 train`, stopped at operations on files in six ways, and given again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crashes import check_every_interruption
from PIL import Image

from edm2.cli import main
from edm2.train.logs import read_log

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

_SIZES = ("model-channels 8", "channel-mult 1", "num-blocks 1", "attn-resolutions 8", "channels-per-head 8")
_NETWORK = " ".join(f"--network.{size}" for size in _SIZES)
_TRAIN = f"--batch 8 --log-images 32 --workers 0 --device cpu --ema.sigma-rels 0.05 0.1 {_NETWORK}"


def edm2_command(text: str) -> None:
    """Run a command as a function; raise OSError where it ends with another exit code than 0."""
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    try:
        main(text.split())
    except SystemExit as end:
        if end.code:
            raise OSError(f"exit code {end.code}") from None


def without_times(path: Path) -> Any:
    """The content of a file; of a log, its records without times."""
    if path.suffix != ".jsonl":
        return path.read_bytes()
    times = ("seconds", "images_per_second")
    return [
        {k: v for k, v in record.items() if k not in times} for record in read_log(path.parent, path.name)
    ]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(12):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return folder


def test_training_goes_on_after_any_interruption(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A commit while the test runs must not change the files.
    monkeypatch.setattr("edm2.train.outputs.git_state", lambda: None)

    def work(root: Path) -> None:
        intervals = "--images 48 --snapshot-images 24 --checkpoint-images 24"
        edm2_command(f"train --preset digits --data {images} --out {root / 'run'} {intervals} {_TRAIN}")

    assert check_every_interruption(tmp_path, work, most=12, content=without_times) > 50
