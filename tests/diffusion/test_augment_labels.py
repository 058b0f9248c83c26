"""A network that is told how images were augmented is, without being told, the network that never was."""

import pytest
import torch

from edm2.diffusion import build_denoiser, load_model, save_model
from edm2.nn import UNet, rms
from edm2.nn.functional import mp_add

LETTERS = "ABCDEFG"
SIZE = dict(model_channels=16, channel_mult=(1, 2), num_blocks=1, channels_per_head=16, attn_resolutions=(4,))


def speak(module):
    """Let gains and branches that start at 0 have an output."""
    with torch.no_grad():
        for index, p in enumerate(module.parameters()):
            if p.abs().max() == 0:
                p.normal_(generator=torch.Generator().manual_seed(index)).mul_(0.3)
    return module.eval()


def pair(config):
    """The same weights with and without the layer for labels of augmentation."""
    made = []
    for dim in (9, 0):
        torch.manual_seed(0)
        made.append(speak(build_denoiser(8, 1, 3, config=config, augment_dim=dim, **SIZE)))
    return made


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(4, 1, 8, 8, generator=g),
        torch.tensor([0.1, 0.5, 1.0, 20.0]),
        torch.tensor([0, 1, 2, 0]),
    )


@pytest.mark.parametrize("config", LETTERS)
def test_no_label_and_the_label_zero_are_the_network_without(config, inputs):
    told, plain = pair(config)
    assert torch.equal(plain(*inputs), told(*inputs))
    assert torch.equal(plain(*inputs), told(*inputs, augment_labels=torch.zeros(4, 9)))
    label = torch.zeros(4, 9)
    label[1, 0] = 1
    changed = (told(*inputs, augment_labels=label) != plain(*inputs)).flatten(1).any(1)
    assert changed.tolist() == [False, True, False, False]


@pytest.mark.parametrize("config", LETTERS)
def test_one_weight_without_bias_and_no_other_name(config):
    told, plain = pair(config)
    added = told.state_dict().keys() - plain.state_dict().keys()
    assert added == {"unet.emb_augment.weight"}
    assert told.state_dict()["unet.emb_augment.weight"].shape == (32, 9)
    assert told.options == {**plain.options, "augment_dim": 9}


def test_images_that_were_not_augmented_teach_the_layer_nothing(inputs):
    told, _ = pair("G")
    told(*inputs, augment_labels=torch.zeros(4, 9)).square().sum().backward()
    assert told.unet.emb_augment.weight.grad.abs().max() == 0
    told(*inputs, augment_labels=torch.ones(4, 9)).square().sum().backward()
    assert told.unet.emb_augment.weight.grad.abs().max() > 0


def test_the_embedding_keeps_unit_magnitude_in_g():
    torch.manual_seed(0)
    net = UNet(8, 1, 0, model_channels=256, channel_mult=(1, 2), num_blocks=1, augment_dim=9)
    net.requires_grad_(False)
    c_noise = torch.randn(500)
    plain = rms(net.embed(c_noise, None, torch.float32), 1).mean()
    for size in (0.3, 1.0, 4.0):
        label = size * torch.randn(500, 9)
        assert float(rms(net.embed(c_noise, None, torch.float32, label), 1).mean()) == pytest.approx(
            float(plain), rel=0.03
        )
    a, b = torch.randn(500, 400), 3 * torch.randn(500, 400)
    assert float(rms(mp_add(a, b, torch.full((500, 1), 3.0)), (0, 1))) == pytest.approx(1, rel=0.01)


def test_a_saved_model_keeps_the_layer(tmp_path, inputs):
    told, _ = pair("E")
    file = save_model(tmp_path / "model", told.options, told.state_dict())
    again, _ = load_model(file)
    label = torch.randn(4, 9)
    assert torch.equal(again(*inputs, augment_labels=label), told(*inputs, augment_labels=label))


def test_labels_that_do_not_fit(inputs):
    told, plain = pair("G")
    with pytest.raises(
        ValueError, match="has no augment_dim: leave them out, or build it with augment_dim=9"
    ):
        plain(*inputs, augment_labels=torch.zeros(4, 9))
    with pytest.raises(ValueError, match=r"augment_labels of shape \(4, 8\) must be \[B, 9\]"):
        told(*inputs, augment_labels=torch.zeros(4, 8))
