"""Pickles that try to run something, to fill the memory or never to end: one error each, and nothing runs."""

import builtins
import functools
import importlib
import io
import operator
import os
import pickle
import random
import re
import runpy
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutations import CALLS, mutate_pickle

from edm2.interop.nvlabs import load_network, read_reference_statistics
from edm2.interop.pickle_file import read_pickle

REFUSED = "was not read: it holds .*Nothing in it was run"


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def payloads(canary: Path) -> dict[str, Any]:
    """Objects that make a file if they are unpickled by the ordinary reader."""
    command, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    write = Call(open, str(canary), "w")
    return {
        "os.system": Call(os.system, command),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": write,
        "import": Call(builtins.__import__, "this"),
        "importlib": Call(importlib.import_module, "antigravity"),
        "getattr": Call(getattr, Call(importlib.import_module, "os"), "system"),
        "compile": Call(exec, Call(compile, code, "x", "exec")),
        "Popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "runpy": Call(runpy.run_path, str(canary)),
        "partial": Call(functools.partial, os.system, command),
        "attrgetter": Call(operator.attrgetter, "system"),
        "pickle in pickle": Call(pickle.loads, pickle.dumps(Call(os.system, command))),
        "torch.load": Call(torch.load, str(canary), "cpu", None),
        "numpy.load": Call(np.load, str(canary), None, True),
        "map": Call(list, Call(map, eval, [code])),
        "in a list": [1, [2, [Call(os.system, command)]]],
        "in an argument": Call(OrderedDict, [["a", Call(eval, code)]]),
    }


@pytest.mark.parametrize("protocol", range(6))
def test_a_call_of_anything_is_refused(tmp_path: Path, protocol: int, watching: Callable[[], Any]) -> None:
    canary = tmp_path / "canary"
    for name, payload in payloads(canary).items():
        path = tmp_path / "hostile.pkl"
        path.write_bytes(pickle.dumps(payload, protocol))
        for read in (read_pickle, load_network, read_reference_statistics):
            with watching() as executed, pytest.raises(ValueError, match=f"hostile.pkl {REFUSED}"):
                read(path)
            assert executed == [], name
    assert not canary.exists()


def test_the_payloads_would_have_run(tmp_path: Path, watching: Callable[[], Any]) -> None:
    canary = tmp_path / "canary"
    with watching() as executed:
        pickle.loads(pickle.dumps(payloads(canary)["eval"]))  # a payload of this test's own
    assert canary.exists()
    assert {"pickle.find_class", "exec"} <= set(executed)


@pytest.mark.parametrize("name", ["os.system", "eval", "getattr", "pickle in pickle"])
def test_calls_hidden_in_a_network_are_refused(
    official: Any, tiny_state: dict[str, torch.Tensor], tmp_path: Path, name: str
) -> None:
    canary = tmp_path / "canary"
    payload = payloads(canary)[name]
    kwargs = {"img_resolution": 2, "img_channels": 1}
    for network in (
        payload,
        official.network(tiny_state, {**kwargs, "model_channels": payload}),
        official.network(tiny_state, kwargs, extra=payload),
        official.persistent("Precond", {}, module_src=payload),
        official.persistent(payload, {}),
        official.persistent("Precond", {"_modules": {"unet": payload}}),
    ):
        path = official.write(tmp_path / "net.pkl", network)
        with pytest.raises(ValueError, match="net.pkl " + REFUSED):
            load_network(path)
    assert not canary.exists()


def storage_bytes(*parts: bytes) -> bytes:
    """A call of torch's storage reader on some bytes."""
    return pickle.dumps(Call(torch.storage._load_from_bytes, b"".join(parts)), 4)


