"""Count the floating-point operations of a forward pass the way the paper does.

Convention (EDM2 App. D.5): one operation per multiply-accumulate, one per output element of elementwise
arithmetic, three for SiLU and softmax, two for a clamp, the input size for a norm or a mean; casts, reshapes,
copies and concatenations are free. A normalised weight is divided by its norm and then multiplied by its scale, as in
the paper's equations, though `NormalizedConv` does both at once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from edm2.nn.layers import NormalizedConv

_COST_PER_OUTPUT = {
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div", "neg", "reciprocal", "pow"), 1),
    **dict.fromkeys(("sqrt", "rsqrt", "exp", "log", "cos", "sin"), 1),
    **dict.fromkeys(("clamp", "hardtanh", "lerp"), 2),
    **dict.fromkeys(("silu", "gelu", "softmax"), 3),
    "native_group_norm": 4,
}
_COST_PER_INPUT = {"linalg_vector_norm": 1, "mean": 1, "sum": 1, "avg_pool2d": 1}


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Run `function(*args, **kwargs)` and count what it computes.

    Args:
        function: Module or function; on the meta device it takes neither time for arithmetic nor memory.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Returns:
        Operations in the convention above, weight normalisation included.

    Example:
        >>> with torch.device("meta"):
        ...     flops = count_flops(UNet(64, 4, 1000).eval(), torch.zeros(1, 4, 64, 64), torch.zeros(1))
    """
    counter = _Counter()

    def add_scaling(module: nn.Module, _: Any) -> None:
        if isinstance(module, NormalizedConv):
            counter.total += module.weight.numel()

    with (
        torch.no_grad(),
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
        register_module_forward_pre_hook(add_scaling),
        counter,
    ):
        function(*args, **kwargs)
    return counter.total


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True, torch's default, loads its compilers for seconds to keep them from compiling this class.
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += _cost(func.overloadpacket.__name__, args, out)
        return out


def _cost(op: str, args: tuple[Any, ...], out: Any) -> int:
    if op == "convolution":
        return int(out.numel()) * int(args[1][0].numel())
    if op == "mm":
        return int(out.numel() * args[0].shape[1])
    if op in ("bmm", "baddbmm"):
        return int(out.numel() * args[-2].shape[2])
    if op == "addmm":
        return int(out.numel() * args[1].shape[1])
    if op in _COST_PER_INPUT:
        return _COST_PER_INPUT[op] * int(args[0].numel())
    first = out[0] if isinstance(out, (tuple, list)) else out
    name = op.removeprefix("_").removeprefix("safe_").removesuffix("_")
    return _COST_PER_OUTPUT.get(name, 0) * (math.prod(first.shape) if isinstance(first, Tensor) else 0)
