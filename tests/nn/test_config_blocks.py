"""Blocks and layers of the earlier configurations against their definitions, in torch's own functions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edm2.nn import (
    Block,
    GroupNormBlock,
    PlainConv,
    Positional,
    RMSGroupNorm,
    get_features,
    rms,
    rms_norm,
)
from edm2.nn.plain_layers import group_count


def test_block_of_config_a_equals_torch_modules():
    torch.manual_seed(0)
    block = GroupNormBlock(
        32, 64, 48, get_features("A"), resample_mode="down", attention=True, channels_per_head=32
    ).eval()
    for p in block.parameters():
        nn.init.normal_(p, std=0.1)
    x, emb = torch.randn(2, 32, 8, 8), torch.randn(2, 48)

    def norm(y, layer, groups):
        return F.group_norm(y, groups, layer.weight, layer.bias, eps=1e-5)

    def conv(y, layer):
        return F.conv2d(y, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)

    y = conv(F.avg_pool2d(F.silu(norm(x, block.norm0, 8)), 2), block.conv_res0)
    scale, shift = F.linear(emb, block.emb_linear.weight, block.emb_linear.bias)[:, :, None, None].chunk(2, 1)
    y = conv(F.silu(norm(y, block.norm1, 16) * (1 + scale) + shift), block.conv_res1)
    z = conv(F.avg_pool2d(x, 2), block.conv_skip) + y
    qkv = conv(norm(z, block.attn_norm, 16), block.attn_qkv).reshape(2, 2, 32, 3, 16)
    q, k, v = qkv.unbind(3)
    weights = torch.einsum("bhcq,bhck->bhqk", q, k / 32**0.5).softmax(-1)
    z = z + conv(torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(2, 64, 4, 4), block.attn_proj)
    assert torch.allclose(block(x, emb), z, atol=1e-5)


def by_hand(layer, x):
    """A normalised layer from its definition."""
    w = layer.weight / (layer.weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (layer.weight.ndim - 1)))
    return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


def cosine_attention_by_hand(block, x):
    q, k, v = by_hand(block.attn_qkv, x).reshape(len(x), -1, 32, 3, x[0, 0].numel()).unbind(3)
    q, k, v = (t / (t.square().mean(2, keepdim=True) + 1e-4).sqrt() for t in (q, k, v))
    weights = torch.einsum("bhcq,bhck->bhqk", q, k / 32**0.5).softmax(-1)
    return by_hand(block.attn_proj, torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(x.shape))


def test_block_of_config_d_equals_its_definition():
    torch.manual_seed(0)
    options = dict(resample_mode="up", attention=True, channels_per_head=32)
    block = GroupNormBlock(32, 64, 48, get_features("D"), **options).eval()
    x, emb = 3 * torch.randn(2, 32, 4, 4) + 1, torch.randn(2, 48)

    def norm(y, groups):
        flat = y.reshape(2, groups, -1)
        return (flat / (flat.square().mean(2, keepdim=True) + 1e-4).sqrt()).reshape(y.shape)

    def up(y):
        return y.repeat_interleave(2, 2).repeat_interleave(2, 3)

    y = norm(by_hand(block.conv_res0, up(F.silu(norm(x, 8)))), 16)
    y = F.silu(y * (1 + by_hand(block.emb_linear, emb)[:, :, None, None]))
    z = by_hand(block.conv_skip, up(x)) + by_hand(block.conv_res1, y)
    z = z + cosine_attention_by_hand(block, z)
    assert torch.allclose(block(x, emb), z, rtol=1e-3, atol=2e-3)  # eps of the weights is left out by hand


@pytest.mark.parametrize("flavor", ["enc", "dec"])
def test_block_of_config_f_equals_its_definition(flavor):
    torch.manual_seed(0)
    options = dict(flavor=flavor, attention=True, channels_per_head=32)
    block = Block(32, 64, 48, get_features("F"), **options).eval()
    x, emb = 3 * torch.randn(2, 32, 4, 4), torch.randn(2, 48)
    skipped = by_hand(block.conv_skip, x)
    if flavor == "enc":
        skipped = skipped / (skipped.square().mean(1, keepdim=True) + 1e-4).sqrt()
    y = by_hand(block.conv_res0, F.silu(skipped if flavor == "enc" else x))
    y = y * (1 + by_hand(block.emb_linear, emb)[:, :, None, None])
    z = skipped + by_hand(block.conv_res1, F.silu(y))
    z = z + cosine_attention_by_hand(block, z)
    assert torch.allclose(block(x, emb), z, rtol=1e-3, atol=2e-3)


def test_positional_features():
    x = torch.tensor([0.0, 0.7, -1.3])
    features = Positional(6)(x)
    assert torch.allclose(features[:, 0], x.cos())
    assert torch.allclose(features[:, 5], (x * 10000 ** (-2 / 3)).sin())
    with pytest.raises(ValueError, match="come in pairs, and 5 is odd: choose an even model_channels"):
        Positional(5)


def test_rms_group_norm_keeps_the_mean_and_unit_magnitude():
    x = 5 + torch.randn(3, 48, 6, 6, generator=torch.Generator().manual_seed(0))
    y = RMSGroupNorm(48)(x)
    assert torch.allclose(rms(y.unflatten(1, (12, 4)), (2, 3, 4)), torch.ones(()), atol=1e-4)
    assert y.mean() > 0.9
    y = RMSGroupNorm(48)(x.half() * 1000)  # squares are beyond float16
    assert y.dtype == torch.float16
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_group_norm_by_channels_equals_that_of_whole_groups(layout, dtype):
    g = torch.Generator().manual_seed(0)
    x = (1 + torch.randn(2, 12, 6, 6, generator=g)).to(dtype).contiguous(memory_format=layout)
    x[0, :4] *= 1e-3  # where eps matters
    factor = torch.randn(x.shape, generator=g).to(dtype)
    found, expected = [], []
    for results, function in (
        (found, RMSGroupNorm(12)),
        (expected, lambda x: rms_norm(x.unflatten(1, (3, 4)), (2, 3, 4)).flatten(1, 2)),
    ):
        given = x.clone().requires_grad_()
        y = function(given)
        (y * factor).sum().backward()
        results.extend([y.detach(), given.grad])
    assert found[0].is_contiguous(memory_format=layout)
    rounding = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.02, atol=0.02)
    for a, b in zip(found, expected, strict=True):
        scale = float(b.abs().max())
        assert torch.allclose(a / scale, b / scale, **rounding)


@pytest.mark.parametrize(("channels", "groups"), [(192, 32), (1344, 32), (64, 16), (144, 24), (6, 1), (2, 1)])
def test_group_count(channels, groups):
    assert group_count(channels) == groups


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_plain_layer_starts_uniform_within_its_bound(kernel):
    torch.manual_seed(0)
    layer = PlainConv(64, 256, kernel, bias=True)
    bound = 1 / layer.weight[0].numel() ** 0.5
    for p in (layer.weight, layer.bias):
        assert p.abs().max() <= bound
        assert p.detach().std() == pytest.approx(bound / 3**0.5, rel=0.1)
    x = torch.randn(2, 64, *(5,) * len(kernel))
    module = (nn.Conv2d(64, 256, 3, padding=1) if kernel else nn.Linear(64, 256)).requires_grad_(False)
    module.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(x), module(x), atol=1e-5)
