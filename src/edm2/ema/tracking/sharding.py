"""What changes when tensors are spread over processes."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from edm2.ema.tracking.tensors import clean_name, is_sharded, like_shard


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


def is_other_replica(model: nn.Module) -> bool:
    """Whether a module is a data-parallel replica (DDP) of one that the first process of its group holds."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel) and (
            not name or not clean_name(f"{name}.")
        ):
            return torch.distributed.get_rank(module.process_group) != 0
    return False


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
    rank = torch.distributed.get_rank()
    paths: list[Path] = []
    error: Exception | None = None
    if rank == 0:
        try:
            paths = write()
        except Exception as caught:  # the others wait for this process, so the error is raised after them
            error = caught
    for _ in tracks:
        pass
    failed = torch.tensor([error is not None], dtype=torch.int32, device=sharded.device)
    torch.distributed.broadcast(failed, 0)
    if error is not None:
        raise error
    if int(failed):
        raise RuntimeError("the first process could not write the snapshot: its own error says why")
    return paths
