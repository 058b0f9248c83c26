"""Reads the structure of a pickle without running any of it.

A pickle is a program for a small stack machine, and some of its instructions import and call things. The standard
library's pure Python unpickler interprets it here, with only the instructions that describe data: a name gives a
stand-in from an allow-list and never the thing named, and a call builds plain values. (The C unpickler is unsuitable:
a file chooses the size of its memo, and with it how many gigabytes it allocates.)
"""

import pickle
import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

_ALLOWED = (
    "PROTO STOP MARK POP POP_MARK DUP BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID "
    "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT EMPTY_SET"
)
_LONGEST_NAME = 200
_MOST_ARGUMENTS = 16


class Refused(Exception):
    """A pickle holds something that is not read; the text says what.

    Attributes:
        position: Byte in the file at which it was met, where known.
    """

    position: int | None = None

    def __str__(self) -> str:
        return super().__str__() + (f", at byte {self.position}" if self.position is not None else "")


class Blob(NamedTuple):
    """A string of bytes: a view of the file, and its offset in the file (-1 for bytes that are not in the file)."""

    data: memoryview
    offset: int


@dataclass
class Budget:
    """What one file may still cost, shared by all pickles inside it.

    Attributes:
        reads: Reads of instructions and their arguments; each adds at most one object of a few hundred bytes.
        text: Bytes that are copied out of the file, chiefly text.
        tensor_bytes: Bytes of tensors and arrays; they may not claim more than the file holds.
    """

    reads: int = 1_000_000
    text: int = 64 << 20
    tensor_bytes: int = 0

    def spend(self, what: str, amount: int) -> None:
        """Take an amount from one of the attributes.

        Raises:
            Refused: If less is left.
        """
        left = getattr(self, what) - amount
        if left < 0:
            raise Refused(_EXCESS[what])
        setattr(self, what, left)


_EXCESS = {
    "reads": "more instructions than any network needs",
    "text": "more text than any network has",
    "tensor_bytes": "tensors that claim more bytes than the file has",
}


class Buildable:
    """An object whose state follows it in a BUILD instruction."""

    def build(self, state: Any) -> None:
        """Take the state.

        Raises:
            Refused: If such an object cannot have it.
        """
        raise NotImplementedError


class _File:
    """The bytes of a pickle, as the file from which the unpickler reads; every read is counted."""

    def __init__(self, data: memoryview, budget: Budget, offset: int) -> None:
        self._data, self._budget, self._offset = data, budget, offset
        self.position = self._instruction = 0

    def at(self) -> int:
        """Where in the file the last instruction, or its argument of one byte, begins."""
        return self._offset + self._instruction

    def read(self, size: int) -> bytes:
        if size == 1:
            self._instruction = self.position
        self._budget.spend("reads", 1)
        self._budget.spend("text", size)
        return bytes(self.blob(size).data)

    def readline(self) -> bytes:
        end = bytes(self._data[self.position : self.position + _LONGEST_NAME]).find(b"\n")
        if end < 0:
            raise Refused("a name without an end")
        return self.read(end + 1)

    def blob(self, size: int) -> Blob:
        """The next bytes, not copied."""
        start = self.position
        if size > len(self._data) - start:
            raise Refused("an instruction that is cut off by the end")
        self.position += size
        return Blob(self._data[start : self.position], self._offset + start)

    def rest(self) -> Blob:
        """All bytes that follow, not copied."""
        return self.blob(len(self._data) - self.position)


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> NoReturn:
        names = (op.name for op in pickletools.opcodes if ord(op.code) == code)
        raise Refused(f"the instruction {next(names, hex(code))}")


class Unpickler(pickle._Unpickler):
    """Reads one or more pickles from bytes.

    Args:
        data: The bytes.
        names: (module, name) -> stand-in: a function of the budget and the arguments of the pickled call, or a
            value, which cannot be called.
        budget: What may still be spent.
        offset: Where in the file the bytes start, for messages and blobs.
    """

    # Of the base class, whose type stubs leave them out.
    stack: list[Any]
    metastack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    load_setitem: Callable[[], None]
    load_setitems: Callable[[], None]
    load_additems: Callable[[], None]

    def __init__(
        self, data: memoryview, names: Mapping[tuple[str, str], Any], budget: Budget, *, offset: int = 0
    ) -> None:
        self.file = _File(data, budget, offset)
        super().__init__(self.file)
        self._names, self._budget = names, budget

    def run(self) -> Any:
        """Read the next pickle.

        Returns:
            None, bool, int, float, str, tuple, list, dict, set, `Blob`, or what a stand-in made.

        Raises:
            Refused: At the first thing that is not allowed.
        """
        self.memo: dict[int, Any] = {}
        try:
            result = self.load()
            if self.stack or self.metastack:
                raise Refused("an end with values left over")
        except Exception as met:  # whatever a malformed program makes the unpickler raise
            # The text of other errors may spell out any object of the file.
            told = f"an instruction that cannot be followed ({type(met).__name__})"
            refused = met if isinstance(met, Refused) else Refused(told)
            if refused.position is None:  # else it was met in a pickle inside this one
                refused.position = self.file.at()
            raise refused from None
        return result

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name."""
        if (module, name) not in self._names:
            shown = f"{module}.{name}"[:_LONGEST_NAME]
            raise Refused(f"the name {shown!r}, which is not on the allow-list")
        return self._names[module, name]

    def _frame(self) -> None:
        self.read(8)  # Only readers of streams need the length of a frame.

    def _call(self) -> None:
        args = self.stack.pop()
        if type(args) is not tuple or len(args) > _MOST_ARGUMENTS:
            raise Refused("a call without a short tuple of arguments")
        self.stack[-1] = self.stack[-1](self._budget, *args)

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Buildable):
            raise Refused("a state for something that takes none")
        self.stack[-1].build(state)

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        self.load_setitem()

    def _set_items(self) -> None:
        _check_keys(self.stack[::2])
        self.load_setitems()

    def _add_items(self) -> None:
        _check_keys(self.stack)
        self.load_additems()

    def _bytes(self, width: int) -> None:
        self.append(self.file.blob(int.from_bytes(self.read(width), "little")))

    dispatch = _Instructions(
        {code: pickle._Unpickler.dispatch[code] for (code,) in (getattr(pickle, name) for name in _ALLOWED.split())}
        | {
            pickle.FRAME[0]: _frame,
            pickle.REDUCE[0]: _call,
            pickle.NEWOBJ[0]: _call,
            pickle.BUILD[0]: _build,
            pickle.SETITEM[0]: _set_item,
            pickle.SETITEMS[0]: _set_items,
            pickle.ADDITEMS[0]: _add_items,
            pickle.SHORT_BINBYTES[0]: lambda self: self._bytes(1),
            pickle.BINBYTES[0]: lambda self: self._bytes(4),
            pickle.BINBYTES8[0]: lambda self: self._bytes(8),
            pickle.BYTEARRAY8[0]: lambda self: self._bytes(8),
        }
    )  # fmt: skip


def _check_keys(keys: Iterable[Any]) -> None:
    """Allow keys whose hash is quick and shallow, and cannot be made to collide at will."""
    for key in keys:
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 1 << 63):
            raise Refused(f"a key of type {type(key).__name__}")
