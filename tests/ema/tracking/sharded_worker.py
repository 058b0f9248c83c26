"""One of two processes: trains a small model with FSDP2 and tracks it beside an unsharded twin."""

import copy
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from edm2.ema import PowerEMA, reconstruct
from edm2.ema.storage import snapshots
from edm2.ema.storage.manifest import read_manifest
from edm2.ema.tracking import writing


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    twin = copy.deepcopy(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    ema = PowerEMA(model, run_id="run")
    alone = PowerEMA(twin, run_id="run")
    for step in range(1, 9):
        move(model, twin, step)
        ema.update(step)
        alone.update(step)
        if step % 4 == 0:
            ema.snapshot(folder / "sharded")
            if rank == 0:
                alone.snapshot(folder / "alone")
    for name, average in ema.average(0.1).items():
        assert torch.equal(average, alone.average(0.1)[name]), name
    check_on_first(ema, alone, twin, rank)
    check_long_run(ema, alone, model, twin)
    check_applied(ema, alone, model)
    check_state(ema, model)
    check_failed_write(ema, rank, folder)
    check_shares(ema, rank, folder)
    check_other_placements(rank, folder)
    check_ddp(rank, folder)
    if rank == 0:
        mine, other = (reconstruct(folder / name, sigma_rel=0.13) for name in ("sharded", "alone"))
        for name, tensor in mine.tensors.items():
            assert torch.equal(tensor, other.tensors[name]), name
    dist.barrier()
    dist.destroy_process_group()


def move(model: nn.Module, twin: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for shard, whole in zip(model.parameters(), twin.parameters(), strict=True):
            change = torch.randn(whole.shape, generator=generator)
            whole.add_(change)
            shard.add_(
                torch.distributed.tensor.distribute_tensor(change, shard.device_mesh, shard.placements)
            )


def check_long_run(ema: PowerEMA, alone: PowerEMA, model: nn.Module, twin: nn.Module) -> None:
    """Within a window too, averages are those of the unsharded twin, and so is a state that is loaded."""
    fresh, whole = PowerEMA(model, run_id="fresh"), PowerEMA(model, run_id="whole")
    for step in range(100_000, 100_240, 10):
        move(model, twin, step)
        ema.update(step)
        alone.update(step)
    state = alone.state_dict()
    assert any(key.startswith("window.") for key in state)
    fresh.load_state_dict(ema.state_dict())
    whole.load_state_dict(state)
    for other in (ema, fresh, whole):
        for name, average in other.average(0.1).items():
            assert torch.equal(average, alone.average(0.1)[name]), name


def check_on_first(ema: PowerEMA, alone: PowerEMA, twin: nn.Module, rank: int) -> None:
    state = twin.state_dict() | alone.average(0.08)
    for name, tensor in zip(state, ema.average_on_first(0.08, state), strict=True):
        assert torch.equal(tensor, state[name]) if rank == 0 else tensor is None, name


def check_applied(ema: PowerEMA, alone: PowerEMA, model: nn.Module) -> None:
    before = [p.full_tensor().clone() for p in model.parameters()]
    with ema.applied(model, 0.05):
        for p, average in zip(model.parameters(), alone.average(0.05).values(), strict=True):
            assert torch.equal(p.full_tensor(), average)
    assert all(torch.equal(p.full_tensor(), b) for p, b in zip(model.parameters(), before, strict=True))


def check_state(ema: PowerEMA, model: nn.Module) -> None:
    other = PowerEMA(model, run_id="other")
    other.load_state_dict(ema.state_dict())
    for name, average in ema.average(0.05).items():
        assert torch.equal(average, other.average(0.05)[name])


def check_failed_write(ema: PowerEMA, rank: int, folder: Path) -> None:
    (folder / "file").touch()
    expected = (FileExistsError, "file") if rank == 0 else (RuntimeError, "another process could not write")
    with pytest.raises(expected[0], match=expected[1]):
        ema.snapshot(folder / "file")


def check_shares(ema: PowerEMA, rank: int, folder: Path) -> None:
    """Each process writes one of two tracks, holding one whole tensor; a folder that only one sees is filled by it."""
    gather, held, most = writing.to_owners, weakref.WeakSet[torch.Tensor](), 0

    def watched(*arguments: Any) -> Any:
        nonlocal most
        tensor = gather(*arguments)
        if tensor is not None:
            held.add(tensor)
        most = max(most, len(held))
        return tensor

    before = sum(1 for _ in folder.rglob("t*.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "to_owners", watched)
        files: list[Path] = []
        original = snapshots.write_one
        patch.setattr(snapshots, "write_one", lambda *x, **y: files.append(x[0]) or original(*x, **y))
        assert len(ema.snapshot(folder / "shared")) == (2 if rank == 0 else 0)
        assert len(files) == 1
        assert most <= 2, "this one, and the one before, which is being written"
        assert len(ema.snapshot(folder / f"disk of {rank}", dtype="fp16")) == (2 if rank == 0 else 0)
    assert len(files) == (3 if rank == 0 else 1)
    assert not (folder / "disk of 1").exists()
    dist.barrier()
    assert sum(1 for _ in folder.rglob("t*.safetensors")) == before + 4


def check_other_placements(rank: int, folder: Path) -> None:
    """Tensors that are cut along another dimension, replicated, or whole; and a copied one that is cut."""
    flat, grid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    values = {name: torch.randn(3, 4, generator=torch.Generator().manual_seed(7)) for name in "abcde"}
    tree: dict[str, torch.Tensor] = {
        "a": distribute_tensor(values["a"], flat, [Shard(1)]),
        "b": distribute_tensor(values["b"], flat, [Replicate()]),
        "c": distribute_tensor(values["c"], grid, [Replicate(), Shard(0)]),
        "d": values["d"].clone(),
        "e": distribute_tensor(values["e"], flat, [Shard(0)]),
    }
    trackers = [PowerEMA(x, run_id="run", copied=["e"]) for x in (tree, values)]
    for tensor in (*tree.values(), *values.values()):
        tensor.mul_(1.25)
    for ema, name in zip(trackers, ("placed", "whole"), strict=True):
        ema.update(1)
        if name == "placed" or rank == 0:
            ema.snapshot(folder / name, dtype="fp16")
    dist.barrier()
    for file in (folder / "whole").iterdir():
        assert file.read_bytes() == (folder / "placed" / file.name).read_bytes(), file.name


def check_ddp(rank: int, folder: Path) -> None:
    """Data-parallel replicas hold whole, equal averages under the bare module's names; the first one writes them."""
    torch.manual_seed(1)
    bare = nn.Linear(4, 3)
    wrapped = nn.parallel.DistributedDataParallel(bare)
    # What torch.compile makes around it, without loading the compiler.
    compiled = type("OptimizedModule", (nn.Module,), {"__module__": "torch._dynamo.eval_frame"})()
    compiled._orig_mod = wrapped
    ema, alone = PowerEMA(compiled), PowerEMA(bare)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(1, 4):
        optimizer.zero_grad()
        wrapped(torch.full((2, 4), float(rank + step))).square().sum().backward()
        optimizer.step()
        ema.update(step)
        alone.update(step)
        assert len(ema.snapshot(folder / "every process calls")) == (2 if rank == 0 else 0)
        if rank == 0:
            ema.snapshot(folder / "first process alone")
    if rank == 0:
        for name in ("every process calls", "first process alone"):
            assert {s.t for s in read_manifest(folder / name).snapshots} == {1, 2, 3}
            assert torch.equal(
                reconstruct(folder / name, sigma_rel=0.1).tensors["weight"], ema.average(0.1)["weight"]
            )
        alone.snapshot(folder / "bare")
        torch.save(ema.state_dict(), folder / "state.pt")
    dist.barrier()
    resumed = PowerEMA(wrapped)
    resumed.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    resumed.update(4)
    assert len(resumed.snapshot(folder / "every process calls")) == (2 if rank == 0 else 0)
    ids = [None, None]
    dist.all_gather_object(ids, resumed.run_id)
    assert ids[0] == ids[1]
    if rank == 1:
        with pytest.raises(
            ValueError, match=r"if several processes train one model, call snapshot in the first one only"
        ):
            alone.snapshot(folder / "bare")
    for name, average in ema.average(0.1).items():
        assert torch.equal(average, alone.average(0.1)[name])
        total = average.clone()
        dist.all_reduce(total)
        assert torch.equal(total, 2 * average)
    with ema.applied(wrapped, 0.1):
        assert torch.equal(bare.weight, ema.average(0.1)["weight"])


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
