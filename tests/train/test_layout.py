"""Which memory layout training and sampling choose by themselves; the values are the same in both."""

import pytest
import torch
from tiny_run import log_of, tiny_config, tiny_data

from edm2.diffusion import build_denoiser
from edm2.generate import ImageGenerator
from edm2.nn import faster_channels_last
from edm2.train import train


def is_last(net: torch.nn.Module) -> bool:
    weight = net.unet.enc["4x4_block0"].conv_res0.weight
    return not weight.is_contiguous()


@pytest.mark.parametrize("config", "ABCDEFG")
def test_group_norm_of_a_and_b_is_slow_channels_last_on_the_cpu_only(config):
    options = dict(config=config, model_channels=16, channel_mult=(1,), num_blocks=1, channels_per_head=16)
    assert faster_channels_last(build_denoiser(8, 1, **options)) is (config not in "AB")
    with torch.device("meta"):
        assert faster_channels_last(build_denoiser(8, 1, **options))


@pytest.mark.parametrize("config", "AG")
def test_training_and_sampling_choose_the_layout_and_may_be_told(config, tmp_path):
    losses = {}
    for wanted in (None, True, False):
        settings = tiny_config(config=config, channels_last=wanted)
        seen = set()
        out = tmp_path / str(wanted)
        train(
            settings,
            out,
            dataset=tiny_data(),
            on_step=lambda trainer, seen=seen: seen.add(is_last(trainer.denoiser)),
        )
        assert seen == {config != "A" if wanted is None else wanted}
        losses[wanted] = log_of(out)[-1]["loss"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert is_last(ImageGenerator.load(tmp_path / "None").denoiser) is (config != "A")
