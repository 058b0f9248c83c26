"""Options that change how a run is made, and not what it is."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import files_of, log_of, tiny_config, tiny_data

from edm2.train import Stopped, Trainer, train
from edm2.train import saver as saver_module
from edm2.train.saver import Saver


def run(out: Path, **changes: Any) -> Path:
    train(tiny_config(**changes), out, dataset=tiny_data(), quiet=True)
    return out


def tensors_of(out: Path) -> dict[str, str]:
    """Digests of everything but the settings, which differ on purpose."""
    return {n: d for n, d in files_of(out).items() if n.endswith(".safetensors")}


@pytest.mark.parametrize(
    "changes", [{"checkpoint_activations": True}, {"workers": 0}, {"workers": 5}, {"loss_scaling": 64.0}]
)
def test_same_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain, other = run(tmp_path / "plain"), run(tmp_path / "other", **changes)
    assert tensors_of(other) == tensors_of(plain)
    assert log_of(other) == log_of(plain)


def test_activations_are_forgotten(tmp_path: Path) -> None:
    sizes = {}
    for wanted in (False, True):
        trainer = Trainer(
            tiny_config(checkpoint_activations=wanted, workers=0), tiny_data(), tmp_path / str(wanted)
        )
        kept: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t
        )
        with hooks:
            trainer.denoiser(torch.randn(8, 1, 4, 4), torch.ones(8), torch.arange(8) % 3)
        sizes[wanted] = sum(kept)
    assert sizes[True] < 0.7 * sizes[False]


def test_scaled_loss_follows_float32_in_float16(tmp_path: Path) -> None:
    plain = log_of(run(tmp_path / "float32"))
    half = log_of(run(tmp_path / "float16", dtype="float16", loss_scaling=16.0))
    assert [r["loss"] for r in half] == pytest.approx([r["loss"] for r in plain], rel=0.01)
    assert [r["grad_norm"] for r in half] == pytest.approx([r["grad_norm"] for r in plain], rel=0.05)


def test_every_third_checkpoint_stays(tmp_path: Path) -> None:
    out = run(tmp_path / "run", checkpoint_images=16, keep_every=3, keep_checkpoints=1)
    assert sorted(int(p.name) for p in (out / "checkpoints").iterdir()) == [48, 96, 144, 160]


def test_time_limit_saves_and_continues(tmp_path: Path) -> None:
    whole, out = run(tmp_path / "whole"), tmp_path / "pieces"
    for _ in range(3):
        with pytest.raises(Stopped, match="checkpoint written; the same command continues"):
            run(out, max_hours=1e-9)
    assert log_of(out)[-1]["num_images"] == 16  # one step each, 8 images a step
    run(out)
    assert tensors_of(out) == tensors_of(whole)


def test_a_checkpoint_holds_its_origin(tmp_path: Path) -> None:
    out = run(tmp_path / "run", max_hours=5.0)
    state = json.loads((out / "checkpoints/000000000160/state.json").read_text())
    assert state["settings"]["max_hours"] == 5.0
    assert {"edm2", "torch", "numpy"} <= state["versions"].keys()
    assert state["git"] is None or len(state["git"]["commit"]) == 40


class Slow:
    """A writer that takes its time, and fails if told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.written = error, []  # type: ignore[var-annotated]

    def __call__(self, folder: Path, num_images: int, *_: Any, **__: Any) -> None:
        time.sleep(0.1)
        if self.error is not None:
            raise self.error
        self.written.append(num_images)


def test_saving_goes_on_beside_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = Slow()
    monkeypatch.setattr(saver_module, "save_checkpoint", slow)
    with Saver(tmp_path, keep=1) as saver:
        saver.save(8, {}, {}, role="regular")
        assert slow.written == []  # it returned before the writing was done
        saver.save(16, {}, {}, role="regular")
        assert slow.written == [8]  # one at a time
    assert slow.written == [8, 16]  # and all before the end


def use(saver: Saver) -> None:
    with saver:
        saver.save(8, {}, {}, role="regular")
        raise KeyError("the first error counts")


def test_errors_of_the_thread_come_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(saver_module, "save_checkpoint", Slow(OSError(28, "disk full")))
    saver = Saver(tmp_path, keep=1)
    saver.save(8, {}, {}, role="regular")
    with pytest.raises(OSError, match="disk full"):
        saver.save(16, {}, {}, role="regular")
    saver.save(16, {}, {}, role="regular")
    with pytest.raises(OSError, match="disk full"):
        saver.wait()
    with pytest.raises(KeyError, match="the first error counts"):
        use(saver)
