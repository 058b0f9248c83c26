"""Magnitude-preserving diffusion models and post-hoc EMA (EDM2, arXiv 2312.02696).

Importing `edm2` does no work: each part is loaded at first use, so that `edm2.ema` costs only itself.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PARTS = (
    "data",
    "diffusion",
    "ema",
    "evaluation",
    "generate",
    "hub",
    "interop",
    "ladder",
    "metrics",
    "nn",
    "presets",
    "report",
    "train",
    "tuning",
)
_NAMES = {"ImageGenerator": "generate"}


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"edm2.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"edm2.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'edm2' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PARTS, *_NAMES])
