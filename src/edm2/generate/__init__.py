"""Images from saved models, and models from a run's snapshots."""

from edm2.generate.generator import Generator
from edm2.generate.output import parse_seeds, write_samples
from edm2.generate.reconstructed import reconstruct_models, snapshots_of

__all__ = ["Generator", "parse_seeds", "reconstruct_models", "snapshots_of", "write_samples"]
