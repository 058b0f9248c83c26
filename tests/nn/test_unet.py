import pytest
import torch

from edm2.nn import MPConv, UNet, count_flops
from edm2.nn.unet import level_resolutions

TINY = dict(model_channels=16, channel_mult=(1, 2), num_blocks=1, channels_per_head=16)


def test_activations_keep_unit_magnitude_through_every_layer():
    torch.manual_seed(0)
    net = UNet(32, 3, 10, model_channels=64, channel_mult=(1, 2, 3), num_blocks=2, attn_resolutions=(16, 8))
    with torch.no_grad():
        net.out_gain.fill_(1)
    seen = {}
    for part in ("enc", "dec"):
        for name, layer in getattr(net, part).items():
            layer.register_forward_hook(
                lambda _m, _i, out, key=f"{part}.{name}": seen.update(
                    {key: float(out.square().mean().sqrt())}
                )
            )
    with torch.no_grad():
        out = net(torch.randn(8, 3, 32, 32), torch.randn(8), torch.eye(10)[:8])
    assert len(seen) == 9 + 13
    # Correlated neighbours and zero padding let magnitudes stray a little, never drift.
    assert all(0.6 < value < 1.4 for value in seen.values()), seen
    assert float(out.square().mean().sqrt()) == pytest.approx(1, abs=0.3)


def test_output_starts_at_zero():
    torch.manual_seed(0)
    net = UNet(16, 2, 0, **TINY)
    assert net(torch.randn(2, 2, 16, 16), torch.randn(2)).abs().max() == 0


def test_rectangular_images_and_their_state_names():
    torch.manual_seed(0)
    net = UNet((16, 32), 5, 0, cond_channels=2, attn_resolutions=(8,), **TINY)
    assert "enc.16x32_conv.weight" in net.state_dict()
    assert "enc.8x16_block0.attn_qkv.weight" in net.state_dict()
    assert net(torch.randn(2, 7, 16, 32), torch.randn(2)).shape == (2, 5, 16, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_is_close_to_float32(dtype, fill_by_rule):
    net = fill_by_rule(UNet(16, 3, 4, **TINY)).eval()
    x, c_noise, labels = (
        torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.ones(2),
        None,
    )
    with torch.no_grad():
        reference, reduced = net(x, c_noise, labels), net(x.to(dtype), c_noise, labels)
    assert reduced.dtype == dtype
    error = (reduced.float() - reference).square().mean().sqrt() / reference.square().mean().sqrt()
    assert error < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_dropout_is_a_function_of_the_key_in_training_only():
    torch.manual_seed(0)
    net = UNet(16, 2, 0, dropout=0.5, **TINY).train()
    with torch.no_grad():
        net.out_gain.fill_(1)
    x, c_noise, index = torch.randn(4, 2, 16, 16), torch.randn(4), torch.arange(4) + 100
    whole = net(x, c_noise, dropout_index=index, dropout_seed=3)
    part = net(x[1:3], c_noise[1:3], dropout_index=index[1:3], dropout_seed=3)
    assert torch.allclose(whole[1:3], part, atol=1e-5)
    assert not torch.allclose(whole, net(x, c_noise, dropout_index=index, dropout_seed=4), atol=1e-2)
    assert not torch.allclose(net(x, c_noise), net(x, c_noise), atol=1e-2)
    net.eval()
    assert torch.equal(net(x, c_noise, dropout_index=index), net(x, c_noise))


def test_dropout_streams_differ_between_blocks():
    net = UNet(16, 2, 0, dropout=0.5, **TINY)
    streams = [
        m.dropout_stream for part in (net.enc, net.dec) for m in part.values() if hasattr(m, "dropout_stream")
    ]
    assert streams == list(range(len(streams)))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((8, 3, 0), dict(channel_mult=()), "channel_mult is empty: give the width of at least one level"),
        ((20, 3, 0), dict(channel_mult=(1, 2, 3, 4)), "both sides must be multiples of 8"),
        ((4, 3, 0), dict(channel_mult=(1, 2, 3, 4)), r"use fewer levels, or pad images to 8 \(pad_to\)"),
        (
            (16, 3, 0),
            dict(channel_mult=(1, 2), attn_resolutions=(4,)),
            "no level has resolution 4; choose among those of the levels, 16, 8",
        ),
        (
            (16, 3, 0),
            dict(model_channels=24, channel_mult=(1, 2)),
            "channels_per_head 64 does not divide the 24 channels .*, such as 24",
        ),
        (
            (16, 3, 0),
            dict(model_channels=96, channel_mult=(1, 1)),
            "channels_per_head 64 does not divide the 96 channels .*, such as 48",
        ),
        ((16, 3, 2), dict(label_kind="text"), "label_kind 'text' is not 'class' or 'vector'"),
    ],
)
def test_bad_options(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        UNet(*arguments, **options)


def test_level_resolutions():
    assert level_resolutions((8, 32), 3) == [(8, 32), (4, 16), (2, 8)]


def test_count_flops_closed_forms():
    x = torch.zeros(2, 3, 8, 8, device="meta")
    w = torch.zeros(5, 3, 3, 3, device="meta")
    assert count_flops(torch.nn.functional.conv2d, x, w, padding=1) == 2 * 5 * 64 * 27
    assert count_flops(torch.nn.functional.silu, x) == 3 * x.numel()
    assert count_flops(torch.nn.functional.hardtanh, x) == count_flops(torch.clamp, x, -1, 1) == 2 * x.numel()
    assert count_flops(torch.nn.functional.linear, torch.zeros(4, 6), torch.zeros(7, 6)) == 4 * 6 * 7
    q = torch.zeros(1, 2, 10, 4, device="meta")
    # q k and attention-weighted v: 2 x 10 x 10 x 4 each; softmax 3 x 2 x 10 x 10; scaling of q and k
    attention = count_flops(torch.nn.functional.scaled_dot_product_attention, q, q, q)
    assert attention == 2 * 800 + 3 * 200 + 2 * 80
    with torch.device("meta"):
        layer = MPConv(6, 7)
        # The product; a norm, a division and a scale of each weight; the bookkeeping of seven norms.
        normalised = count_flops(layer.eval(), torch.zeros(4, 6))
    assert 4 * 6 * 7 + 3 * 6 * 7 <= normalised <= 4 * 6 * 7 + 3 * 6 * 7 + 5 * 7
