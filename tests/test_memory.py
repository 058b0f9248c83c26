"""Freed memory stays with the process, unless the user configured the allocator."""

import os
import subprocess
import sys

import pytest

# Page faults of writing 16 MB ten times, each time in a new block.
PROGRAM = """
import resource
from edm2.memory import keep_freed_memory
kept = keep_freed_memory()
bytearray(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(b"x") * (1 << 24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_freed_block_is_reused_without_page_faults() -> None:
    found = {}
    for name, extra in {"kept": {}, "own": {"MALLOC_TRIM_THRESHOLD_": "131072"}}.items():
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | extra
        words = [sys.executable, "-c", PROGRAM]
        found[name] = subprocess.run(
            words, env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
    assert found["kept"][0] == "True"
    assert int(found["kept"][1]) < 6000
    assert found["own"][0] == "False"
    assert int(found["own"][1]) > 30000
