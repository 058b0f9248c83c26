"""Forward derivatives through the networks, as continuous-time consistency training and likelihoods need them."""

import pytest
import torch
from torch.func import jvp

from edm2.diffusion import build_denoiser
from edm2.nn import CONFIGS, ForcedWeightNorm


def tiny(config, speak):
    torch.manual_seed(0)
    return speak(
        build_denoiser(
            8, 1, 3, config=config, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,),
            channels_per_head=16, dropout=0.0,
        )
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
@pytest.mark.parametrize(("config", "training"), [*((c, False) for c in CONFIGS), ("G", True)])
def test_jvp_agrees_with_finite_differences(config, training, speak):
    denoiser = tiny(config, speak).train(training)
    if training:
        ForcedWeightNorm(denoiser)()  # weights are then normalised before a step, not in the forward pass
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 2.0]), torch.tensor([0, 2])
    along = (torch.randn_like(x), torch.tensor([0.1, -0.4]))

    def denoise(x, sigma):
        return denoiser(x, sigma, labels)

    with torch.no_grad():
        _, found = jvp(denoise, (x, sigma), along)
        step = 2e-3
        ahead, behind = (denoise(x + h * along[0], sigma + h * along[1]) for h in (step, -step))
    wanted = (ahead - behind) / (2 * step)
    assert (found - wanted).norm() < 5e-3 * wanted.norm()
