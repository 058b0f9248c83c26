"""Opens a pickle from elsewhere as data: nothing in it is run, whatever it holds."""

import mmap
from collections.abc import Collection
from pathlib import Path
from typing import Any

from edm2.interop.pickle_reader import Budget, Buildable, Refused, Unpickler
from edm2.interop.pickle_values import NETWORK_NAMES
from edm2.progress import clean

_LARGEST = 16 << 30
_LONGEST_TEXT = 400
_DEEPEST = 100


def read_pickle(path: str | Path) -> Any:
    """Read a pickle's structure; see `edm2.interop.pickle_reader`.

    Tensors and arrays stay in the file, mapped into memory, until they are read.

    Args:
        path: The file.

    Returns:
        Python containers and numbers, and `Record`, `StoredTensor` and `StoredArray` in them.

    Raises:
        ValueError: If the file holds anything that is not on the allow-list, or is not a whole pickle.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the .pkl file itself")
    size = path.stat().st_size
    try:
        if not 0 < size <= _LARGEST:
            raise Refused(f"a size of {size} bytes, outside 1 to {_LARGEST}")
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        unpickler = Unpickler(data, NETWORK_NAMES, Budget(tensor_bytes=size))
        result = unpickler.run()
        if unpickler.file.position != size:
            raise Refused(f"{size - unpickler.file.position} bytes after its end")
        _height(result, 0, {})
    except Refused as met:
        raise refusal(path, met) from None
    return result


def refusal(path: str | Path, met: Refused | str) -> ValueError:
    """The one error for files that are not read."""
    # Names from the file come along, and a terminal would obey what is hidden in them.
    text = clean(str(met)[:_LONGEST_TEXT], keep="")
    return ValueError(
        f"{path} was not read: it holds {text}. Nothing in it was run. It is damaged or not a file of the official "
        "release: download it again from its publisher; to read one of your own, save its tensors as safetensors"
    )


def _height(value: Any, depth: int, known: dict[int, int]) -> int:
    """How deep the containers in a value nest, which for one that contains itself has no end.

    Args:
        value: What `Unpickler.run` gave.
        depth: Number of containers around it.
        known: Heights by identity, so that values that are referred to often are walked once.

    Raises:
        Refused: If the nesting is deeper than anything needs.
    """
    children = _children(value)
    if not children:
        return 0
    if id(value) not in known and depth <= _DEEPEST:
        known[id(value)] = 1 + max(_height(child, depth + 1, known) for child in children)
    if depth + known.get(id(value), 0) > _DEEPEST:
        raise Refused(f"containers nested deeper than {_DEEPEST}")
    return known[id(value)]


def _children(value: Any) -> Collection[Any]:
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, Buildable):
        return vars(value).values()
    return value.values() if isinstance(value, dict) else ()
