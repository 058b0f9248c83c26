"""Reads the structure of a pickle without running any of it.

A pickle is a program for a small stack machine, and some of its instructions import and call things. Here the
instructions that only describe data are interpreted, names of classes and functions stay names, and what a
call would have made is built by our own code from an allow-list. Nothing is imported, looked up or called.
"""

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}
_EMPTY: dict[int, type] = {ord(")"): tuple, ord("]"): list, ord("}"): dict, 0x8F: set}
_INTS = {ord("J"): (4, True), ord("K"): (1, False), ord("M"): (2, False)}
_TEXTS = {0x8C: 1, ord("X"): 4, 0x8D: 8}
_BYTES = {ord("C"): 1, ord("B"): 4, 0x8E: 8, 0x96: 8}
_SHORT_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_PUTS = {ord("q"): 1, ord("r"): 4}
_GETS = {ord("h"): 1, ord("j"): 4}
_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}
TOO_MUCH_TEXT = "more text than any network has"
_LONGEST_NAME = 200
_MOST_ARGUMENTS = 16


class Refused(Exception):
    """A pickle holds something that is not read; the text says what.

    Attributes:
        position: byte in the file at which it was met, where known.
    """

    position: int | None = None

    def __str__(self) -> str:
        return super().__str__() + (f", at byte {self.position}" if self.position is not None else "")


