"""diffusers' schedulers and guiders drive our networks to our images."""

import pytest
import torch
from small import small_denoiser

from edm2.diffusion import Denoiser, guided, sample_dpmpp_2m, sample_euler, time_steps
from edm2.nn import keyed_normal

diffusers = pytest.importorskip("diffusers")
NOISE = keyed_normal(torch.arange(4), (1, 8, 8))
LABELS = torch.arange(4) % 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network that went through a folder of diffusers."""
    from edm2.hub.diffusers import EDM2Model

    folder = tmp_path_factory.mktemp("model")
    EDM2Model.from_denoiser(small_denoiser(attn_resolutions=(4,))).save_pretrained(folder)
    return EDM2Model.from_pretrained(folder)


@torch.no_grad()
def drive(scheduler, predict, num_steps=12):
    """The loop of diffusers' pipelines, from the noise of edm2's samplers."""
    scheduler.set_timesteps(num_steps)
    x = NOISE * scheduler.config.sigma_max
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    return x


def distance(a, b):
    return float((a - b).abs().max())


def test_euler_scheduler_equals_our_sampler(model):
    made = drive(model.scheduler(), lambda x, t: model(x, t, LABELS).sample)
    assert (
        distance(made, sample_euler(small_denoiser(attn_resolutions=(4,)), NOISE, time_steps(12), LABELS))
        < 1e-4
    )


def test_multistep_scheduler_equals_our_sampler(model):
    scheduler = diffusers.EDMDPMSolverMultistepScheduler.from_config(
        model.scheduler().config, final_sigmas_type="zero"
    )
    made = drive(scheduler, lambda x, t: model(x, t, LABELS, return_dict=False)[0])
    ours = sample_dpmpp_2m(small_denoiser(attn_resolutions=(4,)), NOISE, time_steps(12), LABELS)
    assert distance(made, ours) < 1e-4


def test_guider_equals_our_guidance(model):
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=2.0)

    def predict(x, t):
        pair = (model(x, t, LABELS).sample, model(x, t).sample)
        return guider.forward(*pair).pred

    denoiser = small_denoiser(attn_resolutions=(4,))
    ours = guided(denoiser, lambda x, sigma, labels: denoiser(x, sigma, None), 2.0)
    assert (
        distance(drive(model.scheduler(), predict), sample_euler(ours, NOISE, time_steps(12), LABELS)) < 1e-4
    )


def test_conditions_and_precision(model):
    from edm2.hub.diffusers import EDM2Model

    conditional = EDM2Model.from_denoiser(small_denoiser(cond_channels=2))
    condition = keyed_normal(torch.arange(4), (2, 8, 8), stream=1)
    made = drive(conditional.scheduler(), lambda x, t: conditional(x, t, LABELS, condition=condition).sample)
    denoiser = small_denoiser(cond_channels=2)
    ours = sample_euler(
        lambda x, s, labels: denoiser(x, s, labels, condition=condition), NOISE, time_steps(12), LABELS
    )
    assert distance(made, ours) < 1e-4
    half = model(NOISE.bfloat16(), torch.tensor(0.1), LABELS).sample
    assert half.dtype == torch.bfloat16


def test_what_cannot_be_a_network_is_refused(model):
    from edm2.hub.diffusers import EDM2Model

    with pytest.raises(ValueError, match="model_channels = -1 does not describe a network"):
        EDM2Model({"img_resolution": 8, "img_channels": 1, "model_channels": -1})
    with pytest.raises(ValueError, match="does not know how it was built"):
        EDM2Model.from_denoiser(Denoiser(torch.nn.Identity()))
