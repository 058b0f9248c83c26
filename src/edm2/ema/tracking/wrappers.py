"""Modules that only wrap another one, recognised by their types, and models that cannot be followed."""

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_MODULE = ("module",)
# Types by name, so that nothing is imported which the user does not use -> attributes that hold the wrapped module.
_WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": _MODULE,
    "torch.nn.parallel.data_parallel.DataParallel": _MODULE,
    "torch._dynamo.eval_frame.OptimizedModule": ("_orig_mod",),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": (
        "_checkpoint_wrapped_module",
    ),
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "_fsdp_wrapped_module",
        *_MODULE,
    ),
    "deepspeed.runtime.engine.DeepSpeedEngine": _MODULE,
    "lightning.fabric.wrappers._FabricModule": ("_forward_module", "_original_module"),
}
_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"


def _wrapped(module: nn.Module) -> tuple[str, ...]:
    """Attributes of a wrapper that hold the module it wraps; none for any other module."""
    for kind in type(module).__mro__:
        found = _WRAPPERS.get(f"{kind.__module__}.{kind.__qualname__}")
        if found:
            return found
    return ()


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers around it."""
    while names := _wrapped(module):
        module = module.get_submodule(names[0])
    return module


def modules_by_clean_name(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules in a module, by the names that they would have without wrappers.

    Raises:
        ValueError: If one of them is an FSDP1 module whose parameters are not gathered.
    """
    clean: dict[str, str] = {"": ""}  # name with wrappers -> without
    wrappers: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parent, _, key = name.rpartition(".")
        if name:
            above = clean[parent]
            clean[name] = above if key in wrappers[parent] else f"{above}.{key}" if above else key
        wrappers[name] = _wrapped(module)
        _refuse_fsdp1(module)
        yield clean[name], module


def _refuse_fsdp1(module: nn.Module) -> None:
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__}
    state = getattr(module, "training_state", None)
    if _FSDP1 in kinds and getattr(state, "name", "") != "SUMMON_FULL_PARAMS":
        raise ValueError(
            "the model is wrapped in FSDP1 (FullyShardedDataParallel), whose flat parameters hold only this process's"
            " part: use FSDP2 (torch.distributed.fsdp.fully_shard), which PowerEMA follows, or make and use PowerEMA"
            " inside FullyShardedDataParallel.summon_full_params(model)"
        )


def refuse_empty_shard(name: str, tensor: Tensor) -> None:
    """Refuse a parameter that DeepSpeed ZeRO-3 has taken away from this process.

    Raises:
        ValueError: If the parameter is such a placeholder.
    """
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:
        raise ValueError(
            f"tensor {name!r} is empty: DeepSpeed ZeRO-3 spreads its values over processes; use ZeRO stage 1 or 2, or"
            " make and use PowerEMA inside deepspeed.zero.GatheredParameters(model.parameters())"
        )


def is_other_replica(model: nn.Module) -> bool:
    """Whether a module is a data-parallel replica (DDP) of one that the first process of its group holds."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    while names := _wrapped(model):
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return torch.distributed.get_rank(model.process_group) != 0
        model = model.get_submodule(names[0])
    return False


_PREFIXES = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """Names of a checkpoint's tensors -> the names without wrappers, as far as names alone can tell.

    `module.` goes where every name begins with it, so that a model's own submodule of that name stays.
    """
    clean = {name: _PREFIXES.sub("", name) for name in names}
    while clean and all(short.startswith("module.") for short in clean.values()):
        clean = {name: _PREFIXES.sub("", short.removeprefix("module.")) for name, short in clean.items()}
    return clean
