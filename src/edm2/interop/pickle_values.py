"""What the allow-listed names in a pickle stand for: plain containers, inert records, tensors and arrays."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edm2.interop.pickle_machine import TOO_MUCH_TEXT, Blob, Budget, Buildable, Global, Machine, Refused

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {
    Global("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64,
        "Char": torch.int8, "Byte": torch.uint8, "Short": torch.int16, "Int": torch.int32,
        "Long": torch.int64, "Bool": torch.bool,
    }.items()
}  # fmt: skip
_ARRAY_TYPE = re.compile(r"[fiu][1248]|b1")
_MAX_DIMS = 8


class Record(Buildable):
    """An object of some class, as the description of its state; the class itself does not exist here.

    Attributes:
        class_name: its class, a name only.
        state: its attributes by name.
    """

    def __init__(self, class_name: str, state: dict[Any, Any] | None = None) -> None:
        self.class_name, self.state = class_name, state or {}

    def build(self, state: Any) -> None:
        """Take the state: attributes by name."""
        if type(state) is not dict:
            raise Refused(f"a {self.class_name} whose state is no dict")
        self.state = state


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where in the file a tensor lies.

    Attributes:
        dtype: stored type.
        shape: its shape.
        stride: in elements.
        file_offset: first byte of its first element, from the start of the file.
        data: bytes from there to the end of its storage.
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
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    def read(self) -> Tensor:
        """The tensor, contiguous, in its stored type."""
        if not len(self.data):
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.from_numpy(np.frombuffer(self.data, np.uint8).copy()).view(self.dtype)
        return flat.as_strided(self.shape, self.stride).contiguous()


@dataclass(frozen=True, kw_only=True)
class _Storage:
    """Elements of one type in the file."""

    dtype: torch.dtype
    numel: int
    blob: Blob


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
        array: a view of the file, read-only.
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
        self._budget.spend("tensor_bytes", len(data.data), _TOO_MUCH)
        self.array = np.frombuffer(data.data, kind.dtype).reshape(sizes, order=order)


_TOO_MUCH = "tensors that claim more bytes than the file has"


def network_makers(budget: Budget) -> dict[Global, Callable[..., Any]]:
    """Names that official network pickles use, and what is made of them.

    Args:
        budget: what the file may still cost.

    Returns:
        Name -> function of the pickled call's arguments.
    """

    def array(kind: Any, *_: Any) -> StoredArray:
        if kind != Global("numpy", "ndarray"):
            raise Refused("an array of an unknown class")
        return StoredArray(budget)

    def array_from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> StoredArray:
        made = StoredArray(budget)
        made.fill(data, kind, shape, order)
        return made

    def number(kind: Any, data: Any) -> int | float | bool:
        made = array_from_buffer(data, kind, (), "C").array.item()
        assert isinstance(made, int | float)
        return made

    makers: dict[Global, Callable[..., Any]] = {
        Global("collections", "OrderedDict"): lambda: {},
        Global("dnnlib.util", "EasyDict"): lambda: {},
        Global("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
        Global("torch.storage", "_load_from_bytes"): lambda data: _storage(data, budget),
        Global("torch._utils", "_rebuild_tensor_v2"): lambda *args: _tensor(budget, *args),
        Global("torch._utils", "_rebuild_parameter"): _parameter,
        Global("torch", "Size"): lambda sizes: _sizes(sizes, "a size"),
        Global("torch", "device"): lambda *name: "device",
        Global("numpy", "ndarray"): lambda *_: _refuse("an array made in place"),
        Global("numpy", "dtype"): _array_type,
        Global("_codecs", "encode"): lambda text, encoding: _latin1(budget, text, encoding),
    }
    for kind in ("ModuleDict", "ModuleList", "Sequential"):
        makers[Global("torch.nn.modules.container", kind)] = _maker_of(kind)
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        makers[Global("torch", dtype)] = lambda *_: _refuse("a call of a type")
    for core in ("numpy.core", "numpy._core"):
        makers[Global(f"{core}.multiarray", "_reconstruct")] = array
        makers[Global(f"{core}.multiarray", "scalar")] = number
        makers[Global(f"{core}.numeric", "_frombuffer")] = array_from_buffer
    return makers


def _maker_of(kind: str) -> Callable[[], Record]:
    return lambda: Record(kind)


def _refuse(what: str) -> Any:
    raise Refused(what)


def _persistent_object(meta: Any) -> Record:
    """An object whose pickle carries the source of its class; the source is dropped unread."""
    if type(meta) is not dict or not isinstance(meta.get("class_name"), str):
        raise Refused("a persistent object without the name of its class")
    if meta.get("type") != "class" or type(meta.get("state")) is not dict:
        raise Refused("a persistent object without a state")
    return Record(meta["class_name"], meta["state"])


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise Refused("a parameter that is no tensor")
    return tensor


def _tensor(budget: Budget, storage: Any, start: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, _Storage):
        raise Refused("a tensor without a storage")
    sizes, steps = _sizes(shape, "a tensor's shape"), _sizes(stride, "a tensor's stride")
    if type(start) is not int or start < 0 or len(sizes) != len(steps):
        raise Refused("a tensor whose shape, stride and start do not fit each other")
    numel = math.prod(sizes)
    last = (
        start + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
        if numel
        else start - 1
    )
    if numel > storage.numel or last >= storage.numel:
        raise Refused("a tensor that reaches beyond its storage")
    first = start * storage.dtype.itemsize
    data = storage.blob.data[first:]
    # Not its own elements only: reading it copies all that its storage has from there on.
    budget.spend("tensor_bytes", len(data), _TOO_MUCH)
    return StoredTensor(
        dtype=storage.dtype,
        shape=sizes,
        stride=steps,
        file_offset=storage.blob.offset + first,
        data=data,
    )


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    good = type(value) is tuple and len(value) <= _MAX_DIMS
    if not good or not all(type(size) is int and 0 <= size < 1 << 48 for size in value):
        raise Refused(f"{what} that is no tuple of up to {_MAX_DIMS} sizes")
    return tuple(value)


def _array_type(code: Any, *_: Any) -> _ArrayType:
    if not isinstance(code, str) or not _ARRAY_TYPE.fullmatch(code) or code == "f1":
        raise Refused(f"an array of type {str(code)[:20]!r}; only numbers are read")
    return _ArrayType(code)


def _latin1(budget: Budget, text: Any, encoding: Any) -> Blob:
    """Bytes as old pickles spell them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused("text in an unknown encoding")
    budget.spend("text", len(text), TOO_MUCH_TEXT)  # once more for every time it is encoded
    try:
        return Blob(memoryview(text.encode("latin1")), -1)
    except UnicodeEncodeError:
        raise Refused("bytes that are no bytes") from None


