import pytest
import torch

from edm2.diffusion import build_denoiser, edm2_loss
from edm2.nn import count_flops
from edm2.train import learning_rate

# Parameters with the uncertainty head: 4 channels with and without 1000 classes, 3 channels likewise; Gflops of the
# first and third. EDM2 Table 6 has both, rounded.
SIZES = {
    64: (31_309_029, 31_053_029, 31_307_877, 31_051_877, 11.525, 11.520),
    128: (124_713_253, 124_201_253, 124_710_949, 124_198_949, 45.498, 45.488),
    192: (280_212_837, 279_444_837, 280_209_381, 279_441_381, 101.918, 101.904),
    256: (497_807_781, 496_783_781, 497_803_173, 496_779_173, 180.786, 180.767),
    320: (777_498_085, 776_218_085, 777_492_325, 776_212_325, 282.101, 282.077),
    384: (1_119_283_749, 1_117_747_749, 1_119_276_837, 1_117_740_837, 405.863, 405.835),
    448: (1_523_164_773, 1_521_372_773, 1_523_156_709, 1_521_364_709, 552.073, 552.040),
}


@pytest.fixture(scope="module")
def tiny(golden, fill_by_rule):
    return lambda: fill_by_rule(build_denoiser(**golden("net_tiny_state.json")["config"]))


def tensors(data, *names):
    return [torch.from_numpy(data[name]) for name in names]


def test_state_names_and_shapes(golden, tiny):
    state = golden("net_tiny_state.json")
    net = tiny()
    assert {(n, tuple(p.shape)) for n, p in net.named_parameters()} == {
        (n, tuple(s)) for n, s in state["parameters"]
    }
    assert {(n, tuple(b.shape)) for n, b in net.named_buffers()} == {
        (n, tuple(s)) for n, s in state["buffers"]
    }


def test_forward_equals_golden(golden, tiny, relative_error):
    data = golden("net_tiny.npz")
    x, sigma, labels = tensors(data, "x", "sigma", "labels")
    net = tiny().eval()
    denoised, logvar = net(x, sigma, labels, return_logvar=True)
    assert relative_error(denoised, data["denoised"]) < 1e-5
    assert relative_error(logvar.flatten(), data["logvar"]) < 1e-5
    assert relative_error(net(x, sigma), data["denoised_nolabel"]) < 1e-5
    one_hot = torch.nn.functional.one_hot(labels, 10).float()
    assert torch.equal(net(x, sigma, one_hot), denoised)


def test_loss_and_gradients_equal_golden(golden, tiny, relative_error):
    data = golden("net_tiny.npz")
    images, labels, sigma, noise = tensors(data, "images", "labels", "sigma", "noise")
    net = tiny().train()
    loss = edm2_loss(net, images, labels, sigma, noise)
    assert relative_error(loss.mean(dim=(1, 2, 3)), data["loss"]) < 1e-5
    (loss.sum() / len(images)).backward()
    parameters = dict(net.named_parameters())
    names = data["grad_names"].tolist()
    assert relative_error(torch.stack([parameters[n].grad.norm() for n in names]), data["grad_norms"]) < 1e-5
    norms = torch.stack([parameters[n].detach().norm() for n in names])
    assert relative_error(norms, data["weight_norms_after_forward"]) < 1e-5


def test_six_training_steps_and_both_averages_equal_golden(golden, tiny, relative_error):
    from edm2.ema import PowerEMA

    data = golden("net_tiny.npz")
    images, labels, sigma, noise = tensors(data, "images", "labels", "sigma", "noise")
    net = tiny().train()
    edm2_loss(net, images, labels, sigma, noise)
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    ema = PowerEMA(net, sigma_rels=(0.05, 0.10))
    losses = []
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step * 4, batch_size=4, ref_lr=0.01, ref_batches=2, rampup_mimg=8e-6)
        loss = edm2_loss(net, images, labels, sigma, noise)
        losses.append(float(loss.detach().mean()))
        optimizer.zero_grad()
        (loss.sum() / 4).backward()
        optimizer.step()
        ema.update((step + 1) * 4)
    assert relative_error(losses, data["train_losses"]) < 1e-4
    for sigma_rel in (0.05, 0.10):
        with ema.applied(net, sigma_rel):
            norms = [
                float(dict(net.named_parameters())[n].detach().norm()) for n in data["grad_names"].tolist()
            ]
        assert relative_error(norms, data[f"ema_norms_{sigma_rel:.3f}"]) < 1e-4


@pytest.mark.parametrize("channels", SIZES)
def test_parameters_and_gflops_of_every_size(channels):
    expected = SIZES[channels]
    with torch.device("meta"):
        kinds = [(4, 1000), (4, 0), (3, 1000), (3, 0)]
        nets = [build_denoiser(64, c, classes, model_channels=channels).eval() for c, classes in kinds]
        assert tuple(sum(p.numel() for p in net.parameters()) for net in nets) == expected[:4]
        for net, gflops in ((nets[0], expected[4]), (nets[2], expected[5])):
            inputs = torch.zeros(1, net.img_channels, 64, 64), torch.ones(1), torch.zeros(1, 1000)
            assert count_flops(net, *inputs) / 1e9 == pytest.approx(gflops, rel=1e-3)


