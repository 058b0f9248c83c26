"""A folder that is thinned out as the run goes on: never too many, always the planned error."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edm2.ema import PLANS, PowerEMA, reconstruct
from edm2.ema.maths.plans import best_errors, spread, times_to_keep
from edm2.ema.storage import snapshots as snapshot_folder
from edm2.ema.storage.manifest import read_manifest

WIDTHS = spread((0.03, 0.25), 25)


def worst(times: list[float], sigma_rels: tuple[float, ...]) -> float:
    return float(best_errors([t / times[-1] for t in times], sigma_rels, 1.0, WIDTHS, "fp32")[0].max())


@pytest.mark.parametrize(
    ("sigma_rels", "count", "most"),
    [((0.05, 0.1), 12, 1.2), ((0.05, 0.1), 4, 1.2), (PLANS["lean"].sigma_rels, 4, 1.9)],
)
def test_a_run_of_unknown_length_keeps_about_the_error_of_even_times(
    sigma_rels: tuple[float, ...], count: int, most: float
) -> None:
    planned = worst((np.arange(1, count + 1) / count).tolist(), sigma_rels)
    times: list[float] = []
    for t in range(1, 81):
        times = times_to_keep([*times, float(t)], sigma_rels, count)
        assert len(times) == min(t, count)
        assert times[-1] == t
        if t > 5 * count:
            assert worst(times, sigma_rels) < most * planned


def test_what_is_given_up_hurts_least_now_and_soon() -> None:
    times = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    kept = times_to_keep(times, (0.05, 0.1), 5)

    def error_without(t: float) -> float:
        before = [x for x in times[:-1] if x != t]
        return max(worst([*before, 6 * soon], (0.05, 0.1)) for soon in (1.0, 1.1**0.5, 1.1))

    assert set(times) - set(kept) == {min(times[:-1], key=error_without)}


def test_a_folder_is_never_fuller_when_the_tracks_change(tmp_path: Path) -> None:
    tracked(tmp_path, 40, keep=8)
    ema = PowerEMA(nn.Linear(5, 4), (0.05,), run_id="run")
    for t in range(50, 100, 10):
        ema.update(t)
        ema.snapshot(tmp_path, keep=5)
        assert len(read_manifest(tmp_path).snapshots) <= 5
    assert len(read_manifest(tmp_path).snapshots) == 5


def tracked(folder: Path, steps: int, keep: int) -> PowerEMA:
    model = nn.Linear(5, 4)
    ema = PowerEMA(model, run_id="run")
    generator = torch.Generator().manual_seed(0)
    for t in range(1, steps + 1):
        with torch.no_grad():
            model.weight.add_(0.01 * torch.randn(4, 5, generator=generator))
        ema.update(t)
        if t % 5 == 0:
            ema.snapshot(folder, keep=keep)
            assert len(list(folder.glob("*.safetensors"))) == len(read_manifest(folder).snapshots) <= keep
    return ema


def test_folder_never_holds_more_than_asked(tmp_path: Path) -> None:
    ema = tracked(tmp_path, 100, keep=9)
    snapshots = read_manifest(tmp_path).snapshots
    assert len(snapshots) == 8
    assert {s.t for s in snapshots} >= {100}
    stored = reconstruct(tmp_path, sigma_rel=0.05)
    torch.testing.assert_close(stored.tensors["weight"], ema.average(0.05)["weight"], rtol=1e-6, atol=1e-7)
    assert reconstruct(tmp_path, sigma_rel=0.08, warn_above=1.0).expected_error < 0.05


def test_too_few_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep 1 has no room for the 2 tracks of one time"):
        tracked(tmp_path, 5, keep=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("killed_at", ["write_manifest", "remove_strays"])
def test_a_kill_while_thinning_leaves_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    ema = tracked(tmp_path, 40, keep=6)
    before = read_manifest(tmp_path)
    ema.update(45)
    calls = []
    original = getattr(snapshot_folder, killed_at)

    def killed(*args: object) -> None:
        calls.append(args)
        if killed_at == "remove_strays" and len(calls) == 1:
            return original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot_folder, killed_at, killed)
    with pytest.raises(KeyboardInterrupt):
        ema.snapshot(tmp_path, keep=6)
    monkeypatch.undo()
    after = read_manifest(tmp_path)
    assert len(after.snapshots) <= 6
    assert (after == before) == (killed_at == "write_manifest")
    assert reconstruct(tmp_path, sigma_rel=0.1, warn_above=1.0).t == (40 if after == before else 45)
    ema.update(50)
    ema.snapshot(tmp_path, keep=6)
    names = {s["file"] for s in json.loads((tmp_path / "manifest.json").read_text())["snapshots"]}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == names
