import dataclasses

import pytest
import torch
from torch import nn

from edm2.diffusion import build_denoiser
from edm2.nn import ForcedWeightNorm
from edm2.nn.magnitudes import MagnitudeRecorder


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))


def one_step(net, x, lr=0.5):
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


def test_equals_what_is_computed_by_hand():
    net, x = small_net(), torch.randn(5, 6)
    hidden, before = net[0](x), net[2].weight.detach().clone()
    recorder = MagnitudeRecorder(net)
    with recorder.step():
        one_step(net, x)
    found = recorder.read()
    assert list(found.activations) == ["0", "2"]
    assert found.activations["0"] == pytest.approx(float(hidden.detach().square().mean().sqrt()), rel=1e-6)
    assert list(found.weights) == list(found.gradients) == list(found.updates) == ["0.weight", "2.weight"]
    assert found.weights["2.weight"] == pytest.approx(float(before.square().mean().sqrt()), rel=1e-6)
    gradient = net[2].weight.grad
    assert found.gradients["2.weight"] == pytest.approx(float(gradient.square().mean().sqrt()), rel=1e-6)
    assert found.updates["2.weight"] == pytest.approx(float(0.5 * gradient.norm() / before.norm()), rel=1e-5)


def test_several_forward_passes_are_averaged_in_the_square():
    net = small_net()
    recorder = MagnitudeRecorder(net, blocks=lambda name, module: name == "0")
    a, b = torch.randn(4, 6), 3 * torch.randn(4, 6)
    with recorder.step():
        (net(a).mean() + net(b).mean()).backward()
    whole = net[0](torch.cat([a, b])).detach().square().mean().sqrt()
    assert recorder.read().activations == {"0": pytest.approx(float(whole), rel=1e-6)}


def test_changes_nothing_and_leaves_no_hook():
    plain, watched, x = small_net(), small_net(), torch.randn(5, 6)
    one_step(plain, x)
    recorder = MagnitudeRecorder(watched)
    with recorder.step():
        one_step(watched, x)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    with pytest.raises(RuntimeError), recorder.step():
        raise RuntimeError
    assert not any(module._forward_hooks for module in watched.modules())


def test_blocks_of_the_unet_have_unit_magnitude_at_the_start():
    torch.manual_seed(0)
    net = build_denoiser(
        16, 3, model_channels=32, channel_mult=(1, 2), num_blocks=1, channels_per_head=16
    ).train()
    ForcedWeightNorm(net)()
    recorder = MagnitudeRecorder(net)
    with recorder.step():
        net(0.5**0.5 * torch.randn(8, 3, 16, 16), torch.full((8,), 0.5)).mean().backward()
    found = recorder.read()
    assert {name.split(".")[1] for name in found.activations} == {"enc", "dec"}
    assert len(found.activations) == len(net.unet.enc) + len(net.unet.dec)
    assert all(0.8 < value < 1.2 for value in found.activations.values())
    assert all(
        value == pytest.approx(1.0, abs=2e-3) for name, value in found.weights.items() if "unet" in name
    )


def test_outputs_in_containers_and_models_without_lists():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.both = nn.Identity()

        def forward(self, x):
            return self.both({"count": torch.tensor(3), "pair": (self.linear(x), x)})

    net = Pair()
    recorder = MagnitudeRecorder(net)
    with recorder.step():
        net(torch.ones(1, 2))["pair"][0].sum().backward()
    found = recorder.read().activations
    assert found["both"] == pytest.approx(found["linear"])


def test_bad_use():
    net = small_net()
    with pytest.raises(ValueError, match="no module of the model was chosen"):
        MagnitudeRecorder(net, blocks=lambda name, module: False)
    recorder = MagnitudeRecorder(net)
    with pytest.raises(ValueError, match="no step was recorded"):
        recorder.read()
    with recorder.step():
        pass
    with pytest.raises(ValueError, match="compiled graphs bypass the hooks"):
        recorder.read()


class ByHand(nn.Module):
    """A model without parts."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 3), 2.0))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("blocks", [None, lambda name, module: name == ""])
def test_a_model_without_parts_is_measured_itself(blocks):
    net = ByHand()
    recorder = MagnitudeRecorder(net, blocks=blocks)
    with recorder.step():
        one_step(net, torch.ones(1, 3))
    found = recorder.read()
    assert found.activations == {"ByHand": 6.0}
    assert found.weights == {"weight": 2.0}


def test_gradients_of_rows():
    both = []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Linear(4, 2))
        recorder = MagnitudeRecorder(net)
        with recorder.step():
            one_step(net, torch.tensor([1, 1, 5]))
        both.append(recorder.read())
    assert both[1].gradients == pytest.approx(both[0].gradients)
    assert both[1].updates == pytest.approx(both[0].updates)


def test_norms_beyond_float16():
    net = nn.Sequential(nn.Linear(1024, 1024, bias=False)).half()
    nn.init.constant_(net[0].weight, 100.0)
    recorder = MagnitudeRecorder(net)
    with recorder.step():
        net(torch.full((1, 1024), 1e-4, dtype=torch.float16)).float().sum().backward()
        with torch.no_grad():
            net[0].weight *= 1.25
    found = recorder.read()
    assert found.weights == {"0.weight": pytest.approx(100.0)}
    assert found.updates == {"0.weight": pytest.approx(0.25)}
    assert found.activations == {"0": pytest.approx(10.24, rel=1e-2)}


def test_parameters_are_those_of_the_step():
    net, x = small_net().requires_grad_(False), torch.randn(5, 6)
    recorder = MagnitudeRecorder(net)
    net.load_state_dict({name: 3 * value for name, value in net.state_dict().items()}, assign=True)
    net[2].requires_grad_(True)
    expected = float(net[2].weight.detach().square().mean().sqrt())
    with recorder.step():
        net(x).sum().backward()
    assert recorder.read().weights == {"2.weight": pytest.approx(expected)}


def test_a_step_that_failed_was_not_recorded():
    net = small_net()
    recorder = MagnitudeRecorder(net)
    with recorder.step():
        net(torch.ones(1, 6))
    with pytest.raises(RuntimeError), recorder.step():
        raise RuntimeError
    with pytest.raises(ValueError, match="no step was recorded"):
        recorder.read()


def test_outputs_in_dataclasses_complex_and_empty_ones():
    @dataclasses.dataclass
    class Output:
        count: int
        values: torch.Tensor

    class Block(nn.Linear):
        def forward(self, x):
            return Output(len(x), super().forward(x))

    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(0, 2))

        def forward(self, x):
            return x @ self.weight.T

    blocks = nn.ModuleList([Block(2, 2), Nothing(), nn.Linear(2, 2, dtype=torch.complex64)])
    recorder = MagnitudeRecorder(blocks)
    with recorder.step():
        values = blocks[0](torch.ones(1, 2)).values
        blocks[1](values)
        complex_values = blocks[2](values.to(torch.complex64))
    found = recorder.read()
    assert found.activations == {
        "0": pytest.approx(float(values.detach().square().mean().sqrt())),
        "2": pytest.approx(float(complex_values.detach().abs().square().mean().sqrt())),
    }
    assert found.weights["1.weight"] == 0.0


def test_a_model_without_matrices_that_are_trained():
    net = small_net().requires_grad_(False)
    recorder = MagnitudeRecorder(net)
    with recorder.step():
        net(torch.ones(1, 6))
    found = recorder.read()
    assert list(found.activations) == ["0", "2"]
    assert found.weights == found.gradients == found.updates == {}
