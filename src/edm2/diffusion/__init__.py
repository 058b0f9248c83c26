"""Denoisers, their loss, samplers and model files (EDM2 Sec. 2-3; EDM, arXiv 2206.00364).

`Denoiser` puts any network behind EDM's preconditioning, and `build_denoiser` those of the paper. `edm2_loss` trains
a denoiser; samplers turn noise into images with any callable `denoiser(x, sigma, labels)`.
"""

from edm2.diffusion.build import build_denoiser
from edm2.diffusion.denoiser import Denoiser, GivenDenoiser
from edm2.diffusion.guidance import DenoiserFn, WithoutLabels, clipped, guided
from edm2.diffusion.loss import draw_sigma, edm2_loss
from edm2.diffusion.model_file import MODEL_FILE, load_model, read_model, read_model_header, save_model
from edm2.diffusion.own_network import NetworkFunction, register_network
from edm2.diffusion.samplers import (
    SAMPLERS,
    Churn,
    SamplerName,
    consistency_steps,
    find_sampler,
    sample_consistency,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_3m,
    sample_euler,
    sample_heun,
    time_steps,
)
from edm2.diffusion.uncertainty import LearnedUncertainty

__all__ = [
    "MODEL_FILE",
    "SAMPLERS",
    "Churn",
    "Denoiser",
    "DenoiserFn",
    "GivenDenoiser",
    "LearnedUncertainty",
    "NetworkFunction",
    "SamplerName",
    "WithoutLabels",
    "build_denoiser",
    "clipped",
    "consistency_steps",
    "draw_sigma",
    "edm2_loss",
    "find_sampler",
    "guided",
    "load_model",
    "read_model",
    "read_model_header",
    "register_network",
    "sample_consistency",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_3m",
    "sample_euler",
    "sample_heun",
    "save_model",
    "time_steps",
]
