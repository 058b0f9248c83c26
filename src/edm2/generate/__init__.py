"""Images from saved models, and models from a run's snapshots."""

from edm2.generate.generator import ImageGenerator, read_coding
from edm2.generate.image_files import read_images
from edm2.generate.output import write_samples
from edm2.generate.reconstructed import reconstruct_denoiser, reconstruct_models, snapshots_of
from edm2.generate.sampler_options import SamplerOptions
from edm2.generate.seeds import parse_seeds

__all__ = [
    "ImageGenerator",
    "SamplerOptions",
    "parse_seeds",
    "read_coding",
    "read_images",
    "reconstruct_denoiser",
    "reconstruct_models",
    "snapshots_of",
    "write_samples",
]
