"""What every configuration keeps, and what some of them do not."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edm2.nn import (
    CONFIGS,
    ForcedWeightNorm,
    GroupNormBlock,
    MPConv,
    NormalizedConv,
    PlainConv,
    UNet,
    get_features,
    rms,
)

TINY = dict(model_channels=16, channel_mult=(1, 2), num_blocks=1, channels_per_head=16)
LETTERS = "ABCDEFG"


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 2, 16, 16, generator=generator), torch.randn(4, generator=generator)


def make(config, *, label_dim=0, channels=2, resolution=16, **options):
    torch.manual_seed(0)
    return UNet(resolution, channels, label_dim, config=config, **TINY | options)


def test_neighbours_differ_in_what_the_paper_changes():
    def changes(a, b):
        old, new = CONFIGS[a], CONFIGS[b]
        names = [field.name for field in dataclasses.fields(old)]
        return {n for n in names if getattr(old, n) != getattr(new, n)} - {"name", "title"}

    assert changes("A", "B") == {"attn_resolutions", "uncertainty"}
    assert changes("C", "D") == changes("D", "E") == {"weights"}
    assert changes("E", "F") == {"group_norm", "embedding_layers"}
    assert changes("F", "G") == {"fixed_functions", "gains", "dropout", "eps_inside_root"}


@pytest.mark.parametrize("config", LETTERS)
def test_untrained_output(config, inputs):
    out = make(config)(*inputs)
    assert (out.abs().max() == 0) == (config in "ABG")
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(("config", "expected"), [("C", 0.36), ("D", 0.54), ("E", 0.54), ("F", 1.89)])
def test_magnitude_of_the_untrained_output(config, expected):
    """Values that another implementation gave from one seed."""
    torch.manual_seed(0)
    net = UNet(32, 4, 1000, config=config, model_channels=64).eval()
    with torch.no_grad():
        out = net(torch.randn(4, 4, 32, 32), torch.randn(4) * 0.3, torch.eye(1000)[:4])
    assert float(rms(out, (0, 1, 2, 3))) == pytest.approx(expected, rel=0.3)


def test_what_starts_at_zero():
    zero = {c: {n for n, p in make(c).named_parameters() if p.abs().max() == 0} for c in LETTERS}
    ends = {
        n for n, _ in make("A").named_parameters() if "conv_res1" in n or "attn_proj" in n or "out_conv" in n
    }
    norms = {n for n, _ in make("A").named_parameters() if "norm" in n and n.endswith("bias")}
    assert zero["A"] == ends | norms
    assert zero["B"] == zero["A"]
    assert not (zero["C"] | zero["D"] | zero["E"] | zero["F"])
    assert zero["G"] == {n for n, _ in make("G").named_parameters() if n.endswith("gain")}


@pytest.mark.parametrize("config", LETTERS)
def test_only_free_weights_set_the_magnitude_of_activations(config, inputs, speak):
    """What lets activations grow with the weights in A to C; the norms of D and later take the scale out."""
    net = speak(make(config)).eval()
    seen = []
    for part in (net.enc, net.dec):
        for layer in part.values():
            layer.register_forward_hook(lambda _m, _i, out: seen.append(float(rms(out, (0, 1, 2, 3)))))
    with torch.no_grad():
        net(*inputs)
        before = torch.tensor(seen)
        for module in net.modules():
            if isinstance(module, (PlainConv, NormalizedConv)):
                module.weight *= 3
        seen.clear()
        net(*inputs)
    ratio = torch.tensor(seen) / before
    if config in "ABC":
        assert ratio[0] > 1.5
        assert ratio.mean() > 2
    else:
        assert torch.allclose(ratio, torch.ones(()), atol=0.01)


@pytest.mark.parametrize("config", LETTERS)
def test_gradients_are_orthogonal_to_normalised_weights(config, inputs, speak):
    net = speak(make(config)).eval()
    net(*inputs).square().sum().backward()
    convs = [m for m in net.modules() if isinstance(m, (PlainConv, NormalizedConv))]
    cosines = [F.cosine_similarity(m.weight.flatten(1), m.weight.grad.flatten(1)).abs().max() for m in convs]
    assert (max(cosines) < 0.01) == (config in "DEFG")


@pytest.mark.parametrize("config", LETTERS)
def test_stored_weights_are_normalised_in_training_from_e_on(config, inputs):
    net = make(config)
    weights = [m.weight for m in net.modules() if isinstance(m, NormalizedConv)]
    with torch.no_grad():
        for w in weights:
            w *= 3
    net.train()(*inputs)
    if config in "EFG":
        for w in weights:
            assert torch.allclose(rms(w, tuple(range(1, w.ndim))), torch.ones(()), atol=1e-3)
    else:
        assert all(rms(w, tuple(range(w.ndim))) > 2 for w in weights)
        assert not any(isinstance(m, MPConv) for m in net.modules())
        before = [p.detach().clone() for p in net.parameters()]
        ForcedWeightNorm(net)()
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("config", LETTERS)
def test_dropout_is_a_function_of_the_key(config, inputs, speak):
    x, c_noise = inputs
    net, index = speak(make(config, dropout=0.5)).train(), torch.arange(4) + 100
    whole = net(x, c_noise, dropout_index=index, dropout_seed=3)
    part = net(x[1:3], c_noise[1:3], dropout_index=index[1:3], dropout_seed=3)
    assert torch.allclose(whole[1:3], part, atol=1e-5)
    assert not torch.allclose(whole, net(x, c_noise, dropout_index=index, dropout_seed=4), atol=1e-3)
    net.eval()
    assert torch.equal(net(x, c_noise, dropout_index=index), net(x, c_noise))


def test_dropout_and_attention_by_default():
    nets = {c: make(c, resolution=(32, 64), channel_mult=(1, 2, 2, 2), dropout=None) for c in LETTERS}
    for config, net in nets.items():
        assert net.features.dropout == (0 if config == "G" else 0.1)
        with_attention = {
            n.split("x")[0] for n, m in net.enc.items() if getattr(m, "attn_qkv", None) is not None
        }
        assert with_attention == ({"32", "16", "8"} if config == "A" else {"16", "8"})


@pytest.mark.parametrize("config", LETTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_is_close_to_float32(config, dtype, inputs, speak):
    x, c_noise = inputs
    net = speak(make(config, label_dim=3)).eval()
    with torch.no_grad():
        reference, reduced = (
            net(x, c_noise, torch.eye(3)[[0, 1, 2, 0]]),
            net(x.to(dtype), c_noise, torch.eye(3)[[0, 1, 2, 0]]),
        )
    assert reduced.dtype == dtype
    error = rms(reduced.float() - reference, (0, 1, 2, 3)) / rms(reference, (0, 1, 2, 3))
    assert error < (0.05 if dtype == torch.bfloat16 else 0.006)


def test_embedding_and_logits_stay_float32_in_a_and_b_only(inputs):
    dtypes = {}
    for config in LETTERS:
        net = make(config).eval()
        net.emb_noise.register_forward_hook(lambda _m, _i, out, c=config: dtypes.update({c: out.dtype}))
        net(inputs[0].half(), inputs[1])
    assert dtypes == {c: torch.float32 if c in "AB" else torch.float16 for c in LETTERS}
    # Logits of 2e5 are beyond float16.
    x = torch.full((1, 16, 2, 2), 300.0, dtype=torch.float16)
    x[:, :, 0] = 0
    block = GroupNormBlock(16, 16, 8, get_features("B"), attention=True, channels_per_head=16)
    block.attn_norm = nn.Identity()
    with torch.no_grad():
        block.attn_qkv.weight.copy_(torch.eye(16).repeat_interleave(3, 0)[:, :, None, None])
        block.attn_qkv.bias.zero_()
        block.attn_proj.weight.copy_(torch.eye(16)[:, :, None, None])
        out = block.attention_branch(x)
    assert out.dtype == torch.float16
    assert torch.allclose(out[:, :, 1].float(), torch.tensor(300.0))


@pytest.mark.parametrize("config", LETTERS)
def test_rectangles_image_conditions_and_vectors(config, speak):
    options = dict(label_dim=6, channels=5, resolution=(16, 32), cond_channels=2, label_kind="vector")
    net = speak(make(config, attn_resolutions=(8,), **options)).eval()
    generator = torch.Generator().manual_seed(1)
    x, vector = torch.randn(2, 7, 16, 32, generator=generator), torch.randn(2, 6, generator=generator)
    with torch.no_grad():
        out = net(x, torch.ones(2), vector)
        assert out.shape == (2, 5, 16, 32)
        assert not torch.allclose(out, net(x, torch.ones(2), -vector), atol=1e-4)
        assert not torch.allclose(
            out, net(torch.cat([x[:, :5], -x[:, 5:]], 1), torch.ones(2), vector), atol=1e-4
        )


@pytest.mark.parametrize("config", LETTERS)
@pytest.mark.parametrize(("kind", "label"), [("class", 1000**0.5), ("vector", 1.0)])
def test_labels_reach_the_embedding_at_the_scale_of_their_kind(config, kind, label):
    """One-hot or of unit RMS, a label contributes equally: magnitude 1, or that of C's init, 1/sqrt(3)."""
    torch.manual_seed(0)
    net = UNet(8, 1, 1000, config=config, label_kind=kind, **TINY).eval()
    labels = torch.eye(1000)[:50] if kind == "class" else torch.randn(50, 1000)
    out = net.emb_label(labels * net.label_scale).detach()
    assert float(rms(out, (0, 1))) == pytest.approx(3**-0.5 if config == "C" else 1, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("config", LETTERS)
def test_one_graph_for_compile(config, inputs):
    net, graphs = make(config, label_dim=3, channel_mult=(1,), attn_resolutions=()).train(), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=backend, fullgraph=True)
    labels = torch.eye(3)[[0, 1, 2, 0]]
    out = compiled(*inputs, labels, dropout_index=torch.arange(4))
    assert torch.allclose(out, net(*inputs, labels, dropout_index=torch.arange(4)), atol=1e-5)
    assert len(graphs) == 1


