"""Every mode of training survives a kill bit for bit, and gives the same with two processes as with one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from modes import MODES, NUM_IMAGES
from tiny_run import files_of, log_of

from edm2.train.logs import VALIDATION_FILE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modes")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("modes.py")), str(folder), *MODES],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_killed_twice_and_continued_is_the_whole_run(runs: Path, mode: str) -> None:
    whole, killed = runs / f"{mode}-one", runs / f"{mode}-killed"
    assert log_of(whole)[-1]["num_images"] == NUM_IMAGES
    assert files_of(killed) == files_of(whole)
    for name in ("log.jsonl", VALIDATION_FILE) if (whole / VALIDATION_FILE).exists() else ("log.jsonl",):
        assert log_of(killed, name) == log_of(whole, name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["two", "then-one"])
def test_the_number_of_processes_changes_rounding_alone(runs: Path, mode: str, how: str) -> None:
    whole, other = runs / f"{mode}-one", runs / f"{mode}-{how}"
    for mine, theirs in zip(log_of(whole), log_of(other), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
    tensors = [safetensors.torch.load_file(run / "model.safetensors") for run in (whole, other)]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-3, atol=1e-4)
    assert len(files_of(other)) == len(files_of(whole))
