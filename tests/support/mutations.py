"""Damaged and hostile variants of files: bytes, JSON, safetensors, ZIP archives, pickles."""

import io
import json
import pickletools
import random
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 10**6, 10**9, 2**62, 2**70, 10**400, 0.5, -0.5, 1e300, float("nan"),
    float("inf"), "", "x", "C", "\x1b[31mred", "../../x", [], [1], [0], [-1], ["a"], [[1]], {}, {"a": 1}, [1] * 1000,
    "a" * 10000, [10**9, 10**9], -(10**9), -(2**62), 2**63, 1e18, -1e300, 1e-300, -0.0, "nan", "1e999", "\ud800",
    json.loads("[" * 50 + "]" * 50),
]  # fmt: skip
# Opens of a pickle that the ordinary reader would obey.
CALLS = (b"cposix\nsystem\n(X\x06\0\0\0touch tR", b"cbuiltins\neval\n(X\x01\0\0\x001tR")
_RENAMED = [
    (b"collections", b"builtins___"), (b"OrderedDict", b"__import___"), (b"torch._utils", b"posix.syste_"),
]  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """One to four changes: bits, bytes, numbers, pieces swapped, lost, added, or taken from other files."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        # Headers are short, and most of what can go wrong lies in them.
        end = len(changed) if rng.random() < 0.5 else min(len(changed), 200)
        if not end:
            break
        kind, at = rng.randrange(8 if others else 7), rng.randrange(end)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.randrange(256)
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            to, size = rng.randrange(len(changed)), rng.randrange(1, 64)
            piece, other = changed[at : at + size], changed[to : to + size]
            changed[at : at + size], changed[to : to + size] = other, piece
        elif kind == 4:
            changed[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff"])
        elif kind == 5:
            changed[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 6:
            del changed[at : at + rng.randrange(1, 20)]
        else:
            changed[at:] = rng.choice(others)[at:]
    return bytes(changed)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutate_json(content: Any, rng: random.Random, *, more: Sequence[tuple[Any, ...]] = ()) -> Any:
    """A copy with a value deleted, replaced, or added (sometimes at one of `more` paths)."""
    changed = json.loads(json.dumps(content))
    found = list(places(changed))
    if not found:
        return rng.choice(VALUES)
    place = rng.choice(found)
    if more and rng.random() < 0.1:
        place = rng.choice(more)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    if rng.random() < 0.15 and (not isinstance(parent, dict) or place[-1] in parent):
        del parent[place[-1]]
    elif isinstance(parent, dict) and rng.random() < 0.1:
        parent[rng.choice(["", "x", "__class__", "\x1b[31m", place[-1] + " "])] = rng.choice(VALUES)
    else:
        parent[place[-1]] = rng.choice(VALUES)
    return changed


def mutate_safetensors(
    data: bytes, rng: random.Random, resealed: Callable[[Any], Any] = lambda content: content
) -> bytes:
    """Change the header's values, or the JSON texts in its metadata, and write it again with its right length."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.get("__metadata__", {})
    texts = [key for key, text in metadata.items() if text.startswith("{")]
    if texts and rng.random() < 0.6:
        key = rng.choice(texts)
        changed = mutate_json(json.loads(metadata[key]), rng)
        metadata[key] = json.dumps(resealed(changed) if rng.random() < 0.8 else changed)
    else:
        header = mutate_json(header, rng)
    if rng.random() < 0.2:
        rest = mutate_bytes(rest, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


TEXTS = [
    b"", b"nan", b"-1", b"1e999", b"9" * 40, b"9" * 5000, b"x", b"\0", b"\xff\xfe", b'"', b"[" * 1000, b"{" * 1000,
    b"\x1b[31m", b"&a [*a, *a]", b"!!python/object/apply:os.system [id]", b"null", b"[1, 2]", b"{a: 1}", b"../../x",
    b"x" * 10000, b"\n",
]  # fmt: skip


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """Replace, delete or repeat words of a text such as a table or a settings file."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        words = [m.span() for m in re.finditer(rb"[^\s,:=]+|[\s,:=]", data)]
        if not words:
            break
        begin, end = rng.choice(words)
        piece = rng.choice([*TEXTS, data[begin:end] * 2])
        data = data[:begin] + piece + data[end:]
    return data


def mutate_zip(data: bytes, rng: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Change what one member holds, its name, or how it is packed, and write the archive again with right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        members = old.infolist()
        chosen = rng.randrange(len(members))
        for i, member in enumerate(members):
            content, name, method = old.read(member), member.filename, member.compress_type
            if i == chosen:
                kind = rng.randrange(6)
                if kind == 0:
                    continue
                if kind == 1:
                    name = rng.choice(
                        ["../x.png", "/x.png", "a/../../b.png", "x" * 1000, "\x1b[31m.png", "a//b.png"]
                    )
                elif kind == 2:
                    content, method = (
                        bytes(64 << 20) if rng.random() < 0.1 else bytes(1 << 20),
                        zipfile.ZIP_DEFLATED,
                    )
                elif kind == 3:
                    method = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
                else:
                    content = mutate_bytes(content, rng, others)
            new.writestr(name, content, method)
    return out.getvalue()


def mutate_pickle(good: bytes, rng: random.Random, pieces: Sequence[bytes] = CALLS) -> bytes:
    """Change instructions and their arguments, and put hostile pieces between them."""
    where, data = instructions(good), bytearray(good)
    codes = [op.code.encode("latin1") for op in pickletools.opcodes]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if not data:
            break
        place, kind = rng.choice(where), rng.randrange(7)
        if kind == 0:
            data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == 1 and place < len(data):
            data[place] = rng.choice(codes)[0]
        elif kind == 2:
            del data[place : place + rng.randrange(1, 40)]
        elif kind == 3:
            data[place:place] = rng.choice(pieces)
        elif kind == 4:
            data[place:place] = data[(other := rng.choice(where)) : other + rng.randrange(1, 60)]
        elif kind == 5:
            data[place:place] = rng.choice(codes) + rng.randbytes(rng.randrange(9))
        else:
            data = data.replace(*rng.choice(_RENAMED), 1)
    return bytes(data if rng.random() > 0.05 else data[: rng.randrange(len(data) + 1)])


_instructions: dict[bytes, list[int]] = {}


def instructions(pickled: bytes) -> list[int]:
    """Positions of a pickle's instructions; those of the same pickle are looked for once."""
    if pickled not in _instructions:
        _instructions[pickled] = [position or 0 for _, _, position in pickletools.genops(pickled)]
    return _instructions[pickled]