def _storage(data: Any, budget: Budget) -> _Storage:
    """Elements in the older format of `torch.save`: five small pickles, a count, and the bytes."""
    if not isinstance(data, Blob) or data.offset < 0:
        raise Refused("a storage that is no bytes")
    machine = Machine(data.data, {}, budget, offset=data.offset)
    if machine.run() != _LEGACY_MAGIC:
        raise Refused("a storage in another format than torch.save's")
    if machine.run() != _LEGACY_VERSION:
        raise Refused("a storage of another version of torch.save's format")
    system = machine.run()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("a storage of a big-endian machine")
    machine.makers = dict.fromkeys(_STORAGES, lambda *_: _refuse("a storage made in place"))
    machine.persistent = _described
    described = machine.run()
    if type(described) is not _Described:
        raise Refused("a storage without a description")
    machine.makers, machine.persistent = {}, None
    if machine.run() != [described.key]:
        raise Refused("a storage of several parts")
    count, elements = data.data[machine.position :][:8], data.data[machine.position :][8:]
    size = described.numel * described.dtype.itemsize
    if int.from_bytes(count, "little") != described.numel or len(elements) != size:
        raise Refused("a storage whose size is not what it says")
    return _Storage(
        dtype=described.dtype,
        numel=described.numel,
        blob=Blob(elements, data.offset + machine.position + 8),
    )


@dataclass(frozen=True, kw_only=True)
class _Described:
    """What a storage's persistent id says of it."""

    dtype: torch.dtype
    key: str
    numel: int


def _described(identity: Any) -> _Described:
    """Understand `("storage", type, key, device, number of elements, None)`; the device does not matter."""
    if type(identity) is not tuple or len(identity) != 6 or identity[0] != "storage":
        raise Refused("a reference to something outside the file")
    _, kind, key, _, numel, view = identity
    if not isinstance(kind, Global) or not isinstance(key, str) or view is not None:
        raise Refused("a storage with an unknown description")
    if type(numel) is not int or numel < 0:
        raise Refused("a storage whose size is no number")
    return _Described(dtype=_STORAGES[kind], key=key, numel=numel)
