"""The real Lightning Trainer: checkpoints resume exactly, validation may see the average."""

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from edm2.ema import reconstruct
from edm2.ema.callbacks.lightning import PowerEMACallback

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


class Line(LightningModule):
    def __init__(self, *, fail: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.fail = fail
        self.trained: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []

    def training_step(self, batch, _):
        return self.loss(batch)

    def on_train_batch_start(self, batch, index):
        self.trained.append(self.layer.weight.detach().clone())

    def validation_step(self, batch, _):
        self.validated.append(self.layer.weight.detach().clone())
        if self.fail and self.trained:
            raise RuntimeError("stop here")
        self.loss(batch)

    def loss(self, batch):
        x, y = batch
        return (self.layer(x) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fit(folder: Path, module: Line, callback: PowerEMACallback, epochs: int, checkpoint: Path | None = None):
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(24, 3, generator=g), torch.randn(24, 1, generator=g))
    trainer = Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", callbacks=[callback], logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 4), DataLoader(data, 12), ckpt_path=checkpoint)
    return trainer


def test_checkpoint_resumes_exactly(tmp_path: Path) -> None:
    through = PowerEMACallback(tmp_path / "through")
    fit(tmp_path, Line(), through, 4)
    half = PowerEMACallback(tmp_path / "halves", snapshot_every=6)
    fit(tmp_path, Line(), half, 2).save_checkpoint(tmp_path / "half.ckpt")
    rest = PowerEMACallback(tmp_path / "halves", snapshot_every=6)
    fit(tmp_path, Line(), rest, 4, tmp_path / "half.ckpt")
    for sigma_rel in (0.05, 0.1):
        one, other = (reconstruct(tmp_path / n, sigma_rel=sigma_rel) for n in ("through", "halves"))
        assert one.t == other.t == 24
        assert torch.equal(one.tensors["layer.weight"], other.tensors["layer.weight"])
    assert rest.ema is not None
    assert half.ema is not None
    assert rest.ema.run_id == half.ema.run_id
    assert reconstruct(tmp_path / "halves", sigma_rel=0.1, t=6).t == 6


def test_validation_sees_the_average_and_training_the_weights(tmp_path: Path) -> None:
    plain, averaged = Line(), Line()
    callback = PowerEMACallback(tmp_path / "b", (0.1,), validate_with=0.1)
    fit(tmp_path, plain, PowerEMACallback(tmp_path / "a", (0.1,)), 2)
    fit(tmp_path, averaged, callback, 2)
    assert all(torch.equal(a, b) for a, b in zip(plain.trained, averaged.trained, strict=True))
    assert callback.ema is not None
    assert torch.equal(averaged.validated[-1], callback.ema.average(0.1)["layer.weight"])
    assert torch.equal(plain.validated[-1], plain.layer.weight)
    assert torch.equal(averaged.layer.weight, plain.layer.weight)


def test_weights_come_back_after_an_error_in_validation(tmp_path: Path) -> None:
    module = Line(fail=True)
    callback = PowerEMACallback(tmp_path, (0.1,), validate_with=0.1, every=4)
    with pytest.raises(RuntimeError, match="stop here"):
        fit(tmp_path, module, callback, 2)
    assert callback.ema is not None
    assert callback.ema.t == 4
    assert torch.equal(module.validated[-1], callback.ema.average(0.1)["layer.weight"])
    reference = Line()
    fit(tmp_path / "reference", reference, PowerEMACallback(tmp_path / "r"), 1)
    assert torch.equal(module.layer.weight, reference.layer.weight)


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every 0 must be at least 1"):
        PowerEMACallback(tmp_path, every=0)
    with pytest.raises(ValueError, match="snapshot_every 5 must be a multiple of every 2"):
        PowerEMACallback(tmp_path, every=2, snapshot_every=5)


def test_a_checkpoint_without_averages_is_refused(tmp_path: Path) -> None:
    module = Line()
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(24, 3), torch.randn(24, 1)), 4))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(
        ValueError, match=r"resumes at step 12 but the checkpoint has no averages: .*start=12"
    ):
        fit(tmp_path, Line(), PowerEMACallback(tmp_path / "a"), 4, tmp_path / "plain.ckpt")
    late = PowerEMACallback(tmp_path / "b", start=12)
    fit(tmp_path, Line(), late, 4, tmp_path / "plain.ckpt")
    assert late.ema is not None
    assert (late.ema.start, late.ema.t) == (12, 24)


def test_a_second_fit_of_one_trainer_goes_on(tmp_path: Path) -> None:
    through, twice = PowerEMACallback(tmp_path / "through"), PowerEMACallback(tmp_path / "twice")
    fit(tmp_path, Line(), through, 4)
    module = Line()
    trainer = fit(tmp_path, module, twice, 2)
    ema = twice.ema
    trainer.fit_loop.max_epochs = 4
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(24, 3, generator=g), torch.randn(24, 1, generator=g))
    trainer.fit(module, DataLoader(data, 4), DataLoader(data, 12))
    assert twice.ema is ema
    assert through.ema is not None
    assert ema is not None
    assert ema.t == through.ema.t == 24
