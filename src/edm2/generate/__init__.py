"""Images from saved models, and models from a run's snapshots."""

from edm2.generate.generator import Generator
from edm2.generate.output import parse_seeds, read_images, write_samples
from edm2.generate.reconstructed import reconstruct_models, snapshots_of

__all__ = ["Generator", "parse_seeds", "read_images", "reconstruct_models", "snapshots_of", "write_samples"]
