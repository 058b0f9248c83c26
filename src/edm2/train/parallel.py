"""A network on several processes: replicated (DDP) or sharded (FSDP2)."""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edm2.diffusion import Denoiser
from edm2.ema.tracking.sharding import is_sharded
from edm2.train.world import World


def shard(denoiser: Denoiser, world: World) -> None:
    """Shard the network over all processes with FSDP2, block by block, in place.

    Scalars and the small uncertainty head are replicated.

    Raises:
        ValueError: If torch is too old.
    """
    # Importing this takes a second, which a run on one process should not pay.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ValueError(
            f"sharding full needs torch 2.7 or newer, this is {torch.__version__}: use sharding none"
        )
    mesh = init_device_mesh(world.device.type, (world.size,))
    scalars = {p for p in denoiser.parameters() if p.ndim == 0}
    for block in blocks_of(denoiser):
        fully_shard(block, mesh=mesh, ignored_params=scalars)
    # By default the outermost module would stay gathered after a forward pass without a backward pass, as in
    # sampling, and would ignore later writes to its shards.
    fully_shard(denoiser.unet, mesh=mesh, ignored_params=scalars, reshard_after_forward=True)


def replicate(denoiser: Denoiser, world: World) -> Any:
    """Wrap the network in DistributedDataParallel."""
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    with warnings.catch_warnings():
        # torch 2.13 has a new name for broadcast_buffers, which older ones do not know.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = nn.parallel.DistributedDataParallel(
            denoiser, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    wrapped.sigma_data = denoiser.sigma_data  # type: ignore[assignment]
    return wrapped


def blocks_of(denoiser: Denoiser) -> list[nn.Module]:
    """Return the blocks of the network: members of its outermost module lists that have submodules."""
    return list(_blocks(denoiser.unet))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, (nn.ModuleDict, nn.ModuleList, nn.Sequential)):
            yield from (part for part in child.children() if any(True for _ in part.children()))
        else:
            yield from _blocks(child)


def exchange_gradients(forward: Any, wanted: bool) -> AbstractContextManager[None]:
    """Return a context for one forward and backward pass, with or without exchange of gradients."""
    if isinstance(forward, nn.parallel.DistributedDataParallel):
        return nullcontext() if wanted else forward.no_sync()
    unet: Any = forward.unet
    if hasattr(unet, "set_requires_gradient_sync"):
        unet.set_requires_gradient_sync(wanted)
    return nullcontext()


@torch.no_grad()
def average_whole_gradients(gradients: Sequence[Tensor], world: World) -> None:
    """Average the gradients of replicated parameters over all processes; FSDP2 averages the others."""
    rest = [g for g in gradients if not is_sharded(g)]
    if world.size == 1 or len(rest) == len(gradients):
        return
    flat = torch.cat([g.flatten() for g in rest]) / world.size
    dist.all_reduce(flat)
    for g, part in zip(rest, flat.split([g.numel() for g in rest]), strict=True):
        g.copy_(part.view_as(g))


def rows_of(tensor: Any) -> tuple[int, int] | None:
    """Return the first row and the end of this process's part of a tensor; None if it is not sharded."""
    if not is_sharded(tensor):
        return None
    # FSDP2 shards the first dimension as torch.chunk does: all parts but the last have the same size.
    rows, size = tensor.shape[0], tensor.device_mesh.size()
    length = -(-rows // size)
    begin = min(tensor.device_mesh.get_local_rank() * length, rows)
    end = min(begin + length, rows)
    assert tensor.to_local().shape[0] == end - begin
    return begin, end
