"""The checksum of tensor data: independent of pieces, sensitive to values and order."""

import numpy as np
import pytest

from edm2.ema.storage import tensorfile
from edm2.ema.storage.tensorfile import DataSum


def of(data: np.ndarray, *, tensor: int = 40, piece: int = 1 << 30) -> str:
    found = DataSum()
    for begin in range(0, data.size, piece):
        found.add(data[begin : begin + piece], tensor=tensor, begin=begin)
    return str(found)


@pytest.fixture
def data() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, 40_003, dtype=np.uint8)


def test_it_is_what_a_loop_over_words_gives(data: np.ndarray) -> None:
    words = [int.from_bytes(data[i : i + 8].tobytes(), "little") for i in range(0, data.size, 8)]
    weighted = sum((40 + i) * word for i, word in enumerate(words))
    assert of(data) == f"{sum(words) % 2**64:016x}{weighted % 2**64:016x}"
    assert DataSum().matches("0" * 16)


@pytest.mark.parametrize("piece", [8, 80, 2048, 8192, 10_000])
def test_pieces_change_nothing(data: np.ndarray, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = of(data)
    assert of(data, piece=piece) == whole
    monkeypatch.setattr(tensorfile, "_INDEX", tensorfile._INDEX[:300])
    assert of(data, piece=piece) == whole


def test_flipped_bits_and_swapped_blocks_are_seen(data: np.ndarray) -> None:
    whole, rng = of(data), np.random.default_rng(1)
    for _ in range(500):
        changed = data.copy()
        changed[rng.integers(data.size)] ^= 1 << rng.integers(8)
        assert of(changed)[:16] != whole[:16]
        length = int(rng.choice([2, 8, 64, 512, 4096]))
        first, second = rng.choice(data.size // length, 2, replace=False) * length
        changed = data.copy()
        changed[first : first + length], changed[second : second + length] = (
            data[second : second + length],
            data[first : first + length],
        )
        assert of(changed) != whole or np.array_equal(changed, data)
    assert of(data, tensor=48) != whole, "tensors that changed places"
