"""The examples in README.md and docs/ema.md run as they are printed."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import edm2.ema
from edm2.ema.maths import planning
from edm2.ema.storage.snapshots import read_manifest

ROOT = Path(__file__).parents[2]


def examples(page: str) -> list[str]:
    blocks: list[str] = re.findall(
        r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL
    )
    return [block for block in blocks if "edm2.ema" in block]


def train_step(model: nn.Module, batch: torch.Tensor) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.001 * torch.randn(p.shape))


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the examples take for granted, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return {
        "torch": torch,
        "edm2": edm2,
        "model": nn.Linear(4, 4),
        "loader": range(4000),
        "train_step": train_step,
        "evaluate": lambda model: 0.0,
    }


@pytest.mark.parametrize("page", ["README.md", "docs/ema.md"])
def test_first_example(page: str, names: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    exec(examples(page)[0], names)
    assert {s.t for s in read_manifest("snapshots").snapshots} == {1000, 2000, 3000, 4000}
    assert "relative error" in capsys.readouterr().out


def test_planning_example(names: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_STEPS", 30)  # a short search will do here
    exec(examples("docs/ema.md")[1], names)
    planning._found.cache_clear()
    plan = names["plan"]
    assert isinstance(plan, edm2.ema.Plan)
    assert plan.storage_bytes(100_000_000) <= 6 << 30
    assert isinstance(names["ema"], edm2.ema.PowerEMA)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_example_of_several_processes(names: dict[str, object], tmp_path: Path) -> None:
    # Two processes are in sharded_worker.py; this is the text itself.
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        exec(examples("docs/ema.md")[2], names)
    finally:
        torch.distributed.destroy_process_group()
    assert len(read_manifest("snapshots").snapshots) == 8
    state = torch.load("4000.pt", weights_only=True)
    assert state["ema"]["t"] == 4000
    assert set(state["model"]) == {"weight", "bias"}


def test_example_of_checkpoints(names: dict[str, object]) -> None:
    Path("checkpoints").mkdir()
    for step in range(1000, 20_001, 1000):
        torch.save(nn.Linear(4, 4).state_dict(), f"checkpoints/{step}.pt")
    with pytest.warns(edm2.ema.AccuracyWarning):  # these weights have nothing to do with each other
        exec(examples("docs/ema.md")[3], names)
    assert isinstance(names["merged"], edm2.ema.Reconstruction)
