"""Sharded tensors (FSDP2) give what unsharded ones give."""

import filecmp
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    names = sorted(path.name for path in (tmp_path / "alone").glob("*.safetensors"))
    same, _, _ = filecmp.cmpfiles(tmp_path / "alone", tmp_path / "sharded", names, shallow=False)
    assert same == names
    assert len(names) == 4
