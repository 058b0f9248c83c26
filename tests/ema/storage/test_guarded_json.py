"""JSON from strangers: what is read, and what is refused before it costs memory or a traceback."""

import contextlib
import json
import random
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edm2.ema.storage.guarded_json import from_json, read_json


def test_ordinary_json_is_read_as_json_reads_it(tmp_path: Path) -> None:
    value = {
        "a": [1, -2.5, 1e-300, True, None, {"b": 'é " [[[ \\'}],
        "largest": 2**64 - 1,
        "s": "[" * 1000,
    }
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "a.json") == read_json(json.dumps(value)) == value
    assert read_json(b"[NaN, 1e999]", finite=False)[1] == float("inf")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000, "nested deeper than 100 levels"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested deeper than 100 levels"),
        ("[" + "0," * 3_000_000 + "0]", "more than 2,000,000 values"),
        (" " * (33 << 20), "more than 32 MB"),
        ("[1e999]", "the number 1e999 is not finite"),
        ("[NaN]", "the number NaN is not finite"),
        ("[-Infinity]", "the number -Infinity is not finite"),
        ("1" * 10_000, "is larger than 64 bits"),
        (str(2**65), "is larger than 64 bits"),
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ('{"a": "unfinished [', "Unterminated string"),
        ("", "Expecting value"),
    ],
)
def test_what_could_hurt_is_refused_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_json(text)
    with pytest.raises(ValueError, match="'utf-8' codec"):
        read_json(b'{"a": "\xff"}')


def test_a_large_hostile_text_is_refused_in_little_memory() -> None:
    text = b"[" + b"[]," * 8_000_000 + b"[]]"
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 2,000,000 values"):
        read_json(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 << 20


def test_no_mutation_of_a_text_ends_in_anything_but_an_error_of_value() -> None:
    text = json.dumps({"t": 256, "list": [{"a": 1.5}, {"b": None}], "text": "\\u0041"}).encode()
    rng = random.Random(0)
    for _ in range(3000):
        data = bytearray(text)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(ValueError):
            read_json(bytes(data))


@dataclass(frozen=True)
class Inner:
    x: float


@dataclass
class Outer:
    name: str
    number: int
    scores: list[float]
    pair: tuple[float, float] | None = None
    inner: Inner | None = None
    table: dict[str, str] | None = None


WHOLE: dict[str, Any] = {
    "name": "a",
    "number": 1,
    "scores": [1, 2.5],
    "pair": (0, 1.0),
    "inner": Inner(2),
    "table": {},
}


def test_a_dataclass_is_made_from_values_of_its_types() -> None:
    assert from_json(Outer, WHOLE) == Outer(**WHOLE)
    assert from_json(Outer, {"name": "a", "number": 1, "scores": []}).pair is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": 1}, "name, which is a int"),
        ({"number": True}, "number, which is a bool"),
        ({"number": 1.5}, "number, which is a float"),
        ({"scores": ["a"]}, "scores, which is a list"),
        ({"scores": None}, "scores, which is a NoneType"),
        ({"pair": (1.0,)}, "pair, which is a tuple"),
        ({"inner": {"x": 1}}, "inner, which is a dict"),
        ({"table": []}, "table, which is a list"),
        ({"other": 1}, "unexpected keyword argument 'other'"),
    ],
)
def test_values_of_other_types_are_named(change: dict[str, Any], told: str) -> None:
    with pytest.raises(TypeError, match=told):
        from_json(Outer, {**WHOLE, **change})
    with pytest.raises(TypeError, match="a list where an object is expected"):
        from_json(Outer, [])
