"""Killed at fifty random moments, many of them inside the writing of a checkpoint, a run ends as if never touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import files_of, log_of

from edm2.train.logs import MAGNITUDES_FILE

WORKER = Path(__file__).with_name("kill_worker.py")


@pytest.mark.slow  # about 20 s
def test_fifty_kills(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path), "50"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["kills"] == 50
    assert facts["in_writing"] >= 5, facts
    whole = tmp_path / "undisturbed"
    assert len(files_of(whole)) > 20
    for i in range(facts["runs"]):
        out = tmp_path / f"killed-{i}"
        assert files_of(out) == files_of(whole), facts
        for name in ("log.jsonl", MAGNITUDES_FILE):
            assert log_of(out, name) == log_of(whole, name)
            assert len(log_of(out, name)) == 30
