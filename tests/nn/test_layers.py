import copy

import pytest
import torch

from edm2.nn import ForcedWeightNorm, MPConv, MPFourier, UNet, normalize


def test_fourier_equals_golden(golden, fill_by_rule, relative_error):
    ops = golden("ops.npz")
    layer = fill_by_rule(MPFourier(12), "fourier.")
    assert relative_error(layer(torch.from_numpy(ops["fourier_in"])), ops["fourier_out"]) < 1e-5


@pytest.mark.parametrize(("name", "kernel"), [("linear", ()), ("conv1", (1, 1)), ("conv3", (3, 3))])
def test_conv_equals_golden(golden, fill_by_rule, relative_error, name, kernel):
    ops = golden("ops.npz")
    x = torch.from_numpy(ops["linear_in" if name == "linear" else "a"])
    layer = fill_by_rule(MPConv(6, 5, kernel), f"{name}.").eval()
    assert relative_error(layer(x), ops[f"{name}_eval"]) < 1e-5
    assert relative_error(layer(x, gain=0.7), ops[f"{name}_eval_gain0.7"]) < 1e-5
    assert relative_error(layer.train()(x), ops[f"{name}_train"]) < 1e-5
    assert relative_error(layer.weight, ops[f"{name}_weight_after"]) < 1e-5


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3), (3, 5)])
def test_conv_preserves_unit_magnitude(kernel):
    torch.manual_seed(0)
    layer = MPConv(256, 512, kernel)
    x = torch.randn(8, 256, *((12, 12) if kernel else ()))
    y = layer(x).detach()
    inner = y[..., 2:-2, 2:-2] if kernel else y  # zero padding lowers the border
    assert inner.square().mean().sqrt() == pytest.approx(1, abs=0.03)


def test_output_does_not_depend_on_the_stored_scale_and_gradient_is_orthogonal():
    torch.manual_seed(0)
    layer = MPConv(16, 8, (3, 3)).eval()
    x = torch.randn(2, 16, 6, 6)
    y = layer(x)
    (y**3).sum().backward()
    cosine = torch.cosine_similarity(layer.weight.flatten(1), layer.weight.grad.flatten(1))
    assert cosine.abs().max() < 1e-3
    with torch.no_grad():
        layer.weight.mul_(5)
    assert torch.allclose(layer(x), y, rtol=2e-3, atol=1e-4)


def test_fourier_features_have_unit_magnitude_and_do_not_train():
    torch.manual_seed(0)
    layer = MPFourier(4096)
    assert not list(layer.parameters())
    assert layer(torch.linspace(-2, 2, 64)).square().mean().sqrt() == pytest.approx(1, abs=0.01)
    assert layer(torch.zeros(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_one_pass_equals_layer_by_layer():
    torch.manual_seed(0)
    options = dict(model_channels=16, channel_mult=(1, 2), num_blocks=1, channels_per_head=16)
    plain = UNet(16, 2, 3, **options).train()
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.3 * torch.randn_like(p))
    fast = copy.deepcopy(plain)
    force = ForcedWeightNorm(fast)
    x, c_noise, labels = torch.randn(3, 2, 16, 16), torch.randn(3), torch.eye(3)
    for _ in range(2):
        force()
        y_plain, y_fast = plain(x, c_noise, labels), fast(x, c_noise, labels)
        assert torch.allclose(y_plain, y_fast, rtol=1e-5, atol=1e-6)
        for net, y in ((plain, y_plain), (fast, y_fast)):
            net.zero_grad()
            y.square().sum().backward()
        for (name, a), b in zip(plain.named_parameters(), fast.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-7), name
            assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5 * float(a.grad.abs().max())), name


def test_forced_norm_acts_in_training_only_and_is_idempotent():
    torch.manual_seed(0)
    layer = MPConv(8, 4)
    before = layer.weight.detach().clone()
    layer.eval()(torch.randn(2, 8))
    assert torch.equal(layer.weight, before)
    force = ForcedWeightNorm(layer)
    layer.train()(torch.randn(2, 8))
    assert torch.equal(layer.weight, before)
    force()
    once = layer.weight.detach().clone()
    assert torch.allclose(once.square().mean(1).sqrt(), torch.ones(4), atol=1e-3)
    force()
    assert torch.allclose(layer.weight, once, rtol=3e-4)  # its fixed point is an RMS of 1 - 1e-4


@pytest.mark.parametrize("kernel", [(3,), (2, 2), (3, 0)])
def test_bad_kernel(kernel):
    with pytest.raises(ValueError, match=r"must be \(\) for a linear map, or two odd sizes"):
        MPConv(4, 4, kernel)


def loaded(net):
    net.load_state_dict({name: 3 * value for name, value in net.state_dict().items()}, assign=True)
    return net[0].weight


def moved(net):
    with torch.no_grad():
        net.double()[0].weight.mul_(3)
    return net[0].weight


def shared(net):
    net[1].weight = net[0].weight
    with torch.no_grad():
        return net[0].weight.mul_(3)


@pytest.mark.parametrize("change", [loaded, moved, shared])
def test_one_pass_acts_on_the_weights_that_the_layers_have_now(change):
    torch.manual_seed(0)
    net = torch.nn.Sequential(MPConv(8, 8), MPConv(8, 8))
    force = ForcedWeightNorm(net)
    weight = change(net)
    wanted = normalize(weight.detach())
    force()
    torch.testing.assert_close(net[0].weight.detach(), wanted, rtol=1e-6, atol=1e-7)


def test_a_graph_of_two_passes_needs_the_one_pass():
    layer, x = MPConv(8, 8), torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        layer(layer(x)).sum().backward()
    ForcedWeightNorm(layer)()
    layer(layer(x)).sum().backward()
