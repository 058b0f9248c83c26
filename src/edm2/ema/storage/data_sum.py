"""A checksum of tensor data that costs little beside reading it and sees order as well as values."""

import numpy as np
import numpy.typing as npt

ByteArray = npt.NDArray[np.uint8]
_ROW = 256
_MODULUS = 1 << 64
_INDEX = np.arange(1 << 16, dtype=np.uint64)


class DataSum:
    """Two sums over 64-bit words, modulo 2**64: plain, and weighted by position.

    The plain sum sees every changed bit, the weighted one also words and blocks that changed places. Data may
    be added in any order and in pieces that are multiples of eight bytes; the last bytes of a tensor are filled
    up with zeros.
    """

    def __init__(self) -> None:
        self._plain = self._weighted = 0

    def add(self, data: ByteArray, *, tensor: int, begin: int = 0) -> None:
        """Add a piece of a tensor.

        Args:
            data: Its bytes [n].
            tensor: Place of the tensor in the file, in bytes.
            begin: Place of the piece in the tensor, in bytes; a multiple of eight.
        """
        plain = weighted = 0
        words = data[: data.size // 8 * 8].view("<u8")
        for first in range(0, words.size, _ROW * _INDEX.size):
            part = words[first : first + _ROW * _INDEX.size]
            table, rest = part[: part.size // _ROW * _ROW].reshape(-1, _ROW), part[part.size // _ROW * _ROW :]
            rows, columns = table.sum(axis=1), table.sum(axis=0)
            total, after = int(rows.sum()), int(rest.sum())
            weighted += _ROW * int((rows * _INDEX[: rows.size]).sum()) + first * (total + after)
            weighted += int((columns * _INDEX[:_ROW]).sum()) + table.size * after
            weighted += int((rest * _INDEX[: rest.size]).sum())
            plain += total + after
        if words.size * 8 < data.size:
            last = int.from_bytes(data[words.size * 8 :].tobytes(), "little")
            plain, weighted = plain + last, weighted + words.size * last
        self._plain += plain
        self._weighted += weighted + (tensor + begin // 8) * plain

    def __str__(self) -> str:
        return f"{self._plain % _MODULUS:016x}{self._weighted % _MODULUS:016x}"

    def matches(self, stored: str) -> bool:
        """Whether this is the stored sum; earlier versions stored the plain one alone."""
        return stored in (str(self), str(self)[:16])
