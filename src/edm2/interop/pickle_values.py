"""What the allow-listed names in a pickle stand for: plain containers, inert records, tensors and arrays."""

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edm2.interop.pickle_reader import Blob, Budget, Buildable, Refused, Unpickler

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_DTYPES = {
    "Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64,
    "Char": torch.int8, "Byte": torch.uint8, "Short": torch.int16, "Int": torch.int32,
    "Long": torch.int64, "Bool": torch.bool,
}  # fmt: skip
_ARRAY_TYPE = re.compile(r"[fiu][248]|[iu]1|b1")
_MAX_DIMS = 8
_NDARRAY = "numpy.ndarray"


class Record(Buildable):
    """An object of some class, as a description of its state; the class itself does not exist here.

    Attributes:
        class_name: Name of its class.
        state: Its attributes by name.
    """

    def __init__(self, class_name: str, state: dict[Any, Any] | None = None) -> None:
        self.class_name, self.state = class_name, state or {}

    def build(self, state: Any) -> None:
        """Take the attributes by name."""
        if type(state) is not dict:
            raise Refused(f"a {self.class_name} whose state is not a dict")
        self.state = state


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where in the file a tensor lies.

    Attributes:
        dtype: Stored type.
        shape: Its shape.
        stride: In elements.
        file_offset: First byte of its first element, from the start of the file.
        data: Bytes from there to the end of its storage.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    file_offset: int
    data: memoryview

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether its elements follow each other in row-major order."""
        return torch.empty_strided(self.shape, self.stride, device="meta").is_contiguous()

    def read(self) -> Tensor:
        """Copy the tensor from the file: contiguous, in its stored type."""
        if not len(self.data):
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.from_numpy(np.frombuffer(self.data, np.uint8).copy()).view(self.dtype)
        return flat.as_strided(self.shape, self.stride).contiguous()


class _ArrayType(Buildable):
    """A numeric type of NumPy's."""

    def __init__(self, code: str) -> None:
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        """Take the byte order; types of other kinds have more in their state."""
        known = type(state) is tuple and len(state) == 8 and state[2:5] == (None, None, None)
        if not known or state[1] not in ("<", ">", "=", "|"):
            raise Refused("an array type with a state of its own")
        self.dtype = self.dtype.newbyteorder(state[1])


class StoredArray(Buildable):
    """A NumPy array in the file.

    Attributes:
        array: A view of the file, read-only.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.array: np.ndarray = np.empty(0)

    def build(self, state: Any) -> None:
        """Take type, shape and bytes."""
        if type(state) is not tuple or len(state) != 5:
            raise Refused("an array with an unknown state")
        _, shape, kind, fortran, data = state
        self.fill(data, kind, shape, "F" if fortran else "C")

    def fill(self, data: Any, kind: Any, shape: Any, order: Any) -> None:
        """Take type, shape and bytes, where they fit each other."""
        sizes = _sizes(shape, "an array's shape")
        if not (isinstance(data, Blob) and isinstance(kind, _ArrayType) and order in ("C", "F")):
            raise Refused("an array of something other than numbers")
        if math.prod(sizes) * kind.dtype.itemsize != len(data.data):
            raise Refused("an array whose shape does not fit its bytes")
        self._budget.spend("tensor_bytes", len(data.data))
        self.array = np.frombuffer(data.data, kind.dtype).reshape(sizes, order=order)


def _container(budget: Budget) -> dict[Any, Any]:
    return {}


def _record_of(class_name: str) -> Any:
    return lambda budget: Record(class_name)


def _persistent_object(budget: Budget, meta: Any) -> Record:
    """An object whose pickle carries the source of its class; the source is dropped unread."""
    if type(meta) is not dict or not isinstance(meta.get("class_name"), str):
        raise Refused("a persistent object without the name of its class")
    if meta.get("type") != "class" or type(meta.get("state")) is not dict:
        raise Refused("a persistent object without a state")
    return Record(meta["class_name"], meta["state"])


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    good = type(value) is tuple and len(value) <= _MAX_DIMS
    if not good or not all(type(size) is int and 0 <= size < 1 << 48 for size in value):
        raise Refused(f"{what} that is not a tuple of up to {_MAX_DIMS} sizes")
    return tuple(value)


def _array(budget: Budget, kind: Any, *_: Any) -> StoredArray:
    if kind != _NDARRAY:
        raise Refused("an array of an unknown class")
    return StoredArray(budget)


def _array_from_buffer(budget: Budget, data: Any, kind: Any, shape: Any, order: Any) -> StoredArray:
    made = StoredArray(budget)
    made.fill(data, kind, shape, order)
    return made


def _number(budget: Budget, kind: Any, data: Any) -> Any:
    return _array_from_buffer(budget, data, kind, (), "C").array.item()


def _array_type(budget: Budget, code: Any, *_: Any) -> _ArrayType:
    if not isinstance(code, str) or not _ARRAY_TYPE.fullmatch(code):
        raise Refused(f"an array of type {str(code)[:20]!r}; only numbers are read")
    return _ArrayType(code)


def _latin1(budget: Budget, text: Any, encoding: Any) -> Blob:
    """Bytes as old pickles spell them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused("text in an unknown encoding")
    budget.spend("text", len(text))  # once more for every time it is encoded
    return Blob(memoryview(text.encode("latin1")), -1)


