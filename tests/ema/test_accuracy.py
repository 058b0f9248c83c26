"""A small run of benchmarks/ema_accuracy.py: errors of ours against the exact averages and the plain solve."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

STEPS = 200
NAMES = ("walk", "digits")


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("ema_accuracy")


@pytest.fixture(scope="module")
def paths(bench: ModuleType) -> dict[str, Any]:
    return {"walk": bench.make_path("walk", STEPS, 3000), "digits": bench.training(STEPS, batch=4)}


@pytest.fixture(scope="module")
def cases(bench: ModuleType, paths: dict[str, Any]) -> list[Any]:
    found = []
    for name, path in paths.items():
        for arrangement, every in (("pair, 16 times", 1), ("pair, 4 times", 5), ("compact", 5), ("lean", 1)):
            found += bench.ours(name, path, every, arrangement, ("fp32", "bf16"))
    return found


@pytest.mark.slow
def test_tracks_are_exact(bench: ModuleType, paths: dict[str, Any], tmp_path: Path) -> None:
    for name, path in paths.items():
        for every in (1, 10, 100):
            _, own = bench.track(path, every, bench.PAIR, (1.0,), tmp_path / f"{name}{every}", ("fp32",))
            assert max(own.values()) < 1e-6


@pytest.mark.slow
def test_reconstruction_is_never_worse_than_the_plain_solve(cases: list[Any]) -> None:
    # The least error to expect: one draw of the rounding of bf16 can be some percent in the plain solve's favour.
    assert len(cases) > 200
    for case in cases:
        assert case.error <= 1.12 * case.plain + 2e-7, case


def test_estimate_is_above_the_error_and_near_it(bench: ModuleType, cases: list[Any]) -> None:
    below, near, _ = bench.calibration(cases)
    assert below >= 0.95
    assert near >= 0.7


@pytest.mark.parametrize("name", NAMES)
def test_at_equal_bytes_it_is_five_times_closer_than_the_pair(name: str, cases: list[Any]) -> None:
    def worst(arrangement: str) -> float:
        return max(
            c.plain if arrangement.startswith("pair") else c.error
            for c in cases
            if (c.path, c.arrangement, c.dtype, c.mid_run) == (name, arrangement, "fp32", False)
        )

    assert worst("compact") < worst("pair, 4 times") / 5  # 8 files each
    assert worst("lean") < worst("pair, 16 times") / 5  # 16 files against 32
    assert np.isfinite(worst("lean"))
