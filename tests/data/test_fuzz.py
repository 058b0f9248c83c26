import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_damaged_files_raise_only_what_is_documented():
    # A minute or more: EDM2_FUZZ_SECONDS=60 pytest tests/data/test_fuzz.py
    seconds = os.environ.get("EDM2_FUZZ_SECONDS", "5")
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--seconds", seconds]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=float(seconds) + 120)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    assert int(ended.stdout.split()[0]) > 50
