"""ZIP files of a later format, in which zipfile raises NotImplementedError, are refused by every reader in words."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edm2.data import open_dataset
from edm2.evaluation.references import is_reference
from edm2.forecast.cases import read_cases
from edm2.forecast.files import read_forecast
from edm2.generate.archive import read_settings
from edm2.interop.reference import read_reference_statistics
from edm2.interop.torch_file import open_torch_file


def unknown_zip(path: Path) -> Path:
    """An archive whose first entry asks for version 7.8 of the format."""
    np.savez(path.with_suffix(".npz"), images=np.zeros((2, 1, 8, 8), np.uint8))
    content = bytearray(path.with_suffix(".npz").read_bytes())
    with zipfile.ZipFile(path.with_suffix(".npz")) as archive:
        start = archive.start_dir
    content[start + 6] = 78
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.zip", lambda path: open_dataset(str(path))),
        ("a.npz", lambda path: open_dataset(str(path))),
        ("a.npz", read_forecast),
        ("a.npz", lambda path: read_cases(path, frames=1, channels=1)),
        ("a.npz", read_reference_statistics),
        ("a.zip", read_settings),
        ("a.pt", open_torch_file),
    ],
)
def test_each_reader_refuses_it(tmp_path: Path, name: str, read: Callable[[Path], Any]) -> None:
    path = unknown_zip(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} "):
        read(path)


def test_it_is_not_taken_for_a_reference(tmp_path: Path) -> None:
    assert not is_reference(unknown_zip(tmp_path / "a.npz"))