class Global(NamedTuple):
    """The name of a class or function, which is all that is ever known of it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Blob(NamedTuple):
    """A string of bytes: a view of the file, and where in the file it starts."""

    data: memoryview
    offset: int


@dataclass
class Budget:
    """What one file may still cost, shared by all pickles inside it.

    Attributes:
        opcodes: instructions; each adds at most one object of a few hundred bytes.
        text: bytes of text.
        tensor_bytes: bytes of tensors and arrays; they may not claim more than the file holds.
        depth: containers within containers.
    """

    opcodes: int = 1_000_000
    text: int = 64 << 20
    tensor_bytes: int = 0
    depth: int = 100

    def spend(self, what: str, amount: int, excess: str) -> None:
        """Take from one of the above; `excess` says what there is too much of.

        Raises:
            Refused: if there is not so much left.
        """
        left = getattr(self, what) - amount
        if left < 0:
            raise Refused(excess)
        setattr(self, what, left)


class Buildable:
    """An object whose state comes after it, in a BUILD instruction."""

    def build(self, state: Any) -> None:
        """Take the state.

        Raises:
            Refused: if it is not what such an object has.
        """
        raise Refused(f"a state for a {type(self).__name__}, which takes none")


@dataclass
class Machine:
    """Interpreter of one pickle.

    Args:
        data: the bytes.
        makers: what each allowed class or function makes of its arguments.
        budget: what may still be spent.
        position: where the pickle starts; after `run`, where it ended.
        offset: where in the file the bytes start, for messages and tensors.
        persistent: what a persistent id means; none are allowed by default.
    """

    data: memoryview
    makers: Mapping[Global, Callable[..., Any]]
    budget: Budget
    position: int = 0
    offset: int = 0
    persistent: Callable[[Any], Any] | None = None
    _stack: list[Any] = field(default_factory=list)
    _marks: list[int] = field(default_factory=list)
    _memo: dict[int, Any] = field(default_factory=dict)

    def run(self) -> Any:
        """Interpret up to STOP.

        Returns:
            None, bool, int, float, str, tuple, list, dict, set, `Blob`, `Global`, or what a maker made.

        Raises:
            Refused: at the first thing that is not allowed.
        """
        self._memo.clear()
        while True:
            start = self.position
            try:
                self.budget.spend("opcodes", 1, "more instructions than any network needs")
                code = self._take(1)[0]
                if code == ord("."):
                    return self._finish()
                self._step(code)
            except Refused as refused:
                if refused.position is None:  # else it was met in a pickle inside this one
                    refused.position = self.offset + start
                raise

    def _finish(self) -> Any:
        result = self._pop()
        if self._stack or self._marks:
            raise Refused("an end with values left over")
        return result

    def _step(self, code: int) -> None:
        if code in _CONSTANTS:
            self._stack.append(_CONSTANTS[code])
        elif code in _EMPTY:
            self._stack.append(_EMPTY[code]())
        elif code in _INTS:
            size, signed = _INTS[code]
            self._stack.append(int.from_bytes(self._take(size), "little", signed=signed))
        elif code in _TEXTS:
            self._stack.append(self._text(self._length(_TEXTS[code])))
        elif code in _BYTES:
            length = self._length(_BYTES[code])
            self._stack.append(Blob(self._take(length), self.offset + self.position - length))
        elif code in _SHORT_TUPLES:
            self._stack.append(tuple(self._pop_many(_SHORT_TUPLES[code])))
        elif code in _PUTS:
            self._memo[self._length(_PUTS[code])] = self._top()
        elif code in _GETS:
            self._stack.append(self._recall(self._length(_GETS[code])))
        elif code in _ACTIONS:
            _ACTIONS[code](self)
        else:
            raise Refused(f"the instruction {_NAMES.get(code, hex(code))}")

    def _take(self, size: int) -> memoryview:
        if size > len(self.data) - self.position:
            raise Refused("an instruction that is cut off by the end")
        self.position += size
        return self.data[self.position - size : self.position]

    def _length(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _text(self, length: int) -> str:
        raw = self._take(length)
        self.budget.spend("text", length, TOO_MUCH_TEXT)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise Refused("text that is not UTF-8") from None

    def _line(self) -> str:
        end = bytes(self.data[self.position : self.position + _LONGEST_NAME]).find(b"\n")
        if end < 0:
            raise Refused("a name without an end")
        text = self._text(end)
        self._take(1)
        return text

    def _floor(self) -> int:
        """Height of the stack below which the values of an open mark lie, out of reach."""
        return self._marks[-1] if self._marks else 0

    def _pop_many(self, count: int) -> list[Any]:
        start = len(self._stack) - count
        if start < self._floor():
            raise Refused("an instruction that needs more values than there are")
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _pop(self) -> Any:
        return self._pop_many(1)[0]

    def _top(self) -> Any:
        if len(self._stack) <= self._floor():
            raise Refused("an instruction that needs more values than there are")
        return self._stack[-1]

    def _pop_mark(self) -> list[Any]:
        if not self._marks:
            raise Refused("an instruction that needs a mark")
        values = self._pop_many(len(self._stack) - self._marks[-1])
        self._marks.pop()
        return values

    def _recall(self, index: int) -> Any:
        if index not in self._memo:
            raise Refused(f"a reference to value {index}, which was not stored")
        return self._memo[index]

    def _open_mark(self) -> None:
        self._marks.append(len(self._stack))

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._top()

    def _protocol(self) -> None:
        version = self._take(1)[0]
        if not 2 <= version <= 5:
            raise Refused(f"pickle protocol {version}")

    def _long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._length(1)), "little", signed=True))

    def _float(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def _put_items(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not dict or len(values) % 2:
            raise Refused("items for something that is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise Refused("values for something that is no list")
        target.extend(values)

    def _add_members(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not set:
            raise Refused("members for something that is no set")
        target.update(map(_key, values))

    def _global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Refused("a class whose name is no text")
        found = Global(module, name)
        if found not in self.makers:
            raise Refused(
                f"the name {str(found)[:_LONGEST_NAME]!r}, which is not on the list of what is read"
            )
        self._stack.append(found)

    def _global_lines(self) -> None:
        self._global(self._line(), self._line())

    def _call(self) -> None:
        called, args = self._pop_many(2)
        if not isinstance(called, Global) or type(args) is not tuple:
            raise Refused("a call of something that is no known name")
        if len(args) > _MOST_ARGUMENTS:
            raise Refused(f"a call with {len(args)} arguments")
        try:
            self._stack.append(self.makers[called](*args))
        except TypeError:  # too many or too few arguments
            raise Refused(f"a {called} with {len(args)} arguments") from None

    def _build(self) -> None:
        target, state = self._pop_many(2)
        if not isinstance(target, Buildable):
            raise Refused("a state for something that takes none")
        target.build(state)
        self._stack.append(target)

    def _persistent_id(self) -> None:
        if self.persistent is None:
            raise Refused("a reference to something outside the file")
        self._stack.append(self.persistent(self._pop()))


_ACTIONS: dict[int, Callable[[Machine], Any]] = {
    0x80: Machine._protocol,
    0x95: lambda m: m._take(8),  # a frame's length, of use to readers of streams only
    ord("("): Machine._open_mark,
    ord("0"): Machine._pop,
    ord("1"): Machine._pop_mark,
    ord("2"): lambda m: m._stack.append(m._top()),
    0x8A: Machine._long,
    ord("G"): Machine._float,
    ord("t"): lambda m: m._stack.append(tuple(m._pop_mark())),
    0x91: lambda m: m._stack.append(frozenset(map(_key, m._pop_mark()))),
    ord("a"): lambda m: m._extend([m._pop()]),
    ord("e"): lambda m: m._extend(m._pop_mark()),
    0x90: lambda m: m._add_members(m._pop_mark()),
    ord("s"): lambda m: m._put_items(m._pop_many(2)),
    ord("u"): lambda m: m._put_items(m._pop_mark()),
    ord("c"): Machine._global_lines,
    0x93: lambda m: m._global(*m._pop_many(2)),
    ord("R"): Machine._call,
    0x81: Machine._call,
    ord("b"): Machine._build,
    0x94: Machine._memoize,
    ord("Q"): Machine._persistent_id,
}


def _key(value: Any) -> Any:
    """A key or member of a set, of a kind whose hash is quick, shallow and cannot be made to collide at will."""
    if isinstance(value, str) or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    raise Refused(f"a key that is a {type(value).__name__}")


def check_depth(root: Any, limit: int) -> None:
    """Make sure that containers nest only so deep and none contains itself.

    Args:
        root: a value that `Machine.run` gave.
        limit: containers within containers.

    Raises:
        Refused: if they do not.
    """
    done: set[int] = set()
    path: dict[int, Any] = {}
    todo: list[tuple[Any, bool]] = [(root, True)]
    while todo:
        value, entering = todo.pop()
        if not entering:
            del path[id(value)]
            done.add(id(value))
            continue
        if id(value) in path:
            raise Refused("a container that contains itself")
        # Before looking inside: a long list that is referred to often would be walked each time.
        if id(value) in done or not (children := _children(value)):
            continue
        path[id(value)] = value
        if len(path) > limit:
            raise Refused(f"containers nested deeper than {limit}")
        todo.append((value, False))
        todo += [(child, True) for child in children]


def _children(value: Any) -> list[Any]:
    if type(value) is dict:
        return list(value.values())
    if type(value) in (list, tuple):
        return list(value)
    return list(vars(value).values()) if isinstance(value, Buildable) else []
