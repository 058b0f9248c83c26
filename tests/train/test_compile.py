"""`compile`: blocks are compiled one by one, for training only, and train as before."""

import copy
import dataclasses
import json

import pytest
import torch

from edm2.data import open_dataset
from edm2.nn import UNet
from edm2.presets import get_preset
from edm2.train import train
from edm2.train.build import checkpoint_activations, compile_blocks


def tiny():
    torch.manual_seed(0)
    return UNet(
        8, 1, 0, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8
    )


def test_blocks_are_compiled_with_gradients_only_and_copies_are_independent(monkeypatch):
    calls = []

    def compiler(forward, *, dynamic):
        assert dynamic is False
        return lambda *args: calls.append(1) or forward(*args)

    monkeypatch.setattr(torch, "compile", compiler)
    net = tiny().eval()
    x, sigma = torch.randn(2, 1, 8, 8), torch.zeros(2)
    before = net(x, sigma)
    compile_blocks(list(net.dec.values()))
    checkpoint_activations(list(net.dec.values()), keyed_dropout=True)
    torch.testing.assert_close(net(x, sigma), before)
    assert len(calls) == len(net.dec)
    with torch.no_grad():
        net(x, sigma)
        other = copy.deepcopy(net)
        for parameter in net.parameters():
            parameter.zero_()
        torch.testing.assert_close(other(x, sigma), before)
    assert len(calls) == len(net.dec)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_a_compiled_run_is_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    preset = get_preset("digits")
    network = dataclasses.replace(
        preset.network,
        model_channels=8,
        channel_mult=(1,),
        num_blocks=1,
        attn_resolutions=(8,),
        channels_per_head=8,
    )
    config = dataclasses.replace(
        preset, num_images=24, batch_size=8, log_images=8, network=network, validation="0.1", device="cpu"
    )
    losses = []
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        train(dataclasses.replace(config, compile=compiled), out, dataset=open_dataset("digits"), quiet=True)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) >= 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
