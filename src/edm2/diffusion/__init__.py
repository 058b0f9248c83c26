"""Denoiser, noise, loss, samplers and guidance (EDM2 Sec. 2 and 3, EDM Alg. 2)."""

from edm2.diffusion.denoiser import Denoiser
from edm2.diffusion.guidance import DenoiserFn, WithoutLabels, guided
from edm2.diffusion.loss import draw_sigma, edm2_loss
from edm2.diffusion.model_file import MODEL_FILE, load_model, read_model, read_model_header, save_model
from edm2.diffusion.sampling import sample_heun, time_steps
from edm2.diffusion.solvers import SAMPLERS, SamplerName, find_sampler, sample_dpmpp_2m, sample_euler

__all__ = [
    "MODEL_FILE",
    "SAMPLERS",
    "Denoiser",
    "DenoiserFn",
    "SamplerName",
    "WithoutLabels",
    "draw_sigma",
    "edm2_loss",
    "find_sampler",
    "guided",
    "load_model",
    "read_model",
    "read_model_header",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_heun",
    "save_model",
    "time_steps",
]
