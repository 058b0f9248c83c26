"""The callbacks' examples in docs/ema_recipes.md run as they are printed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edm2.ema.storage.manifest import read_manifest

PAGE = Path(__file__).parents[3] / "docs" / "ema_recipes.md"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def block(words: str) -> str:
    found: list[str] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (code,) = [x for x in found if words in x]
    return code


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layer(x) - labels).square().mean()}


def test_transformers() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = [{"x": torch.randn(3), "labels": torch.randn(1)} for _ in range(64)]
    names: dict[str, Any] = {"model": Line(), "train_data": data, "test_data": data[:8]}
    exec(block("TrainingArguments"), names)
    assert {s.t for s in read_manifest("snapshots").snapshots} == {32}
    assert names["trainer"].state.global_step == 32


def test_lightning() -> None:
    pl = pytest.importorskip("lightning.pytorch")

    class Fit(pl.LightningModule):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return self.layer(batch).square().mean()

        def validation_step(self, batch: torch.Tensor, _: int) -> None:
            self.log("val", self.layer(batch).square().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    loader = torch.utils.data.DataLoader(torch.randn(40, 3), 4)
    names: dict[str, Any] = {"module": Fit(), "train_loader": loader, "test_loader": loader}
    exec(block("validate_with"), names)
    assert {s.t for s in read_manifest("snapshots").snapshots} == {10, 20, 30, 40}
