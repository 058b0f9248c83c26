"""Folders of snapshots: what is written, read back, and refused."""

import copy
import hashlib
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mutations import VALUES, places
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from edm2.ema import PowerEMA, gamma_to_sigma_rel, reconstruct, reconstruct_many
from edm2.ema import stored_averages as module
from edm2.ema.storage.manifest import read_manifest
from edm2.ema.storage.snapshots import damaged


def train(
    folder: Path, *, run_id: str = "run", steps: int = 40, every: int = 10, **options: object
) -> PowerEMA:
    """Random walk of a small model, with snapshots."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    ema = PowerEMA(model, run_id=run_id, clock="steps")
    for t in range(1, steps + 1):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn(p.shape, generator=generator))
        model[1].num_batches_tracked += 1
        ema.update(t)
        if t % every == 0:
            ema.snapshot(folder, **options)  # type: ignore[arg-type]
    return ema


def reseal(folder: Path, content: dict[str, object]) -> None:
    """Write a changed manifest with a checksum that fits, as damage cannot but a stranger can."""
    content.pop("checksum", None)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_equal_runs_write_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(tmp_path / name, metadata={"model": {"width": 4}})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) == 9


def test_files_are_safetensors_that_say_what_they_are(tmp_path: Path) -> None:
    ema = train(tmp_path)
    snapshot = read_manifest(tmp_path).snapshots[-1]
    with safe_open(tmp_path / snapshot.file, framework="pt") as file:
        metadata = file.metadata()
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert (metadata["run_id"], metadata["t"], metadata["dtype"]) == ("run", "40", "fp32")
    for name, tensor in ema.average(snapshot.sigma_rel).items():
        assert torch.equal(stored[name], tensor)
    assert stored["1.num_batches_tracked"] == 40


def test_stored_average_is_given_back_bit_for_bit(tmp_path: Path) -> None:
    ema = train(tmp_path)
    result = reconstruct(tmp_path, sigma_rel=0.1)
    for name, tensor in ema.average(0.1).items():
        torch.testing.assert_close(result.tensors[name], tensor, rtol=1e-6, atol=1e-7)
    assert result.tensors["1.num_batches_tracked"] == 40
    assert result.t == 40


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-7), ("fp16", 3e-4), ("bf16", 3e-3)])
def test_stored_type_has_the_rounding_that_the_manifest_says(
    tmp_path: Path, dtype: str, bound: float
) -> None:
    ema = train(tmp_path, dtype=dtype)
    result = reconstruct(tmp_path, sigma_rel=0.1)
    exact = ema.average(0.1)
    error = sum((result.tensors[n] - x).square().sum() for n, x in exact.items()) ** 0.5
    norm = sum(x.square().sum() for x in exact.values()) ** 0.5
    stated = read_manifest(tmp_path).snapshots[-1].rounding
    assert error / norm < bound
    if dtype != "fp32":
        assert float(error / norm) == pytest.approx(stated, rel=1e-3)


def test_resumed_run_writes_its_folder_again_identically(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    train(tmp_path / "resumed")
    train(tmp_path / "resumed")
    assert contents(tmp_path / "whole") == contents(tmp_path / "resumed")


def a_run(steps: int, *, seed: int = 0, state: dict[str, object] | None = None) -> Iterator[PowerEMA]:
    """A tracker after each step of a random walk from zero, or from a state with its weights."""
    model = nn.Linear(3, 3)
    for p in model.parameters():
        nn.init.zeros_(p)
    ema = PowerEMA(model, run_id="run")
    if state is not None:
        model.load_state_dict(state["model"])  # type: ignore[arg-type]
        ema.load_state_dict(state["ema"])  # type: ignore[arg-type]
        yield ema
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            model.weight.add_(torch.randn(3, 3, generator=generator))
        ema.update(ema.t + 1)
        yield ema


def test_a_tracker_that_was_not_resumed_deletes_no_snapshot(tmp_path: Path) -> None:
    for ema in a_run(10):
        ema.snapshot(tmp_path)
    ema.snapshot(tmp_path, dtype="fp16")  # its own one may be written anew
    before = contents(tmp_path)
    for ema in a_run(10, seed=1):
        with pytest.raises(
            ValueError, match=r"of run 'run' from t \d+ to 10, .* load_state_dict; .* another folder"
        ):
            ema.snapshot(tmp_path)
        assert contents(tmp_path) == before
    for ema in a_run(5):
        ema.snapshot(tmp_path)  # equal weights give equal files
        assert contents(tmp_path) == before


def test_a_resumed_run_goes_back_to_its_checkpoint(tmp_path: Path) -> None:
    for ema in a_run(8):
        ema.snapshot(tmp_path)
        if ema.t == 4:
            state = copy.deepcopy({"ema": ema.state_dict(), "model": ema._model.state_dict()})
    before = contents(tmp_path)
    (resumed,) = a_run(0, state=state)
    resumed.snapshot(tmp_path)
    assert contents(tmp_path) == before, "equal weights keep what came after them"
    _, other = a_run(1, state=state, seed=1)
    with pytest.warns(
        UserWarning, match="went back to t 5 and now takes another course; the 6 snapshots after"
    ):
        other.snapshot(tmp_path)
    assert [s.t for s in read_manifest(tmp_path).snapshots] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert len(contents(tmp_path)) == 11


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    train(tmp_path, run_id="one")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds snapshots of run 'one', this is run 'two'"):
        train(tmp_path, run_id="two")
    assert contents(tmp_path) == before


def test_other_metadata_is_refused(tmp_path: Path) -> None:
    ema = train(tmp_path, metadata={"width": 4, "depth": 1})
    with pytest.raises(ValueError, match=r"differs in \['depth'\]"):
        ema.snapshot(tmp_path, metadata={"width": 4, "depth": 2})
    with pytest.raises(ValueError, match="changes when written as JSON"):
        ema.snapshot(tmp_path, metadata={"shape": (1, 2)})
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        ema.snapshot(tmp_path, metadata={"shape": object()})


def test_damaged_files_are_named(tmp_path: Path) -> None:
    train(tmp_path)
    path = tmp_path / read_manifest(tmp_path).snapshots[2].file
    whole = path.read_bytes()
    for content, message in [
        (whole[:-10], "is damaged: it has"),
        (whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:], "is damaged: its data"),
        (whole.replace(b'"run_id":"run"', b'"run_id":"ruN"'), "belongs to run 'ruN'"),
        (whole.replace(b'"t":"20"', b'"t":"21"'), "is damaged: its header"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            reconstruct(tmp_path, sigma_rel=0.13)
        assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match="missing"):
        reconstruct(tmp_path, sigma_rel=0.13)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sigma_rel": "0.1"}, "sigma_rel, which is a str"),
        ({"num_bytes": 0.5}, "num_bytes, which is a float"),
        ({"t": True}, "t, which is a bool"),
        ({"t": -1}, "t, which is -1 and not after start 0"),
        ({"gamma": 5.0}, "gamma, which is 5.0 and does not fit sigma_rel 0.05"),
        ({"norm": None}, "norm, which is a NoneType"),
        ({"rounding": 1e300}, "rounding, which is 1e.300, out of range"),
        ({"distance": -1}, "distance, which is -1, out of range"),
        ({"dtype": "fp64"}, "dtype, which is 'fp64'"),
        ({"file": "../x.safetensors"}, "file, which is not in this folder"),
    ],
)
def test_entries_of_another_kind_are_named(tmp_path: Path, change: dict[str, object], told: str) -> None:
    model = nn.Linear(2, 2)
    ema = PowerEMA(model)
    ema.update(1)
    ema.snapshot(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["snapshots"][0] |= change
    reseal(tmp_path, content)
    with pytest.raises(ValueError, match=rf"manifest.json is damaged \(entry {told}\): restore it"):
        read_manifest(tmp_path)
    content["snapshots"], content["metadata"] = [], "none"
    reseal(tmp_path, content)
    with pytest.raises(ValueError, match=r"damaged \(entry metadata, which is a str\)"):
        read_manifest(tmp_path)


def test_no_value_in_a_manifest_ends_in_a_traceback(tmp_path: Path) -> None:
    train(tmp_path, steps=20)
    text = (tmp_path / "manifest.json").read_text()
    for path in places(json.loads(text)):
        for value in VALUES:
            content = json.loads(text)
            parent = content
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = value
            reseal(tmp_path, content)
            message = ""
            try:
                found = reconstruct_many(tmp_path, [0.08], warn_above=math.inf, read=False)
            except (ValueError, FileNotFoundError) as error:
                message = str(error)
            assert str(tmp_path) in message or math.isfinite(found[0].expected_error), (path, value, message)


@pytest.mark.parametrize(("name", "value"), [("t", 30), ("gamma", 5.0), ("norm", 9.0), ("rounding", 0.5)])
def test_a_changed_number_in_the_manifest_is_seen(tmp_path: Path, name: str, value: float) -> None:
    train(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["snapshots"][1][name] = value
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="its checksum does not match"):
        reconstruct(tmp_path, sigma_rel=0.13)
    # A stranger who knows how to write the checksum still has to change the files' own headers.
    if name == "gamma":
        content["snapshots"][1]["sigma_rel"] = float(gamma_to_sigma_rel(value))
    reseal(tmp_path, content)
    if name in ("t", "gamma"):
        told = f"was written with {name} .*, but manifest.json says {value}: restore the manifest"
        with pytest.raises(ValueError, match=told):
            reconstruct(tmp_path, sigma_rel=0.13)
        assert len([*damaged(tmp_path, read_manifest(tmp_path), read=False)]) == 1


def test_folders_of_earlier_versions_open_with_a_warning(tmp_path: Path) -> None:
    ema = train(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    del content["checksum"]
    for entry in content["snapshots"]:
        entry["data_sum"] = entry["data_sum"][:16]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="has no checksum because an earlier edm2 wrote it"):
        result = reconstruct(tmp_path, sigma_rel=0.1)
    torch.testing.assert_close(result.tensors["0.weight"], ema.average(0.1)["0.weight"])
    ema.update(50)
    with pytest.warns(UserWarning, match="has no checksum"):
        ema.snapshot(tmp_path)
    reconstruct(tmp_path, sigma_rel=0.1)  # written anew with a checksum


def test_swapped_blocks_are_seen(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    ema = PowerEMA(model, (0.1,))
    ema.update(1)
    (path,) = ema.snapshot(tmp_path)
    whole, begin = path.read_bytes(), path.stat().st_size - 64 * 64 * 4
    rng = random.Random(0)
    for _ in range(60):
        a, b = (begin + 512 * i for i in sorted(rng.sample(range(32), 2)))
        swapped = bytearray(whole)
        swapped[a : a + 512], swapped[b : b + 512] = whole[b : b + 512], whole[a : a + 512]
        path.write_bytes(swapped)
        with pytest.raises(ValueError, match="is damaged: its data is not what was written"):
            reconstruct(tmp_path, sigma_rel=0.1)


def test_snapshots_that_vanish_are_told_of(tmp_path: Path) -> None:
    ema = train(tmp_path / "run")
    lost = tmp_path / "run" / read_manifest(tmp_path / "run").snapshots[0].file
    lost.unlink()
    ema.update(50)
    with pytest.warns(UserWarning, match=rf"1 of 8 snapshot files are missing or cut short \({lost.name}"):
        ema.snapshot(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    ema.update(60)
    with pytest.warns(UserWarning, match="this run wrote snapshots there up to t 50: something deleted"):
        ema.snapshot(tmp_path / "run")


def test_a_restart_passes_over_times_that_were_thinned_out(tmp_path: Path) -> None:
    for ema in a_run(10):
        ema.snapshot(tmp_path, keep=6)
    before = contents(tmp_path)
    written = {ema.t: ema.snapshot(tmp_path, keep=6) for ema in a_run(10)}
    assert contents(tmp_path) == before
    kept = {s.t for s in read_manifest(tmp_path).snapshots}
    assert {t for t, paths in written.items() if paths} == kept
    assert len(kept) == 3
    with pytest.raises(ValueError, match="from other weights or at another time, would delete"):
        [ema.snapshot(tmp_path, keep=6) for ema in a_run(10, seed=1)]
    assert contents(tmp_path) == before


def test_a_folder_can_be_read_while_a_run_thins_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = a_run(400)
    for _ in range(4):
        next(steps).snapshot(tmp_path, keep=4)
    open_as_before, opened = module.open_snapshot, 0

    def after_a_write(*args: object) -> object:
        nonlocal opened
        opened += 1
        if opened % 7 == 0:
            next(steps).snapshot(tmp_path, keep=4)  # deletes what the reader is about to open
        return open_as_before(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "open_snapshot", after_a_write)
    for _ in range(30):
        assert reconstruct(tmp_path, sigma_rel=0.07, warn_above=9).coefficients
    assert opened > 130, "some were opened again"


def test_damaged_manifests_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a snapshot folder"):
        reconstruct(tmp_path, sigma_rel=0.13)
    ema = train(tmp_path)
    manifest = tmp_path / "manifest.json"
    content = json.loads(manifest.read_text())
    for text, message in [
        ("{", "is damaged"),
        ("{}", "is not a manifest"),
        (json.dumps({**content, "snapshots": [{"t": 1}]}), "its checksum does not match"),
        ("[" * 200_000, "nested deeper than"),
        (json.dumps(content).replace("40", "1e999", 1), "is damaged"),
    ]:
        manifest.write_text(text)
        with pytest.raises(ValueError, match=message):
            reconstruct(tmp_path, sigma_rel=0.13)
    manifest.unlink()
    with pytest.raises(ValueError, match=r"holds 8 snapshot files .* but no manifest.json"):
        ema.snapshot(tmp_path)


def test_time_beyond_the_last_snapshot_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ValueError, match="t 41 is beyond the last snapshot"):
        reconstruct(tmp_path, sigma_rel=0.13, t=41)


def test_snapshot_needs_a_finite_average(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    ema = PowerEMA(model)
    with pytest.raises(ValueError, match="before the first update"):
        ema.snapshot(tmp_path)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    ema.update(1)
    with pytest.raises(FloatingPointError, match="average of 'weight' is not finite"):
        ema.snapshot(tmp_path)


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype 'fp8' is not known: choose fp32, bf16 or fp16"):
        train(tmp_path, dtype="fp8")


def test_names_are_clean_and_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    ema = PowerEMA(nn.DataParallel(model), (0.1,))
    assert ema.names == ["embed.weight"]
    ema.update(1)
    for whole in ema.average_on_first(0.1, ["head.weight", "embed.weight"]):
        assert torch.equal(whole, ema.average(0.1)["embed.weight"])
    (path,) = ema.snapshot(tmp_path)
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["embed.weight"]
    result = reconstruct(tmp_path, sigma_rel=0.1)
    Tied().load_state_dict(result.tensors)
    assert result.tensors["head.weight"] is result.tensors["embed.weight"]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.int64,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_buffers_of_any_type_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("codes", torch.tensor([[0, 1, 1], [2, 1, 3]]).to(dtype))
    model.register_buffer("code", torch.tensor(1).to(dtype))
    ema = PowerEMA(model)
    ema.update(1)
    paths = ema.snapshot(tmp_path)
    tensors = reconstruct(tmp_path, 0.1).tensors
    official = load_file(paths[0])
    for name in ("codes", "code"):
        for found in (tensors[name], official[name]):
            assert found.dtype == dtype
            assert found.tolist() == getattr(model, name).tolist()
