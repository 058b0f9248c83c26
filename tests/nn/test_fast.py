"""The fast form of the blocks against the plain one: float64 to 1e-12, float32 to 1e-6, all gradients."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edm2.nn import ForcedWeightNorm, UNet, fast, functional, use_channels_last

F64 = torch.float64


def network(dtype: torch.dtype = F64, **options: Any) -> UNet:
    torch.manual_seed(0)
    net = UNet(
        8, 2, 3, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=4,
        **options,
    ).train()  # fmt: skip
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.7)
    ForcedWeightNorm(net)()
    return net.to(dtype)


def inputs(net: UNet, batch: int = 3) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, net.img_channels, *net.img_resolution, generator=g)
    dtype = next(net.parameters()).dtype
    return x.to(dtype), torch.randn(batch, generator=g), torch.eye(3)[:batch]


def step(net: UNet, x: Tensor, *rest: Tensor, plain: bool = False, **kwargs: Any) -> list[Tensor]:
    """The output, and the gradients of input and weights."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    with fast.plain_forms() if plain else nullcontext():
        y = net(x, *rest, **kwargs)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"dropout": 0.2},
    {"res_balance": 0.0, "attn_balance": 1.0},
    {"res_balance": 1.0, "attn_balance": 0.0},
    {"clip_act": 1.5},
    {"clip_act": float("inf")},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("last", [False, True])
def test_equals_the_plain_form_to_rounding(
    options: dict[str, Any], last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network(**options)
    x, *rest = inputs(net)
    if last:
        use_channels_last(net)
        x = x.contiguous(memory_format=torch.channels_last)
    calls = []
    original = fast.block_forward
    monkeypatch.setattr(fast, "block_forward", lambda *a: calls.append(a) or original(*a))
    dropout = {"dropout_index": torch.arange(3), "dropout_seed": 5}
    ours = step(net, x, *rest, **dropout)
    assert len(calls) == 10  # blocks
    assert distance(ours, step(net, x, *rest, plain=True, **dropout)) < 1e-12
    assert len(calls) == 10
    given = x.clone()
    with torch.no_grad():
        assert distance([net(x, *rest, **dropout)], ours[:1]) < 1e-12
    assert len(calls) == 20
    assert torch.equal(x, given)


def test_float32_to_a_millionth_and_bfloat16_no_worse_than_the_plain_form() -> None:
    net = network(torch.float32)
    x, *rest = inputs(net)
    exact = step(net, x, *rest, plain=True)
    flat = [torch.cat([t.flatten() for t in exact[2:]])]
    assert distance([torch.cat([t.flatten() for t in step(net, x, *rest)[2:]])], flat) < 1e-6
    errors = []
    for plain in (False, True):
        found = step(net, x.bfloat16(), *rest, plain=plain)[2:]
        errors.append(distance([torch.cat([t.flatten() for t in found])], flat))
    assert errors[0] < 1.5 * errors[1]


def test_vectors_of_zeros_have_finite_gradients() -> None:
    net = network()
    x, *rest = inputs(net)
    x = torch.zeros_like(x)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 4:
                parameter[0] = 0
    ours = step(net, x, *rest)
    assert all(bool(t.isfinite().all()) for t in ours)
    assert distance(ours, step(net, x, *rest, plain=True)) < 1e-12


@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_second_derivatives(gain: float) -> None:
    x = torch.randn(3, 4, 2, dtype=F64, requires_grad=True)

    def ours(x: Tensor) -> Tensor:
        return gain * fast.unit(x, (1,), eps=0.1)

    assert torch.autograd.gradgradcheck(ours, (x,))
    torch.testing.assert_close(ours(x), gain * functional.normalize(x, 1, eps=0.1))


def test_second_derivatives_of_a_network() -> None:
    net = network()
    x, *rest = inputs(net)
    found = []
    for context in (nullcontext(), fast.plain_forms()):
        leaf = x.clone().requires_grad_()
        with context:
            (slope,) = torch.autograd.grad(net(leaf, *rest).square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), list(net.parameters())[:8], allow_unused=True))
    known = [(a, b) for a, b in zip(*found, strict=True) if b is not None]
    assert len(known) > 3
    assert distance([a for a, _ in known], [b for _, b in known]) < 1e-10


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f, x: torch.func.vmap(lambda v: f(v[None]))(x[:1]),
    ],
    ids=["jvp", "grad", "vmap"],
)
def test_function_transforms_are_those_of_the_plain_form(
    transform: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
) -> None:
    net = network()
    x, sigma, labels = inputs(net, 1)
    given = transform(lambda x: net(x, sigma, labels), x)
    with fast.plain_forms():
        torch.testing.assert_close(given, transform(lambda x: net(x, sigma, labels), x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
def test_forward_mode_without_torch_func() -> None:
    net = network()
    x, *rest = inputs(net)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(net(dual, *rest)).tangent is not None


def test_recomputed_activations_give_equal_bits() -> None:
    net = network()
    x, *rest = inputs(net)
    before = step(net, x, *rest)
    for layers in (net.enc, net.dec):
        for layer in layers.values():
            layer.forward = lambda *a, f=layer.forward: checkpoint(f, *a, use_reentrant=False)
    for ours, theirs in zip(step(net, x, *rest), before, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", ["eval", "own norm", "hook", "replaced", "config F"])
def test_other_cases_take_the_plain_form(case: str) -> None:
    net = network(**({"config": "F"} if case == "config F" else {}))
    block: Any = net.dec["8x8_block0"]
    assert fast.applies(block) is (case != "config F")
    if case == "eval":
        net.eval()
    elif case == "own norm":
        block.conv_res0.forces_norm = True
    elif case == "hook":
        block.conv_res0.register_forward_hook(lambda *_: None)
    elif case == "replaced":
        block.conv_res0 = torch.nn.utils.parametrizations.weight_norm(block.conv_res0)
    assert not fast.applies(block)
