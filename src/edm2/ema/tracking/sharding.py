"""Tensors that are spread over processes (DTensor, FSDP2)."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without loading torch.distributed where nobody uses it."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like_shard(part: Tensor, template: Tensor) -> Tensor:
    """A tensor sharded like `template` whose local part is `part`; `part` itself where `template` is not sharded."""
    if not is_sharded(template):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(template, DTensor)
    return DTensor.from_local(
        part.to(template.device),
        template.device_mesh,
        template.placements,
        run_check=False,
        shape=template.shape,
        stride=template.stride(),
    )


def shard_of(tensor: Tensor, template: Tensor) -> Tensor:
    """The local part of a tensor that is sharded like `template`, or whole: then a collective call spreads it."""
    if is_sharded(tensor) or not is_sharded(template):
        return local(tensor)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(template, DTensor)
    return local(distribute_tensor(tensor.to(template.device), template.device_mesh, template.placements))


def full(part: Tensor, template: Tensor) -> Tensor:
    """The whole of a tensor from the local part, a collective call where `template` is sharded."""
    if not is_sharded(template):
        return part
    return torch.Tensor.detach(like_shard(part, template).full_tensor())  # type: ignore[attr-defined]


def to_owners(parts: Sequence[Tensor], template: Tensor, owners: Sequence[int], rank: int) -> Tensor | None:
    """Gather several tensors that are sharded like one, each on a process of its own; collective calls if sharded.

    Args:
        parts: Local part of each.
        template: The tensor that they are sharded like.
        owners: Ranks of the processes that get them, ascending.
        rank: This process's rank.

    Returns:
        The whole tensor that this process gets, on the CPU; None if it gets none.
    """
    if not is_sharded(template):
        return parts[owners.index(rank)].cpu() if rank in owners else None
    counts = _numbers_of_elements(template)
    if counts is None:
        whole = [full(part, template) for part in parts]
        return whole[owners.index(rank)].cpu() if rank in owners else None
    send = torch.cat([part.reshape(-1) for part in parts]).to(template.device)
    sent = [counts[rank] if process in owners else 0 for process in range(len(counts))]
    received = counts if rank in owners else [0] * len(counts)
    out = send.new_empty(sum(received))
    torch.distributed.all_to_all_single(out, send, received, sent)
    return out.view(template.shape).cpu() if rank in owners else None


def _numbers_of_elements(template: Tensor) -> list[int] | None:
    """Elements of each process's rows of a tensor that is cut as FSDP2 does; None if it is cut in another way."""
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(template, DTensor)
    size = torch.distributed.get_world_size()
    if template.device_mesh.mesh.tolist() != list(range(size)) or template.placements != (Shard(0),):
        return None
    rows = template.shape[0]
    length, row = -(-rows // size), template.shape[1:].numel()
    ends = [min(process * length, rows) * row for process in range(size + 1)]
    return [end - begin for begin, end in pairwise(ends)]


def share_of_all(template: Tensor) -> float:
    """Share of this process in a sum over all processes in which each element of a tensor counts once."""
    if not is_sharded(template):
        return 1 / torch.distributed.get_world_size()
    mesh: Any = template.device_mesh  # type: ignore[attr-defined]
    placements: Any = template.placements  # type: ignore[attr-defined]
    parts = math.prod(mesh.size(i) for i, placement in enumerate(placements) if placement.is_shard())
    return float(parts / torch.distributed.get_world_size())


def raise_together(check: Callable[[], None], templates: Sequence[Tensor]) -> None:
    """Run a check; where tensors are sharded, every process raises if it fails on one.

    Raises:
        FloatingPointError: What the check raises, or that it failed on another process.
    """
    sharded = next((x for x in templates if is_sharded(x)), None)
    if sharded is None:
        check()
        return
    error: FloatingPointError | None = None
    try:
        check()
    except FloatingPointError as caught:
        error = caught
    other = FloatingPointError("an average is not finite on another process: its own error says which")
    raise_with_the_others(error, other, sharded)


def raise_with_the_others(error: Exception | None, other: Exception, sharded: Tensor) -> None:
    """Raise this process's error, or `other` if one of the others has one; they wait for one another."""
    failed = torch.tensor([error is not None], dtype=torch.int32, device=sharded.device)
    torch.distributed.all_reduce(failed)
    if error is not None or int(failed):
        raise error or other


def from_all(content: bytes, sharded: Tensor) -> list[bytes]:
    """What each process gave, in the order of ranks; a collective call."""
    size, device = torch.distributed.get_world_size(), sharded.device
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
    torch.distributed.all_gather(lengths, torch.tensor([len(content)], device=device))
    longest = max(1, int(torch.cat(lengths).max()))
    blocks = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(size)]
    padded = torch.frombuffer(bytearray(content.ljust(longest, b" ")), dtype=torch.uint8)
    torch.distributed.all_gather(blocks, padded.to(device))
    return [x.cpu().numpy().tobytes()[: int(n)] for x, n in zip(blocks, lengths, strict=True)]


def from_first(tensor: Tensor, sharded: Tensor) -> Tensor:
    """The first process's tensor, on the CPU; a collective call."""
    whole = full(local(tensor), tensor).detach().contiguous().clone()
    data = whole.view(-1).view(torch.uint8).to(sharded.device)
    torch.distributed.broadcast(data, 0)
    return data.cpu().view(whole.dtype).view(whole.shape)
