"""A run that is asked to stop finishes its step, saves, and says so in its exit code."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import files_of, log_of, tiny_config, tiny_data

from edm2.commands.train import run
from edm2.train import Stopped, Trainer
from edm2.train.signals import stop_requests
from edm2.train.world import World

OPTIONS = [
    "--preset", "digits", "--images", "480", "--batch", "4", "--snapshot-images", "240",
    "--checkpoint-images", "240", "--log-images", "40", "--device", "cpu", "--ema.sigma-rels", "0.1",
    "--network.model-channels", "8", "--network.channel-mult", "1", "--network.num-blocks", "1",
    "--network.attn-resolutions", "8", "--network.channels-per-head", "8",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads here as in the processes that are started: sums of floats depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(images: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edm2", "train", "--data", str(images), "--out", str(out), *OPTIONS]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_log(out: Path, process: subprocess.Popen[str]) -> None:
    while not (out / "log.jsonl").exists() or not log_of(out):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_sigterm_saves_and_the_same_command_continues(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stopped"
    process = start(images, out)
    wait_for_log(out, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert "checkpoint written; the same command continues" in output
    stopped = checkpoints(out)[-1]
    assert 0 < stopped < 480
    assert stopped - 40 < log_of(out)[-1]["num_images"] <= stopped

    for folder in (out, tmp_path / "whole"):
        run("edm2 train", ["--data", str(images), "--out", str(folder), *OPTIONS])
        assert f"model:     {folder}/model.safetensors" in capsys.readouterr().out
    assert files_of(out) == files_of(tmp_path / "whole")
    assert log_of(out) == log_of(tmp_path / "whole")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler, which a process that a shell starts in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_first_signal_asks_and_the_second_acts() -> None:
    with stop_requests() as requested:
        assert not requested()
        signal.raise_signal(signal.SIGINT)
        assert requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_requests():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    answers = []

    def work() -> None:
        with stop_requests() as requested:
            answers.extend([requested(), signal.getsignal(signal.SIGTERM) == before])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False, True]


def test_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    script = (
        "import time\n"
        "from edm2.train.signals import stop_requests\n"
        "with stop_requests() as requested:\n"
        "    print('ready', flush=True)\n"
        "    while not requested(): time.sleep(0.01)\n"
        "    print('asked', flush=True)\n"
        "    time.sleep(600)\n"  # a step that never ends
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for word in ("ready", "asked"):
        assert process.stdout.readline().strip() == word
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM
    process.stdout.close()


@pytest.mark.usefixtures("interruptible")
def test_torchrun_may_pass_on_what_was_received_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    now = [100.0]
    monkeypatch.setattr("edm2.train.signals.time.monotonic", lambda: now[0])
    with stop_requests() as requested:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert requested()
        now[0] += 6
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_processes_whose_launcher_was_killed_save_and_stop(tmp_path: Path) -> None:
    orphan = World(rank=0, size=1, device=torch.device("cpu"), launcher=-1)
    assert not World(rank=0, size=1, device=torch.device("cpu"), launcher=os.getppid()).is_orphan
    trainer = Trainer(tiny_config(), tiny_data(), tmp_path / "run", world=orphan)
    with pytest.raises(
        Stopped, match="stopped at 8 of 160 images, checkpoint written; the same command continues"
    ):
        trainer.run(quiet=True)
