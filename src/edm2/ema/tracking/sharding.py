"""Tensors that are spread over processes (DTensor, FSDP2)."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

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


def distance(averages: Sequence[Tensor], weights: Sequence[Tensor], templates: Sequence[Tensor]) -> float:
    """L2 distance between an average and the weights, a collective call where they are sharded.

    Args:
        averages: Local parts of the average.
        weights: Local parts of the weights.
        templates: The tensors that they are parts of.
    """
    square = 0.0
    for average, weight, template in zip(averages, weights, templates, strict=True):
        difference = weight.to(average) - average
        if is_sharded(template):
            norm = torch.linalg.vector_norm(like_shard(difference, template))
            norm = norm.full_tensor()
        else:
            norm = torch.linalg.vector_norm(difference, dtype=torch.float64)
        square += float(norm.square())
    return math.sqrt(square)


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
    _raise_with_the_others(error, other, sharded)


def _raise_with_the_others(error: Exception | None, other: Exception, sharded: Tensor) -> None:
    """Raise this process's error, or `other` if one of the others has one; they wait for one another."""
    failed = torch.tensor([error is not None], dtype=torch.int32, device=sharded.device)
    torch.distributed.all_reduce(failed)
    if error is not None or int(failed):
        raise error or other


def write_from_first(
    write: Callable[[], list[Path]], tracks: Iterable[object], templates: Sequence[Tensor]
) -> list[Path]:
    """Let the first process write where tensors are sharded, and this one where they are not.

    Args:
        write: Writes the tracks.
        tracks: The tracks that `write` consumes; each takes a collective call.
        templates: Tensors that tell whether anything is sharded.

    Returns:
        What was written; nothing on other processes.

    Raises:
        RuntimeError: On other processes, if the first one failed.
    """
    sharded = next((x for x in templates if is_sharded(x)), None)
    if sharded is None:
        return write()
    paths: list[Path] = []
    error: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            paths = write()
        except Exception as caught:
            error = caught
    for _ in tracks:
        pass
    other = RuntimeError("the first process could not write the snapshot: see its own error")
    _raise_with_the_others(error, other, sharded)
    return paths
