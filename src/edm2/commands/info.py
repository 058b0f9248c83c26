"""`edm2 info`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from edm2.describe import describe_path, describe_preset, describe_released
from edm2.interop.released import SAMPLING_PRESETS
from edm2.presets import PRESETS, get_preset


@dataclass(kw_only=True)
class _Info:
    """Print parameters, Gflops an image, and state of a preset or a saved model. Without a name: all presets."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None
    """A preset's name, a model file, the folder of a run or of a shared model, a published setting's name or file."""


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 info`."""
    chosen = tyro.cli(_Info, prog=prog, args=list(words))
    if chosen.name is None:
        print("\n".join(PRESETS))
    elif chosen.name in PRESETS:
        print(describe_preset(chosen.name))
    elif chosen.name in SAMPLING_PRESETS:
        print(describe_released(chosen.name))
    elif Path(chosen.name).exists():
        print(describe_path(Path(chosen.name)))
    else:
        try:
            get_preset(chosen.name)
        except ValueError as error:
            raise ValueError(f"no file or folder is called {chosen.name!r}, and {error}") from None
