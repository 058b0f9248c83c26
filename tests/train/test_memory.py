"""Bytes for people."""

import pytest

from edm2.train.memory import size_text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (999.7, "1 kB"), (1.5e9, "1.5 GB"), (3e15, "3e+03 TB")],
)
def test_sizes(num_bytes: float, text: str) -> None:
    assert size_text(num_bytes) == text
