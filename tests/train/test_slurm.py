"""The batch script of docs/reproducing.md queues again when it must, and only then; `srun` is made up here."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "reproducing.md"

SRUN = """#!/bin/bash
trap 'exit 1' TERM    # as torchrun ends when it gets a signal
touch started
case $PLAY in
    finishes) mkdir -p runs/img512-l; touch runs/img512-l/model.safetensors ;;
    stops) ;;
    fails) exit 3 ;;
    waits) for _ in {1..200}; do sleep 0.05; done ;;
esac
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) echo node1 ;;
    requeue) echo "$2" > requeued ;;
esac
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    block = next(b for b in DOCS.read_text().split("```") if b.startswith("bash\n#!/bin/bash"))
    path = tmp_path / "job.sh"
    path.write_text(block.removeprefix("bash\n"))
    return path


@pytest.mark.skipif(os.name == "nt", reason="bash")
@pytest.mark.parametrize(
    ("play", "code", "requeued"),
    [("finishes", 0, False), ("stops", 0, True), ("fails", 3, False), ("waits", 0, True)],
)
def test_the_job_queues_again_when_it_was_stopped(script: Path, play: str, code: int, requeued: bool) -> None:
    folder = script.parent
    facts = {"PLAY": play, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_NNODES": "4"}
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **facts}
    job = subprocess.Popen(["bash", str(script)], cwd=folder, env=environment)
    if play == "waits":
        while not (folder / "started").exists():
            time.sleep(0.01)
        time.sleep(0.1)  # the script goes on to note the number of its step
        job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == code
    assert (folder / "requeued").exists() is requeued
    if requeued:
        assert (folder / "requeued").read_text() == "7\n"
