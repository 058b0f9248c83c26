"""What the log says about all weights together, and the memory that the progress line shows."""

import gc
import mmap
from pathlib import Path

import pytest
import torch
from tiny_run import log_of, tiny_config, tiny_data

from edm2.train import Trainer, train
from edm2.train.memory import peak_bytes, size_text, used_bytes
from edm2.train.norms import UpdateNorm, total_norm

CPU = torch.device("cpu")


def test_norms_of_all_weights_as_of_one() -> None:
    weights = [torch.tensor([[3.0], [0.0]]), torch.tensor(4.0)]
    assert float(total_norm(weights)) == 5
    update = UpdateNorm(weights)
    weights[0] += torch.tensor([[0.0], [2.0]])
    weights[1] -= 1.5
    assert update.measure().tolist() == [5, 2.5]


def test_the_log_has_the_norms_of_its_step(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(num_images=48), tiny_data(), tmp_path / "run")
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []

    def look(trainer: Trainer) -> None:
        after.append(torch.cat([p.detach().flatten() for p in trainer.denoiser.parameters()]))

    step = trainer.optimizer.step

    def watched() -> None:
        before.append(torch.cat([p.detach().flatten() for p in trainer.denoiser.parameters()]))
        step()

    trainer.optimizer.step = watched  # type: ignore[method-assign]
    trainer.run(quiet=True, on_step=look)
    log = log_of(tmp_path / "run")
    assert [record["num_images"] for record in log] == [16, 32, 48]
    assert [r["weight_norm"] for r in log] == pytest.approx([float(w.norm()) for w in before[1::2]], rel=1e-5)
    moved = [float((b - a).norm()) for a, b in zip(before[1::2], after[1::2], strict=True)]
    assert [r["update_norm"] for r in log] == pytest.approx(moved, rel=1e-5)


def test_recording_magnitudes_changes_no_norm(tmp_path: Path) -> None:
    for name in (True, False):
        config = tiny_config(num_images=32, record_magnitudes=name)
        train(config, tmp_path / str(name), dataset=tiny_data(), quiet=True)
    assert log_of(tmp_path / "True") == log_of(tmp_path / "False")


def test_memory_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    before = used_bytes(CPU)
    # Mapped by itself: the allocator may hand out memory that earlier tests freed.
    large = torch.frombuffer(mmap.mmap(-1, 200_000_000), dtype=torch.uint8).fill_(1)
    grown = used_bytes(CPU) - before
    assert 150e6 < grown < 250e6
    assert used_bytes(CPU) <= peak_bytes(CPU) * 1.05
    del large

    def missing(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    assert used_bytes(CPU) == peak_bytes(CPU)
    monkeypatch.undo()
    assert [size_text(n) for n in (0, 999, 1500, 2.34e9, 5e15)] == [
        "0 bytes", "999 bytes", "1.5 kB", "2.34 GB", "5e+03 TB",
    ]  # fmt: skip


def test_the_progress_line_shows_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(num_images=16), tmp_path / "run", dataset=tiny_data())
    line = capsys.readouterr().err
    assert "loss " in line
    assert "memory " in line
    assert line.strip().endswith("B")
