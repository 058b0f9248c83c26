"""Snapshots, and `edm2 ema reconstruct` and `merge`, stopped at every operation on files."""

import contextlib
import io
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from crashes import check_every_interruption
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from edm2.cli import main
from edm2.ema import PowerEMA

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def train(folder: Path, *, keep: int | None = None) -> None:
    """A run that starts from the beginning when it is given again, as one without checkpoints does."""
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    ema = PowerEMA(model, run_id="a-run")
    for step in range(1, 4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        ema.update(step)
        ema.snapshot(folder, keep=keep)


@pytest.mark.parametrize("keep", [None, 2])
def test_snapshots_go_on_after_any_interruption(tmp_path: Path, keep: int | None) -> None:
    assert check_every_interruption(tmp_path, lambda root: train(root / "snapshots", keep=keep)) > 20


def train_in_processes(root: Path, interrupted: int) -> None:
    """Two processes train with sharded tensors; three where something is left of an earlier attempt."""
    size, shared = 2 + any(root.iterdir()), root.with_name("shared")
    shared.unlink(missing_ok=True)
    ranks = [rank for rank in range(size) if rank != interrupted]
    rank = next((rank for rank in ranks if os.fork() == 0), interrupted)
    torch.set_num_threads(1)
    # The first process listens for the others, in a file that is not among those that are watched.
    dist.init_process_group("gloo", init_method=f"file://{shared}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    code = 1
    try:
        values = {"w": torch.zeros(5, 2), "b": torch.zeros(3)}
        model = {name: distribute_tensor(x, mesh, (Shard(0),)) for name, x in values.items()}
        ema = PowerEMA(model, [0.05, 0.1, 0.2], run_id="a-run")
        for step in (1, 2):
            for x in model.values():
                x.to_local().add_(step)
            ema.update(step)
            ema.snapshot(root / "snapshots")
        code = 0
    except Exception:
        if rank == interrupted:
            raise
        traceback.print_exc()
    finally:
        if rank != interrupted:
            sys.stderr.flush()
            os._exit(code)


@pytest.mark.parametrize("interrupted", [0, 1])
def test_sharded_snapshots_go_on_after_any_interruption(tmp_path: Path, interrupted: int) -> None:
    """In any process, by a kill or a full disk; another number of processes goes on, and gives the same bytes."""

    def work(root: Path) -> None:
        train_in_processes(root, interrupted)

    kinds = ("kill", "no space")
    assert check_every_interruption(tmp_path, work, kinds=kinds, most=8) > 8


@pytest.mark.parametrize("command", ["reconstruct", "merge"])
def test_averages_go_on_after_any_interruption(tmp_path: Path, command: str) -> None:
    train(tmp_path / "snapshots")
    for step in (1, 2):
        save_file({"weight": torch.full((4,), float(step))}, tmp_path / f"model-{step}.safetensors")
    files = [str(tmp_path / f"model-{step}.safetensors") for step in (1, 2)]

    def work(root: Path) -> None:
        torch.set_num_threads(1)
        if command == "reconstruct":
            words = [str(tmp_path / "snapshots"), "--sigma-rel", "0.08,0.12", "--out", str(root / "out")]
        else:
            words = [*files, "--target", "0.1", "--out", str(root / "merged")]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
            try:
                main(["ema", command, *words])
            except SystemExit as stopped:
                if stopped.code:
                    raise ValueError(told.getvalue()) from None

    assert check_every_interruption(tmp_path, work) > 4