def test_options_change_what_they_name(inputs, speak):
    def out(config, **options):
        with torch.no_grad():
            return speak(make(config, **options)).eval()(*inputs)

    for config, options in (
        ("F", dict(clip_act=0.5)),
        ("G", dict(res_balance=0.5)),
        ("G", dict(attn_balance=0.0)),
        ("G", dict(concat_balance=0.3)),
    ):
        assert not torch.equal(out(config), out(config, **options)), (config, options)
    assert torch.equal(out("G"), out("G", clip_act=math.inf))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("H", {}, "config 'H' is not one of A, B, C, D, E, F, G"),
        ("g", {}, "config 'g' is not one of"),
        ("C", dict(res_balance=0.3), "config C has no res_balance, which belongs to G: leave it out"),
        ("A", dict(dropout=1.0), r"dropout 1.0 must be in \[0, 1\)"),
        ("E", dict(clip_act=0), "clip_act 0 must be above 0; inf for no bound"),
        ("G", dict(label_balance=1.5), r"label_balance 1.5 must be in \[0, 1\]"),
        (
            "A",
            dict(channels_per_head=64),
            "channels_per_head 64 does not divide the 16 channels of a block .*: choose a divisor, such as 16",
        ),
        (
            "G",
            dict(model_channels=24, channel_mult=(1,), channels_per_head=16),
            "channels_per_head 16 does not divide the 24 channels .* such as 12",
        ),
    ],
)
def test_errors(config, options, message):
    with pytest.raises(ValueError, match=message):
        make(config, **options)


def test_states_of_other_configurations_are_refused():
    with pytest.raises(
        ValueError, match="this state is of config C and cannot be loaded into config D: build"
    ):
        make("D").load_state_dict(make("C").state_dict())
    make("D").load_state_dict(make("D").state_dict())
