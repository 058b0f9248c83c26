"""Models shared as a folder or on the Hugging Face hub.

- `save_pretrained`, `open_pretrained`: models in folders (`folder`).
- `Pretrained`: a model with its guide, `Sampling` settings, `Result`s and licence (`pretrained`, `results`).
- `EDM2Pipeline`: calls as in diffusers, and the hub (`pipeline`; needs huggingface_hub).
- `export`: networks for programs that do not know edm2; `diffusers`: for diffusers' schedulers.
- The card that goes with a shared model is in `model_card`.
"""

from typing import Any

from edm2.hub.folder import Parts, find_parts, open_pretrained, save_pretrained
from edm2.hub.pretrained import Pretrained, Sampling
from edm2.hub.results import Result, read_results

__all__ = [
    "EDM2Pipeline",
    "Parts",
    "Pretrained",
    "Result",
    "Sampling",
    "find_parts",
    "open_pretrained",
    "read_results",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name == "EDM2Pipeline":  # the only part that needs huggingface_hub
        from edm2.hub.pipeline import EDM2Pipeline

        return EDM2Pipeline
    raise AttributeError(f"module 'edm2.hub' has no attribute {name!r}")
