"""JSON from files that may be damaged or hostile: bounded in size, depth and numbers."""

import functools
import json
import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

_T = TypeVar("_T")

_MAX_BYTES = 32 << 20
_MAX_DEPTH = 100
_MAX_ITEMS = 2_000_000
_MAX_INTEGER = 1 << 64
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Range:
    """What a number in a file may be: `Annotated[float, Range(low=0, high=1)]` as the type of a field.

    Attributes:
        low: Smallest value.
        high: Largest value.
        special: Whether NaN and infinities are allowed as well.
    """

    low: float
    high: float
    special: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        return self.low <= value <= self.high or (self.special and not math.isfinite(value))


def read_json(source: bytes | str | Path, *, finite: bool = True) -> Any:
    """Parse JSON whose author is not trusted.

    The bounds are far above anything that edm2 writes: 32 MB of text, 100 levels, two million values, integers of 64
    bits. Parsing takes at most a few hundred megabytes of memory.

    Args:
        source: Path of a file, or the text itself.
        finite: Whether to refuse NaN and infinities, which `json.dump` may have written.

    Returns:
        The value: dicts, lists, strings, numbers, booleans and None.

    Raises:
        ValueError: If it is not JSON, repeats a key, or exceeds a bound. The message gives the reason only:
            callers name the file.
        OSError: If the file cannot be read.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    else:
        data = source if isinstance(source, bytes) else source.encode()
    if len(data) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES >> 20} MB of JSON")
    _check_structure(data)

    def number(text: str) -> float:
        value = float(text)
        if finite and not math.isfinite(value):
            raise ValueError(f"the number {text[:20]} is not finite")
        return value

    return json.loads(
        data,
        parse_float=number,
        parse_constant=number,
        parse_int=_integer,
        object_pairs_hook=_without_repeats,
    )


def from_json(cls: type[_T], content: Any) -> _T:
    """Make a dataclass from a JSON object whose values have the types of its fields.

    Args:
        cls: The dataclass. Its fields are annotated with str, int, float, bool, dict, list or tuple of these, `Any`,
            dataclasses (given as built), or unions. Numbers have a `Range`, which is checked.
        content: Its fields by name.

    Raises:
        TypeError: If a value has another type or is out of range, or a field is missing or unknown.
    """
    if not isinstance(content, dict):
        raise TypeError(f"a {type(content).__name__} where an object is expected")
    kinds: dict[str, Any] = _annotations(cls)  # type: ignore[arg-type]
    for name, value in content.items():
        if name in kinds and not _fits(value, kinds[name]):
            wrong = (
                f"{value!r}, out of range"
                if _fits(value, _plain(kinds[name]))
                else f"a {type(value).__name__}"
            )
            raise TypeError(f"{name}, which is {wrong}"[:200])
    return cls(**content)


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _plain(kind: Any) -> Any:
    """A type without its range."""
    if typing.get_origin(kind) is typing.Annotated:
        return typing.get_args(kind)[0]
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return typing.Union[tuple(map(_plain, typing.get_args(kind)))]  # noqa: UP007 - made at run time
    return kind


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _fits(value, inner[0]) and inner[1].holds(value)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(x, inner[0]) for x in value)
    if origin is tuple:
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, inner[0]) and _fits(x, inner[1]) for key, x in value.items()
        )
    if kind in (int, float):  # bool counts as an int for isinstance
        return type(value) in (int, kind)
    return kind is Any or isinstance(value, origin or kind)


def _check_structure(data: bytes) -> None:
    """Bound depth and size before the parser, which recurses and allocates, sees the text."""
    text = _STRING.sub(b"", data)
    opening = text.count(b"[") + text.count(b"{")
    if opening + text.count(b",") > _MAX_ITEMS:
        raise ValueError(f"JSON with more than {_MAX_ITEMS:,} values")
    if opening > _MAX_DEPTH:
        steps = np.frombuffer(text.translate(_STEPS, _NO_BRACKETS), np.int8)
        if np.cumsum(steps, dtype=np.int64).max(initial=0) > _MAX_DEPTH:
            raise ValueError(f"JSON nested deeper than {_MAX_DEPTH} levels")


def _integer(text: str) -> int:
    if len(text) > 21 or abs(int(text)) > _MAX_INTEGER:
        raise ValueError(f"the number {text[:20]}... is larger than 64 bits")
    return int(text)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key[:80]!r} is given twice")
        content[key] = value
    return content
