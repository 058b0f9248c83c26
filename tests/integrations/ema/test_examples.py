"""The examples run and show what they say."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[3] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_example_finds_a_better_length_and_a_close_reconstruction(tmp_path: Path) -> None:
    losses = load("ema_plain").train_and_compare(800, tmp_path / "snapshots")
    assert losses["sigma_rel 0.15"] < losses["weights as they are"]
    assert losses["error"] < 2e-3


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_lora_example_averages_adapters_only(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    losses = load("ema_lora_peft").main()
    assert min(losses, key=losses.get) != "weights as they are"
    assert "averaged: 4 of 8 tensors" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_accelerate_example_resumes_exactly(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    train = load("ema_accelerate").train
    through = train(tmp_path / "through", 32, cpu=True)
    train(tmp_path / "halves", 16, cpu=True)
    resumed = train(tmp_path / "halves", 32, resume=True, cpu=True)
    for sigma_rel in (0.05, 0.1):
        one, other = (e.average(sigma_rel) for e in (through, resumed))
        assert all(torch.equal(other[name], value) for name, value in one.items())


@pytest.mark.slow
def test_accelerate_example_runs_in_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0",
        str(EXAMPLES / "ema_accelerate.py"), "--out", str(tmp_path), "--steps", "16",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "sigma_rel 0.075 at step 16" in done.stdout


def test_language_model_example_compares_merges_with_real_decays(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--steps", "40", "--width", "16", "--layers", "1", "--batch", "4", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["ema_merge_checkpoints.py", *words])
    load("ema_merge_checkpoints").main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert [line[0] for line in lines] == ["5%", "10%", "20%", "40%"]
    assert all(0 < float(loss) < 6 for line in lines for loss in line[1:])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_lightning_example_resumes_exactly(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    lines = (EXAMPLES / "lightning_denoiser.py").read_text().splitlines()
    assert sum(bool(line) for line in lines) <= 80
    script = load("lightning_denoiser")
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    script.main(tmp_path / "run", 12, val_check_interval=6, **quiet)
    assert (tmp_path / "run" / "digits.png").exists()
    assert (tmp_path / "run" / "snapshots" / "manifest.json").exists()

    def fit(steps: int, checkpoint: Path | None = None) -> tuple[torch.nn.Module, object]:
        torch.manual_seed(0)
        data = script.Digits()
        module = script.DenoiserModule(script.measure_coding(data.images))
        average = script.PowerEMACallback(tmp_path / f"{steps} {checkpoint is None}")
        options = {**quiet, "enable_checkpointing": False, "limit_val_batches": 0}
        trainer = script.Trainer(max_steps=steps, callbacks=[average], **options)
        trainer.fit(module, data, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module, average.ema

    whole, halves = fit(8), fit(4)
    resumed = fit(8, tmp_path / "4.ckpt")
    assert halves[0].state_dict().keys() == resumed[0].state_dict().keys()
    for one, other in zip(whole[0].state_dict().values(), resumed[0].state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert whole[1].average(0.1).keys() == resumed[1].average(0.1).keys()
