"""Files are whole or not there, whatever interrupts the writing."""

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import resource
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edm2
from edm2.files import read_sealed, sha256_of, sync_folder, write_atomic, write_json, write_sealed


def test_writes_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    assert write_atomic(path, b"old") == path
    write_atomic(str(path), b"new", durable=False)
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    path = write_atomic(tmp_path / "file", b"old")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)) as caught:
        write_atomic(path, b"new")
    if isinstance(error, OSError):
        assert str(path) in str(caught.value)
        assert "No space left on device): what it held is untouched; make room" in str(caught.value)
        assert caught.value.errno == 28  # type: ignore[attr-defined]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not write .*big"):
            write_atomic(tmp_path / "big", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_equal_content_is_equal_json(tmp_path: Path) -> None:
    write_json(tmp_path / "one", {"b": 1, "a": [2.5, None]})
    write_json(tmp_path / "two", {"a": [2.5, None], "b": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert json.loads((tmp_path / "one").read_text()) == {"a": [2.5, None], "b": 1}


def test_hash_of_a_file_larger_than_a_block(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    path = write_atomic(tmp_path / "file", content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()


def test_only_folders_that_exist_can_be_flushed(tmp_path: Path) -> None:
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "missing")


def test_every_flipped_bit_of_sealed_json_is_noticed_or_harmless(tmp_path: Path) -> None:
    content = {"num_images": 640, "network": {"dropout": 0.1, "name": "caf\u00e9"}, "times": [1, None, True]}
    path = tmp_path / "sealed.json"
    write_sealed(path, content)
    assert read_sealed(path) == content
    whole = path.read_bytes()
    for position in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            found = read_sealed(path)
            assert {
                key: found[key] for key in content
            } == content  # at most the checksum's own name has changed


def test_sealed_json_may_be_edited_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "sealed.json"
    write_sealed(path, {"data": "a"})
    path.write_text(path.read_text().replace('"a"', '"b"'))
    with pytest.raises(
        ValueError, match='its checksum differs; after an edit by hand, remove the line "sha256"'
    ):
        read_sealed(path)
    path.write_text('{"data": "b"}')
    assert read_sealed(path) == {"data": "b"}
    path.write_text("[1]")
    with pytest.raises(ValueError, match="not a JSON object"):
        read_sealed(path)


def classes_read_from_files() -> Iterator[type]:
    """Every dataclass that a call of `from_json` in the package makes."""
    root = Path(edm2.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "from_json":
                continue
            name = node.args[0].id  # type: ignore[attr-defined]
            module = importlib.import_module(
                ".".join(["edm2", *path.relative_to(root).with_suffix("").parts])
            )
            yield from (
                [getattr(module, name)]
                if name != "cls"
                else [
                    x
                    for x in vars(module).values()
                    if hasattr(x, "from_json") and x.__module__ == module.__name__
                ]
            )


def test_every_number_that_a_file_gives_has_a_range() -> None:
    classes = list(classes_read_from_files())
    assert {"RunInfo", "Snapshot", "Knobs", "Tuned", "Sampling", "Result"} <= {c.__name__ for c in classes}

    def numbers(kind: Any) -> Iterator[Any]:
        if typing.get_origin(kind) is not typing.Annotated:
            yield from [kind] if kind in (int, float) else ()
            for inner in typing.get_args(kind):
                yield from numbers(inner)

    for cls in classes:
        hints = typing.get_type_hints(cls, include_extras=True)
        without = [f.name for f in dataclasses.fields(cls) if list(numbers(hints[f.name]))]
        assert not without, f"{cls.__name__}: {without} need an Annotated[..., Range(...)]"
