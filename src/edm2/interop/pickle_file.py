"""Opens a pickle from elsewhere as data: nothing in it is run, whatever it holds."""

import mmap
from pathlib import Path
from typing import Any

from edm2.interop.pickle_machine import Budget, Machine, Refused, check_depth
from edm2.interop.pickle_values import network_makers

_LARGEST = 16 << 30
_LONGEST_TEXT = 400


def read_pickle(path: str | Path) -> Any:
    """Read a pickle's structure; see `edm2.interop.pickle_machine`.

    Tensors and arrays stay in the file, mapped into memory, until they are read.

    Args:
        path: the file.

    Returns:
        Python containers and numbers, and `Record`, `StoredTensor` and `StoredArray` in them.

    Raises:
        ValueError: if it holds anything that is not on the list of what is read, or is no whole pickle.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file: give the .pkl file itself")
    size = path.stat().st_size
    try:
        if not 0 < size <= _LARGEST:
            raise Refused(f"a size of {size} bytes, outside 1 to {_LARGEST}")
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        budget = Budget(tensor_bytes=size)
        machine = Machine(data, network_makers(budget), budget)
        result = machine.run()
        if machine.position != size:
            raise Refused(f"{size - machine.position} bytes after its end")
        check_depth(result, budget.depth)
    except Refused as met:
        raise refusal(path, met) from None
    return result


def refusal(path: str | Path, met: Refused | str) -> ValueError:
    """The one error for files that are not read."""
    # Names from the file come along, and a terminal would obey what is hidden in them.
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(met)[:_LONGEST_TEXT])
    return ValueError(
        f"{path} was not read: it holds {text}. Nothing in it was run. It is damaged or no file of the official "
        "release: get it again from where it was published; to read one of your own, save its tensors as safetensors"
    )
