"""`edm2 sample`, stopped at every operation on files."""

from pathlib import Path

import pytest
import torch
from crashes import check_every_interruption
from small import small_generator

from edm2.generate import write_samples


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["out", "out.zip", "out.npz"])
def test_sample_goes_on_after_any_interruption(tmp_path: Path, name: str) -> None:
    generator = small_generator()

    def work(root: Path) -> None:
        torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
        write_samples(generator, root / name, [0, 1], batch_size=1, num_steps=1, quiet=True)

    assert check_every_interruption(tmp_path, work) > 10
