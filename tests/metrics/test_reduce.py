"""Statistics that several processes gathered are those of one."""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("reduce_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_processes_equal_one(tmp_path: Path, size: int) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(size), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * size, "\n".join(outputs)
