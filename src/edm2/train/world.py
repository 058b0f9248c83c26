"""The processes of a run: one, or all that torchrun started.

All distributed work is PyTorch's own: process groups, DistributedDataParallel, fully_shard (FSDP2).
"""

import gc
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from edm2.train.build import pick_device
from edm2.train.signals import under_torchrun


class FirstFailed(RuntimeError):
    """Raised on the other processes when the first one failed; its own error gives the reason."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process and its place among the processes of a run.

    Attributes:
        rank: Index of this process, from 0.
        size: Number of processes.
        device: Device of this process.
        launcher: Process id of torchrun, which started this process; None without it.
    """

    rank: int
    size: int
    device: torch.device
    launcher: int | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    @property
    def is_orphan(self) -> bool:
        """Whether torchrun was killed while this process kept running."""
        return self.launcher is not None and os.getppid() != self.launcher

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Return on all processes whether the flag is set on any of them."""
        if self.size == 1:
            return flag
        shared = torch.tensor(int(flag))
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared)

    def on_first(self, function: Callable[[], int | None]) -> int | None:
        """Run a function on the first process while the others wait; return its result on all.

        Raises:
            FirstFailed: On the other processes, if the function raised on the first.
        """
        if self.size == 1:
            return function()
        failed, has_value, answer = 0, 0, 0
        error: Exception | None = None
        if self.is_first:
            try:
                value = function()
                has_value, answer = int(value is not None), value or 0
            except Exception as caught:  # raised below, after the others have been told
                failed, error = 1, caught
        outcome = torch.tensor([failed, has_value, answer])
        dist.broadcast(outcome, 0)
        if error is not None:
            raise error
        failed, has_value, answer = outcome.tolist()
        if failed:
            raise FirstFailed("the first process failed: its own error gives the reason")
        return answer if has_value else None

    def share(self, batch_size: int, microbatch: int | None) -> int:
        """Return the number of images of each batch that a process takes.

        Raises:
            ValueError: If the batch, or the share, cannot be divided evenly.
        """
        share, rest = divmod(batch_size, self.size)
        if rest:
            raise ValueError(
                f"batch {batch_size} cannot be shared evenly by {self.size} processes: choose a multiple of {self.size}"
            )
        if microbatch is not None and share % min(microbatch, share):
            raise ValueError(
                f"microbatch {microbatch} does not divide the {share} images that each of {self.size} processes takes "
                f"of batch {batch_size}: choose a divisor of {share}"
            )
        return share


def set_gpu_policy(device: torch.device) -> None:
    """Choose how a GPU computes in float32 and how it picks convolutions; see docs/numerics.md."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = False


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, or run alone.

    Args:
        device: As in `pick_device`; with several processes `auto` and `cuda` choose the GPU of the local rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = os.getppid() if under_torchrun() else None
    if size == 1:
        chosen = pick_device(device)
        set_gpu_policy(chosen)
        yield World(rank=0, size=1, device=chosen, launcher=launcher)
        return
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    chosen = pick_device(device)
    set_gpu_policy(chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # After a restart torchrun may reuse its store, which still holds the addresses of dead processes.
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # CPU tensors always use gloo, so that small decisions never wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        with warnings.catch_warnings():
            if rank > 0:  # the first process warns for all
                warnings.simplefilter("ignore")
            yield World(rank=rank, size=size, device=chosen, launcher=launcher)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # Objects that refer to the group, such as the hooks of DDP, must go first: destroying the group waits for
        # threads that need the interpreter's lock.
        gc.collect()
        dist.destroy_process_group()
