"""Several processes train as one does, and their number may change between sessions (gloo, on the CPU)."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from tiny_run import files_of, log_of, tiny_config

from edm2.diffusion import build_denoiser
from edm2.train.checkpoint import StoredTensors
from edm2.train.parallel import shard
from edm2.train.world import World, join_world, set_gpu_policy

WORKER = str(Path(__file__).with_name("distributed_worker.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


TINY = [
    "--preset", "digits", "--batch", "4", "--device", "cpu", "--network.model-channels", "8",
    "--network.channel-mult", "1", "--network.num-blocks", "1", "--network.attn-resolutions", "8",
    "--network.channels-per-head", "8", "--ema.sigma-rels", "0.1", "--snapshot-images", "100000",
]  # fmt: skip


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    done = run([sys.executable, WORKER, str(folder)])
    assert done.returncode == 0, done.stderr
    return folder


NAMES = [
    f"{kind}{end}" for kind in ("ddp", "fsdp") for end in ("", "-micro", "-then-1", "-then-2", "-then-4")
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_one_process(runs: Path, name: str) -> None:
    one, other = log_of(runs / "one"), log_of(runs / name)
    for key in ("num_images", "learning_rate", "nonfinite_steps"):
        assert [record[key] for record in other] == [record[key] for record in one]
    for key in ("loss", "grad_norm", "weight_norm"):
        wanted = [record[key] for record in one]
        assert [record[key] for record in other] == pytest.approx(wanted, rel=1e-5)
    # Adam divides by gradients, the smallest of which are little more than rounding.
    wanted = [record["update_norm"] for record in one]
    assert [record["update_norm"] for record in other] == pytest.approx(wanted, rel=1e-3)
    # The same averages, times and names are stored; with float32's rounding in another order.
    snapshots = [sorted((runs / n / "snapshots").glob("*.safetensors")) for n in ("one", name)]
    for path, twin in zip(*snapshots, strict=True):
        tensors, others = safetensors.torch.load_file(path), safetensors.torch.load_file(twin)
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(others[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_stop_on_any_process_changes_no_byte(runs: Path, name: str) -> None:
    assert files_of(runs / f"{name}-then-2") == files_of(runs / name)
    assert log_of(runs / f"{name}-then-2") == log_of(runs / name)


@pytest.mark.slow
def test_each_process_stores_its_rows(runs: Path) -> None:
    found = sorted((runs / "fsdp" / "checkpoints").iterdir())[-1]
    names = [
        f"{group}-0000{k}-of-00002.safetensors" for group in ("ema", "model", "optimizer") for k in (1, 2)
    ]
    assert sorted(path.name for path in found.glob("*.safetensors")) == names
    sizes = {name: (found / name).stat().st_size for name in names}
    for group in ("ema", "model", "optimizer"):
        first, second = (sizes[f"{group}-0000{k}-of-00002.safetensors"] for k in (1, 2))
        assert 0.3 < second / first < 1.1
    stored, whole = StoredTensors(found), StoredTensors(sorted((runs / "one" / "checkpoints").iterdir())[-1])
    assert set(stored.names("model")) == set(whole.names("model"))
    for name in whole.names("model"):
        torch.testing.assert_close(
            stored.read("model", name), whole.read("model", name), rtol=1e-3, atol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["no-space-checkpoint", "killed-checkpoint", "no-space-snapshot", "killed-snapshot", "no-space-model"],
)
def test_a_failure_of_one_process_while_saving_changes_no_byte(runs: Path, case: str) -> None:
    out = runs / f"fsdp-{case}"
    assert files_of(out) == files_of(runs / "fsdp")
    assert not list((out / "checkpoints").glob(".*")) + list((out / "snapshots").glob(".*"))


@pytest.mark.slow
def test_all_processes_make_the_samples_of_a_sharded_network(runs: Path) -> None:
    found = files_of(runs / "fsdp-seen")
    grids = [name for name in found if name.startswith("progress")]
    assert grids == ["progress/000000000048.png", "progress/000000000096.png"]
    assert {name: found[name] for name in found if name not in grids} == files_of(runs / "fsdp")


@pytest.mark.slow
def test_killed_process_restarts_from_the_last_checkpoint(runs: Path) -> None:
    done = run([*TORCHRUN, "--max-restarts", "1", WORKER, str(runs), "killed"])
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in re.sub(r" +", " ", done.stderr) or "Signal 9" in done.stderr
    assert files_of(runs / "killed") == files_of(runs / "ddp")
    assert log_of(runs / "killed") == log_of(runs / "ddp")


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / f"images/{i}.png")
    words = ["-m", "edm2", "train", "--data", str(tmp_path / "images"), "--images", "16", *TINY]
    done = run([*TORCHRUN, *words, "--out", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model:") == 1
    assert log_of(tmp_path / "run")[-1]["num_images"] == 16
    assert (tmp_path / "run" / "model.safetensors").exists()
    done = run([*TORCHRUN, *words, "--out", str(tmp_path / "images")])
    assert done.returncode == 1
    assert done.stderr.count("is not empty and holds no run") == 1


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_distill_what_one_does(tmp_path: Path, sharding: str) -> None:
    teacher = ["-m", "edm2", "train", "--data", "digits", "--images", "16", *TINY]
    assert run([sys.executable, *teacher, "--out", str(tmp_path / "teacher")]).returncode == 0
    words = ["-m", "edm2", "distill", str(tmp_path / "teacher"), "--consistency.path", "teacher",
             "--images", "32", "--batch", "4", "--log-images", "8", "--device", "cpu"]  # fmt: skip
    for name, start in (("one", [sys.executable]), ("two", [*TORCHRUN, "--max-restarts", "0"])):
        done = run([*start, *words, "--sharding", sharding, "--out", str(tmp_path / name)])
        assert done.returncode == 0, done.stderr
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for key in ("loss", "grad_norm", "weight_norm"):
        assert [r[key] for r in two] == pytest.approx([r[key] for r in one], rel=1e-4)
    kept = [(tmp_path / name / "teacher/model.safetensors").read_bytes() for name in ("one", "two")]
    assert kept[0] == kept[1]


def processes_of(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if b"edm2" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds torchrun's processes in /proc")
@pytest.mark.parametrize("whom", ["torchrun", "worker"])
def test_a_stop_under_torchrun_is_no_failure(tmp_path: Path, whom: str) -> None:
    """Sent to torchrun, which then always ends with 1, or to one of its processes, when it ends with 0."""
    out, log = tmp_path / "run", tmp_path / "log"
    words = ["--max-restarts", "1", "-m", "edm2", "train", "--data", "digits", "--images", "4000000", *TINY]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*TORCHRUN, *words, "--log-images", "40", "--out", str(out)],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        while not (out / "log.jsonl").exists() or not log_of(out):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        os.kill(process.pid if whom == "torchrun" else processes_of(process.pid)[1], signal.SIGTERM)
        code = process.wait(timeout=100)
    text = log.read_text()
    assert text.count("checkpoint written; the same command continues") == 1, text
    assert code == (1 if whom == "torchrun" else 0), text
    assert not (out / "model.safetensors").exists()
    assert len(list((out / "checkpoints").iterdir())) == 1


def world(size: int) -> World:
    return World(rank=0, size=size, device=torch.device("cpu"))


def test_batches_that_cannot_be_shared() -> None:
    assert world(4).share(64, None) == 16
    assert world(4).share(64, 32) == 16
    with pytest.raises(
        ValueError, match="batch 64 cannot be shared evenly by 3 processes: choose a multiple of 3"
    ):
        world(3).share(64, None)
    with pytest.raises(
        ValueError, match=r"microbatch 6 does not divide the 16 images .*: choose a divisor of 16"
    ):
        world(4).share(64, 6)


def test_policy_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    set_gpu_policy(torch.device("cpu"))
    assert (chosen, torch.backends.cudnn.benchmark) == ([], True)
    set_gpu_policy(torch.device("cuda"))
    assert (chosen, torch.backends.cudnn.benchmark) == (["high"], False)


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_world("cpu") as alone:
        assert (alone.rank, alone.size, alone.is_first) == (0, 1, True)
        assert alone.any(True)
        assert not alone.any(False)
        assert alone.on_first(lambda: 7) == 7
        assert float(alone.sum(torch.tensor(2.0))) == 2.0


def test_sharding_is_no_part_of_a_run() -> None:
    assert tiny_config(sharding="full").run_id("x") == tiny_config().run_id("x")


def test_sharding_needs_a_torch_that_can_leave_scalars_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, *, mesh=None: None)
    with pytest.raises(ValueError, match=r"sharding full needs torch 2.7 or newer, .*: use sharding none"):
        shard(build_denoiser(8, 1, model_channels=8, channel_mult=(1,), channels_per_head=8), world(2))