def test_untrained_denoiser_is_c_skip_x():
    torch.manual_seed(0)
    net = build_denoiser(8, 1, model_channels=16, channel_mult=(1, 2), num_blocks=1, channels_per_head=16)
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 20.0])
    assert torch.allclose(net(x, sigma), 0.25 / (sigma**2 + 0.25).reshape(-1, 1, 1, 1) * x)


@pytest.fixture(scope="module")
def conditional(fill_by_rule):
    options = dict(
        model_channels=16, channel_mult=(1, 2), num_blocks=1, channels_per_head=16, cond_channels=2
    )
    return fill_by_rule(build_denoiser((8, 16), 4, 6, label_kind="vector", **options)).eval()


def test_image_condition_enters_clean_and_vectors_unscaled(conditional):
    inputs = []
    conditional.unet.register_forward_pre_hook(lambda _m, args: inputs.append(args))
    generator = torch.Generator().manual_seed(0)
    x, condition = (
        torch.randn(2, 4, 8, 16, generator=generator),
        torch.randn(2, 2, 8, 16, generator=generator),
    )
    vector = torch.randn(2, 6, generator=generator)
    for sigma in (0.01, 50.0):
        out = conditional(x, torch.tensor(sigma), vector, condition=condition)
        assert out.shape == x.shape
        assert torch.equal(inputs[-1][0][:, 4:], condition)
    assert conditional.unet.label_scale == 1
    assert not torch.allclose(out, conditional(x, torch.tensor(50.0), vector, condition=-condition))
    assert not torch.allclose(out, conditional(x, torch.tensor(50.0), -vector, condition=condition))


def test_config_rebuilds_the_same_network(conditional):
    import json

    twin = build_denoiser(**json.loads(json.dumps(conditional.options)))
    twin.load_state_dict(conditional.state_dict())
    assert twin.options == conditional.options


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_only_the_network_runs_in_reduced_precision(conditional, dtype):
    x, condition = torch.ones(1, 4, 8, 16), torch.ones(1, 2, 8, 16)
    reference = conditional(x, torch.tensor(0.5), condition=condition)
    conditional.dtype = getattr(torch, dtype)
    try:
        out = conditional(x, torch.tensor(0.5), condition=condition)
    finally:
        conditional.dtype = torch.float32
    assert out.dtype == torch.float32
    assert torch.allclose(out, reference, atol=0.05)
    assert not torch.equal(out, reference)


def test_label_errors(tiny, conditional):
    net = tiny().eval()
    x, sigma = torch.zeros(2, 3, 16, 16), torch.ones(2)
    with pytest.raises(ValueError, match=r"class index 10 is outside 0..9"):
        net(x, sigma, torch.tensor([0, 10]))
    with pytest.raises(ValueError, match=r"class index -1 is outside 0..9"):
        net(x, sigma, torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r"float labels of shape \(2, 4\) must be \[B, 10\]"):
        net(x, sigma, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="one-hot labels are float"):
        net(x, sigma, torch.zeros(2, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match="cond_channels=0 and was given a condition"):
        net(x, sigma, condition=x)
    with pytest.raises(ValueError, match="cond_channels=2 and was not given a condition"):
        conditional(torch.zeros(1, 4, 8, 16), torch.ones(1))
    with pytest.raises(ValueError, match="dtype 'int8' is not float32, bfloat16 or float16"):
        build_denoiser(8, 1, dtype="int8")


def test_images_and_noise_levels_that_do_not_fit(tiny):
    net = tiny().eval()
    with pytest.raises(
        ValueError, match=r"\(1, 3, 32, 32\): this denoiser was built for 3 x 16 x 16, .* resize"
    ):
        net(torch.zeros(1, 3, 32, 32), torch.ones(1))
    with pytest.raises(ValueError, match=r"\(1, 4, 16, 16\): this denoiser was built for 3 x 16 x 16"):
        net(torch.zeros(1, 4, 16, 16), torch.ones(1))
    with pytest.raises(ValueError, match=r"images of shape \(3, 16, 16\) must be \[B, C, H, W\]"):
        net(torch.zeros(3, 16, 16), torch.ones(1))
    with pytest.raises(ValueError, match="3 noise levels for 2 images: give one for all, or one for each"):
        net(torch.zeros(2, 3, 16, 16), torch.ones(3))


def test_a_state_from_before_the_network_named_its_configuration_loads():
    options = dict(config="D", model_channels=16, channel_mult=(1,), num_blocks=1, channels_per_head=16)
    net = build_denoiser(8, 1, **options)
    state = net.state_dict()
    state["ladder_config"] = state.pop("unet.config")
    build_denoiser(8, 1, **options).load_state_dict(state)
    with pytest.raises(ValueError, match="of config D and cannot be loaded into config C"):
        build_denoiser(8, 1, **{**options, "config": "C"}).load_state_dict(state)


@pytest.mark.slow
def test_one_graph_for_compile(tiny):
    net = tiny().eval()
    x, sigma, labels = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 4.0]), torch.tensor([1, 7])
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x, sigma, labels), net(x, sigma, labels), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    net.train()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    compiled(x, sigma, labels, dropout_index=torch.arange(2)).sum().backward()


def test_forward_never_waits_for_the_device(tiny):
    """Meta tensors have no values: any read of one by the host raises."""
    net = tiny().to("meta").train()
    x = torch.zeros(2, 3, 16, 16, device="meta")
    labels = torch.zeros(2, dtype=torch.int64, device="meta")
    assert net(x, torch.ones(2, device="meta"), labels).shape == x.shape