def test_payloads_in_torch_storages_are_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = pickle.dumps(Call(os.system, f"touch {canary}"), 2)
    whole = io.BytesIO()
    torch.save(torch.zeros(3).untyped_storage(), whole, _use_new_zipfile_serialization=False)
    archive = io.BytesIO()
    torch.save({"a": Call(os.system, f"touch {canary}")}, archive)
    magic, version, system = (
        pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    for parts in (
        [evil],
        [magic, evil],
        [magic, version, evil],
        [magic, version, system, evil],
        [magic, version, system, b"\x80\x02cposix\nsystem\n."],
        [magic, version, system, b"\x80\x02ctorch\nFloatStorage\n)R."],
        [magic, version, pickle.dumps({"little_endian": False}, 2)],
        [magic, pickle.dumps(1002, 2)],
        [archive.getvalue()],
        [whole.getvalue()[:-1]],
        [whole.getvalue(), b"\0"],
        [storage_bytes(whole.getvalue())],
        [b""],
    ):
        path = tmp_path / "storage.pkl"
        path.write_bytes(storage_bytes(*parts))
        with pytest.raises(ValueError, match="storage.pkl " + REFUSED):
            read_pickle(path)
    assert not canary.exists()


LONG = struct.pack("<Q", 1 << 62)
HOSTILE = {
    "nothing": b"",
    "no stop": b"\x80\x04N",
    "text": b"hello world\n",
    "archive": b"PK\x03\x04" + bytes(100),
    "protocol 0": b"(lp0\nI1\na.",
    "protocol 6": b"\x80\x06N.",
    "two pickles": b"\x80\x04N.\x80\x04N.",
    "left over": b"\x80\x04NN.",
    "open mark": b"\x80\x04(N.",
    "empty stack": b"\x80\x04.",
    "pop of nothing": b"\x80\x040N.",
    "reach below a mark": b"\x80\x04N(\x85t.",
    "mark that is none": b"\x80\x04Nt.",
    "memo": b"\x80\x04h\x05.",
    "memo of nothing": b"\x80\x04\x94N.",
    "extension": b"\x80\x04\x82\x01.",
    "instance": b"(S'touch x'\nios\nsystem\n.",
    "object": b"\x80\x04(cos\nsystem\nX\x01\0\0\0xo.",
    "keyword call": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "persistent id": b"\x80\x04X\x01\0\0\0xQ.",
    "dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93)R.",
    "name of no text": b"\x80\x04K\x01K\x02\x93.",
    "endless name": b"\x80\x04c" + b"a" * 10_000,
    "call of a number": b"\x80\x04K\x01)R.",
    "call without arguments": b"\x80\x04ccollections\nOrderedDict\nNR.",
    "state for a dict": b"\x80\x04}}b.",
    "state for a name": b"\x80\x04ccollections\nOrderedDict\n}b.",
    "state of a module": b"\x80\x04ctorch.nn.modules.container\nModuleDict\n)\x81K\x01b.",
    "items for a list": b"\x80\x04]K\x01K\x02s.",
    "odd items": b"\x80\x04}(K\x01u.",
    "append to a dict": b"\x80\x04}K\x01a.",
    "members of a list": b"\x80\x04](K\x01\x90.",
    "tuple as key": b"\x80\x04})K\x01s.",
    "tuple in a set": b"\x80\x04\x8f()\x90.",
    "deep key": b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.",
    "colliding key": b"\x80\x04}\x8a\x0a" + b"\xff" * 9 + b"\x01Ns.",
    "long text": b"\x80\x04\x8d" + LONG + b"abc.",
    "long bytes": b"\x80\x04\x8e" + LONG + b"abc.",
    "long array": b"\x80\x05\x96" + LONG + b"abc.",
    "long frame only": b"\x80\x04\x95" + LONG,
    "huge number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "not UTF-8": b"\x80\x04\x8c\x02\xff\xfe.",
    "nested tuples": b"\x80\x04)" + b"\x85" * 100_000 + b".",
    "nested lists": b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "list in itself": b"\x80\x04]q\x00h\x00a.",
    "dict in itself": b"\x80\x04}q\x00K\x01h\x00s.",
    "tuple in itself": b"\x80\x04]q\x00(h\x00taK\x01a.",
    "many sets": b"\x80\x04(" + b"\x8f" * 1_100_000 + b"t.",
    "out of band": b"\x80\x05\x97.",
    "tensor without storage": b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89}tR.",
    "tensor call too short": b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "parameter of nothing": b"\x80\x04ctorch._utils\n_rebuild_parameter\n(N\x89}tR.",
    "device with a call": b"\x80\x04ctorch\nload\n.",
    "object array": b"\x80\x04cnumpy\ndtype\n\x8c\x02O8\x89\x88\x87R.",
    "array in place": b"\x80\x04cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.",
    "array of another class": b"\x80\x04cnumpy.core.multiarray\n_reconstruct\nccollections\nOrderedDict\n\x85R.",
    "array without bytes": b"\x80\x04cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x85RNb.",
    "bytes in a codec": b"\x80\x02c_codecs\nencode\nX\x01\0\0\0xX\x05\0\0\0rot13\x86R.",
    "no bytes in a codec": b"\x80\x02c_codecs\nencode\nX\x03\0\0\0\xe2\x82\xacX\x06\0\0\0latin1\x86R.",
    "codec bomb": b"\x80\x02c_codecs\nencode\nX\0\0\x10\0"
    + b"a" * (1 << 20)
    + b"X\x06\0\0\0latin1\x86q\0Rq\1"
    + b"0c_codecs\nencode\nh\0R" * 100
    + b".",
    "long call": b"\x80\x04ctorch\ndevice\n("
    + b"N" * 100_000
    + b"tq\0R"
    + b"0ctorch\ndevice\nh\0R" * 100_000
    + b".",
    "persistent without meta": b"\x80\x04ctorch_utils.persistence\n_reconstruct_persistent_obj\nN\x85R.",
    "persistent without state": b"\x80\x04ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
    b"}\x8c\x0aclass_name\x8c\x01xs\x85R.",
    "negative size": b"\x80\x04ctorch\nSize\nJ\xff\xff\xff\xff\x85\x85R.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_gallery(tmp_path: Path, name: str) -> None:
    path = tmp_path / "gallery.pkl"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match="gallery.pkl " + REFUSED):
        read_pickle(path)


