"""Damaged and hostile files through the readers of edm2: how `robustness.py` damages a file and tries it.

A try writes one damaged file among whole ones and gives all of them to a command or a function. Only documented errors
may come back; nothing may run, hang, fill the memory, or be written outside the folder. `hostile_runs` and
`hostile_data` say which files are tried.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from edm2.cli import main
from edm2.files import sealed

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
from mutations import (  # noqa: E402
    VALUES,
    mutate_bytes,
    mutate_json,
    mutate_pickle,
    mutate_safetensors,
    mutate_text,
    mutate_zip,
    places,
)

SECONDS = 20  # a try that takes longer hangs
MEMORY = 1 << 30  # bytes of address space that a try may take before it fails with a MemoryError
_SLOW = ("report", "train", "sample", "load")
_JSON = (".json", ".jsonl", ".safetensors", ".zarray", ".zattrs")
GROWTH = 200 << 20  # bytes of memory that a try may take
Way = Callable[[Path], object]
Outcomes = collections.Counter[str]


@dataclasses.dataclass(frozen=True)
class Target:
    """A file to damage, and the ways to read it: each takes the file's path.

    Attributes:
        kind: What it is counted as.
        path: The file.
        ways: Name -> how it is read.
        reseal: Returns what a stranger who knows how checksums are made would write into the files beside it.
    """

    kind: str
    path: Path
    ways: dict[str, Way]
    reseal: Callable[[Path], dict[Path, bytes]] = lambda _: {}


def command(*words: str, up: int = 0) -> Way:
    """A command of edm2 on the file's folder of some levels up (0: the file itself); FILE and OUT are filled in."""

    def run(path: Path) -> None:
        source = path if not up else path.parents[up - 1]
        out = path.parents[0] / "out.tmp"
        texts = {
            "FILE": str(source),
            "OUT": str(out),
            **{f"OUT{end}": f"{out}{end}" for end in (".png", ".zip", ".json")},
        }
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
            try:
                main([texts.get(word, word) for word in words])
            except SystemExit as end:
                if end.code not in (None, 0, 1, 2):
                    raise
                if end.code:
                    raise ValueError(told.getvalue()[-300:]) from None

    return run


# Damage.