class _Storage(NamedTuple):
    """Elements of one type: how many there should be, and where in the file they lie."""

    dtype: torch.dtype
    key: str
    numel: int
    blob: Blob = Blob(memoryview(b""), -1)


class _StorageUnpickler(Unpickler):
    """Reads the pickles inside a storage, where one persistent id describes it."""

    def persistent_load(self, pid: Any) -> _Storage:
        """Understand `("storage", type, key, device, number of elements, None)`; the device does not matter."""
        _, dtype, key, _, numel, view = pid
        known = isinstance(dtype, torch.dtype) and isinstance(key, str) and view is None
        if not known or type(numel) is not int or numel < 0:
            raise Refused("a storage with an unknown description")
        return _Storage(dtype, key, numel)


def _storage(budget: Budget, data: Any) -> _Storage:
    """Elements in the older format of `torch.save`: five small pickles, a count, and the bytes.

    `torch.load(weights_only=True)` would copy them, allocate what the count says before it looks at the bytes, and
    accept archives as well.
    """
    if not isinstance(data, Blob) or data.offset < 0:
        raise Refused("a storage that is not bytes")
    reader = _StorageUnpickler(data.data, _STORAGE_NAMES, budget, offset=data.offset)
    if (reader.run(), reader.run()) != (_LEGACY_MAGIC, _LEGACY_VERSION):
        raise Refused("a storage in another format than torch.save's")
    system, described, keys = reader.run(), reader.run(), reader.run()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("a storage of a big-endian machine")
    if not isinstance(described, _Storage) or keys != [described.key]:
        raise Refused("a storage without a description")
    count = int.from_bytes(reader.file.read(8), "little")
    elements = reader.file.rest()
    if count != described.numel or len(elements.data) != count * described.dtype.itemsize:
        raise Refused("a storage whose size is not what it says")
    return described._replace(blob=elements)


def _tensor(budget: Budget, storage: Any, start: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, _Storage):
        raise Refused("a tensor without a storage")
    sizes, steps = _sizes(shape, "a tensor's shape"), _sizes(stride, "a tensor's stride")
    if type(start) is not int or start < 0 or len(sizes) != len(steps):
        raise Refused("a tensor whose shape, stride and start do not fit each other")
    numel = math.prod(sizes)
    last = start - 1
    if numel:
        last = start + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    if numel > storage.numel or last >= storage.numel:
        raise Refused("a tensor that reaches beyond its storage")
    first = start * storage.dtype.itemsize
    data = storage.blob.data[first:]
    # Not its own elements only: reading it copies all that its storage has from there on.
    budget.spend("tensor_bytes", len(data))
    return StoredTensor(
        dtype=storage.dtype, shape=sizes, stride=steps, file_offset=storage.blob.offset + first, data=data
    )


def _parameter(budget: Budget, tensor: Any, requires_grad: Any, hooks: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise Refused("a parameter that is not a tensor")
    return tensor


_STORAGE_NAMES = {("torch", f"{name}Storage"): dtype for name, dtype in _DTYPES.items()}
# What official network pickles name, and what is made of it: functions of the pickled call's arguments, or values.
NETWORK_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _container,
    ("dnnlib.util", "EasyDict"): _container,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): lambda budget, sizes: _sizes(sizes, "a size"),
    ("torch", "device"): lambda budget, *name: "device",
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _array_type,
    ("_codecs", "encode"): _latin1,
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in _DTYPES.values()
        if dtype.is_floating_point
    },
    **{
        ("torch.nn.modules.container", kind): _record_of(kind)
        for kind in ("ModuleDict", "ModuleList", "Sequential")
    },
}
for _core in ("numpy.core", "numpy._core"):
    NETWORK_NAMES[f"{_core}.multiarray", "_reconstruct"] = _array
    NETWORK_NAMES[f"{_core}.multiarray", "scalar"] = _number
    NETWORK_NAMES[f"{_core}.numeric", "_frombuffer"] = _array_from_buffer
