"""A few hundred of the damaged and hostile files of `benchmarks/robustness.py`, through commands and readers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "robustness.py"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["mutate", "pickles"])
def test_damaged_files_end_in_clear_words_and_nothing_runs(what: str) -> None:
    count = int(os.environ.get("EDM2_HOSTILE_FILES", "400"))
    command = [sys.executable, str(SCRIPT), what, "--count", str(count)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    outcomes = {name: int(n) for n, name in re.findall(r"(\d+)  (.*)", ended.stdout.replace(",", ""))}
    assert sum(outcomes.values()) == count
    assert {name.split(": ")[1] for name in outcomes} == {"read", "refused"}, (
        "some changes do no harm, most do"
    )