def damaged(target: Target, good: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """The file with bytes changed, or with its content changed and written well."""
    name = target.path.name
    if rng.random() < 0.3:
        return mutate_bytes(good, rng, others)
    if name.endswith((".json", ".jsonl", ".zarray", ".zattrs")):
        return mutated_json(target, good, rng)
    if name.endswith(".safetensors"):
        return mutate_safetensors(good, rng, resealed)
    if name.endswith((".zip", ".npz")):
        return mutate_zip(good, rng, others)
    if name.endswith((".csv", ".yaml", ".toml", ".txt")):
        return mutate_text(good, rng)
    if target.kind == "pickles":
        return mutated_pickle(good, rng)
    return mutate_bytes(good, rng, others)


def mutated_json(target: Target, good: bytes, rng: random.Random) -> bytes:
    lines = good.splitlines() if target.path.suffix == ".jsonl" else [good]
    chosen = rng.randrange(len(lines))
    content = json.loads(lines[chosen])
    for _ in range(rng.choice((1, 1, 2, 3))):
        changed = mutate_json(content, rng)
        content = changed if isinstance(changed, dict) else content
    if rng.random() < 0.8:  # a stranger knows how checksums are made
        content = resealed(content)
    lines[chosen] = json.dumps(content).encode()
    return b"\n".join(lines)


def resealed(content: Any) -> Any:
    """The content with the checksum that fits it, of whichever kind it has."""
    if not isinstance(content, dict):
        return content
    if "checksum" in content:
        values = {key: value for key, value in content.items() if key != "checksum"}
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return {**values, "checksum": hashlib.sha256(text.encode()).hexdigest()}
    if "crc32" in content:
        text = json.dumps({key: value for key, value in content.items() if key != "crc32"})
        return {**json.loads(text), "crc32": zlib.crc32(text.encode())}
    if "sha256" in content:
        return sealed({key: value for key, value in content.items() if key != "sha256"})
    return content


def with_every_value(path: Path, good: bytes) -> Iterator[tuple[str, bytes]]:
    """Each absurd value in each place of a file's JSON, with right checksums; of lists the first and last entry.

    Yields:
        Where and what, in words, and the file's new content.
    """
    if path.suffix == ".safetensors":
        length = struct.unpack("<Q", good[:8])[0]
        header, rest = json.loads(good[8 : 8 + length]), good[8 + length :]
        for where, changed in _changed(header):
            yield where, _with_header(changed, rest)
        metadata = header.get("__metadata__", {})
        for key, text in metadata.items():
            if text[:1] in "[{":
                for where, changed in _changed(json.loads(text)):
                    inner = {**metadata, key: json.dumps(resealed(changed))}
                    yield f"{key}: {where}", _with_header({**header, "__metadata__": inner}, rest)
        return
    lines = good.splitlines() if path.suffix == ".jsonl" else [good]
    for n in sorted({0, len(lines) - 1}):
        for where, changed in _changed(json.loads(lines[n])):
            text = json.dumps(resealed(changed)).encode()
            yield where, b"\n".join([*lines[:n], text, *lines[n + 1 :]]) + b"\n"


def _with_header(header: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def _changed(content: Any) -> Iterator[tuple[str, Any]]:
    text = json.dumps(content)
    for place in [(), *places(content)]:
        parent = content
        for key in place:
            length = len(parent)
            if isinstance(key, int) and key not in (0, length - 1):
                break
            parent = parent[key]
        else:
            for value in VALUES:
                changed = json.loads(text)
                if not place:
                    yield f"all = {str(value)[:40]!r}", value
                    continue
                at = changed
                for key in place[:-1]:
                    at = at[key]
                at[place[-1]] = value
                yield f"{'.'.join(map(str, place))} = {str(value)[:40]!r}", changed


def mutated_pickle(good: bytes, rng: random.Random) -> bytes:
    """The pickle, or the one inside an archive of torch.save, with other instructions."""
    if not zipfile.is_zipfile(io.BytesIO(good)):
        return mutate_pickle(good, rng) if good.startswith(b"\x80") else mutate_bytes(good, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            new.writestr(
                member.filename,
                mutate_pickle(content, rng) if member.filename.endswith("data.pkl") else content,
            )
    return out.getvalue()


# Trying.

# A compiled text does nothing before "exec", and NumPy compiles the headers of arrays to read them.
_EXECUTING = (
    "pickle.find_class",
    "exec",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_watched: list[str] | None = None
_inside = ""


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event in _EXECUTING and not (event == "exec" and Path(args[0].co_filename).is_file()):  # an import
        _watched.append(f"executed: {event} {str(args)[:80]}")
    writes = event == "open" and isinstance(args[0], str) and (args[2] or 0) & _WRITING
    if writes and not args[0].startswith((_inside, "/dev/")):
        _watched.append(f"written outside: {args[0]}")


class TooLong(BaseException):
    """No Exception, because a reader would take it for damage."""


def _too_long(*_: Any) -> None:
    raise TooLong


def virtual_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def resident(what: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))
    return int(line.split()[1]) << 10


def prepare(folder: Path, targets: list[Target]) -> dict[Path, bytes]:
    """Watch what is executed and written, make sure that the whole files are read, and bound the memory.

    Returns:
        The content of each whole file.
    """
    global _watched, _inside
    _inside = str(folder)
    sys.addaudithook(_audit)
    repr(torch.zeros(1))  # imports what torch needs for that
    _watched = []
    eval("0")
    assert _watched, "what is executed is not seen"
    _watched = None
    signal.signal(signal.SIGALRM, _too_long)
    whole = {target.path: target.path.read_bytes() for target in targets}
    for target in targets:  # imports what readers need, and shows that the whole files are read
        for name, way in target.ways.items():
            try:
                way(target.path)
            except ValueError as error:
                raise AssertionError(f"{target.path} is refused by {name} although it is whole") from error
            tidy(target.path)
    limit = virtual_memory() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return whole


@dataclasses.dataclass
class Try:
    """One damaged file read in one way."""

    outcome: str
    faults: list[str]
    grown: int


def try_one(target: Target, name: str, content: bytes, whole: bytes, *, reseal: bool) -> Try:
    """Read damaged content in one way, and put the whole file back, and those beside it that fit the damage."""
    global _watched
    target.path.write_bytes(content)
    beside = target.reseal(target.path) if reseal else {}
    kept = {path: path.read_bytes() for path in beside}
    for path, text in beside.items():
        path.write_bytes(text)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before, _watched = resident("VmRSS"), []
    signal.alarm(SECONDS)
    try:
        target.ways[name](target.path)
        outcome = "read"
    except (ValueError, OSError) as error:
        outcome = "refused"
        if not str(error).strip():
            outcome = f"traceback: {error!r} without words"
    except TooLong:
        outcome = "hang"
    except (Exception, SystemExit) as error:
        outcome = f"traceback: {type(error).__name__}"
        traceback.print_exc()
    finally:
        signal.alarm(0)
        events, _watched = _watched, None
    grown = resident("VmHWM") - before
    for path, text in {**kept, target.path: whole}.items():
        path.write_bytes(text)
    tidy(target.path)
    faults = [*events, *([f"memory: {grown >> 20} MB"] if grown > GROWTH else [])]
    return Try(outcome, faults + ([outcome] if outcome not in ("read", "refused") else []), grown)


Case = tuple[str, Target, str, bytes]  # its name, the file, the way to read it, the content


def try_all(
    folder: Path, targets: list[Target], make: Callable[[dict[Path, bytes]], Iterator[Case]]
) -> Outcomes:
    """Read damaged files; `make` gives them from the whole ones."""
    whole = prepare(folder, targets)
    found: Outcomes = collections.Counter()
    most = {target.kind: 0 for target in targets}
    for case, target, name, content in make(whole):
        reseal = random.random() < 0.8
        tried = try_one(target, name, content, whole[target.path], reseal=reseal)
        most[target.kind] = max(most[target.kind], tried.grown)
        for bad in tried.faults:
            print(f"{case}: {target.path.relative_to(folder)} by {name}: {bad}", file=sys.stderr, flush=True)
            found[f"{target.kind}: {bad.split(':')[0]}"] += 1
        if not tried.faults:
            found[f"{target.kind}: {tried.outcome}"] += 1
    for kind, number in most.items():
        print(f"{kind}: at most {number / 2**20:.0f} MB more memory during a try")
    return found


def at_random(
    targets: list[Target], count: int, seed: int, only: int | None = None
) -> Callable[[dict[Path, bytes]], Iterator[Case]]:
    """Damage files at random, each kind in turn, and read each in a way chosen at random; the slow report rarely."""
    kinds = sorted({target.kind for target in targets})
    by_kind = {kind: [t for t in targets if t.kind == kind] for kind in kinds}

    def cases(whole: dict[Path, bytes]) -> Iterator[Case]:
        others = [x for path, x in whole.items() if path.suffix in (".png", ".jpg", ".webp", ".gif", ".tif")]
        for case in range(count) if only is None else [only]:
            rng = random.Random(f"{seed} {case}")
            random.seed(case)
            target = rng.choice(by_kind[kinds[case % len(kinds)]])
            name = rng.choice([n for n in target.ways if n != "report" or rng.random() < 0.1])
            yield f"case {case}", target, name, damaged(target, whole[target.path], others, rng)

    return cases


def every_value(targets: list[Target], match: str = "") -> Callable[[dict[Path, bytes]], Iterator[Case]]:
    """Put each absurd value into each place of each JSON text, with right checksums, and read it in each way.

    Of a list only the first and the last entry are changed. Slow ways read every twentieth.
    """

    def cases(whole: dict[Path, bytes]) -> Iterator[Case]:
        number = 0
        for target in targets:
            if match not in str(target.path) or not target.path.name.endswith(_JSON):
                continue
            for where, content in with_every_value(target.path, whole[target.path]):
                for name in target.ways:
                    random.seed(0)  # with the files beside it, too
                    number += 1
                    if name not in _SLOW or number % 20 == 0:
                        yield where, target, name, content

    return cases


def tidy(path: Path) -> None:
    """Remove what a command wrote."""
    for left in [*path.parent.glob("out.tmp*"), *path.parent.glob(".out.tmp*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