def test_a_list_that_is_referred_to_often_is_walked_once(tmp_path: Path) -> None:
    path = tmp_path / "shared.pkl"
    path.write_bytes(b"\x80\x04](](" + b"]" * 100_000 + b"eq\0" + b"h\0" * 100_000 + b"e.")
    found = read_pickle(path)
    assert len(found) == 100_001
    assert found[0] is found[-1]


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.pkl"):
        with pytest.raises(ValueError, match=r"is not a file: give the \.pkl file itself"):
            read_pickle(path)


def test_the_error_says_what_was_met_and_where(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04]cposix\nsystem\n.")
    with pytest.raises(
        ValueError, match=r"the name 'posix.system', which is not on the allow-list.*at byte 3\. Nothing"
    ):
        read_pickle(path)
    path.write_bytes(b"\x80\x04\x82\x01.")
    with pytest.raises(ValueError, match="the instruction EXT1, at byte 2"):
        read_pickle(path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_mutations_never_run_and_give_the_one_error(
    tiny_file: Path, tmp_path: Path, seed: int, watching: Callable[[], Any], caplog: Any
) -> None:
    good = tiny_file.read_bytes()
    load_network(tiny_file)
    path = tmp_path / "mutant.pkl"
    before = set(tmp_path.iterdir()) | {path}
    errors, rng = [], random.Random(seed)
    pieces = [*CALLS, *(piece for piece in HOSTILE.values() if len(piece) < 1000)]
    with watching() as executed:
        for _ in range(1000):
            path.write_bytes(mutate_pickle(good, rng, pieces))
            try:
                load_network(path)
            except ValueError as error:
                errors.append(str(error))
    assert executed == []
    assert set(tmp_path.iterdir()) == before
    assert len(errors) > 600
    assert [e for e in errors if not re.match(f"{path} {REFUSED}", e)] == []


BOMBS = {
    "sets": b"\x80\x04(" + b"\x8f" * 300_000 + b"t.",
    "memo": b"\x80\x04N" + b"".join(b"r" + struct.pack("<I", i) for i in range(200_000)) + b".",
    "wide text": b"\x80\x04X" + struct.pack("<I", 64 << 20) + b"\xf0\x9f\x98\x80" + b"a" * ((64 << 20) - 4) + b".",
    "text twice": b"\x80\x04" + (b"X" + struct.pack("<I", 40 << 20) + b"a" * (40 << 20)) * 2 + b"\x86.",
    "arrays": b"\x80\x04(cnumpy.core.multiarray\n_reconstruct\nq\0cnumpy\nndarray\n\x85q\1R"
    + b"h\0h\1R" * 50_000 + b"t.",
    "storages": b"\x80\x04ctorch.storage\n_load_from_bytes\nq\0C\x06\x80\x02]]a.\x85q\1R" + b"h\0h\1R" * 1000 + b".",
    "giant shape": b"\x80\x04cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x85R(K\1"
    + b"(" + (b"\x8a\x06" + b"\xff" * 5 + b"\x7f") * 8 + b"tcnumpy\ndtype\n\x8c\x02f8\x85R\x89C\0tb.",
    "nested": b"\x80\x04" + b"(" * 100_000 + b"t" * 100_000 + b".",
}  # fmt: skip


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """A process that may take 1 GB more than it has reads every bomb, or refuses it; it never runs out."""
    for name, bomb in BOMBS.items():
        (tmp_path / f"{name}.pkl").write_bytes(bomb)
    code = """
import pathlib, re, resource, sys
from edm2.interop.nvlabs import load_network
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        load_network(path)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    assert [line for line in told if not re.match(f".*pkl {REFUSED}", line)] == []
    assert len(told) == len(BOMBS)
