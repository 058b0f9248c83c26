"""`edm2 train`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from edm2.cli import EXIT_STOPPED, end
from edm2.presets import get_preset
from edm2.train import Stopped, TrainConfig, train
from edm2.train.run_folder import LOG_FILE, SNAPSHOTS


@dataclass(kw_only=True)
class _Train:
    """Train a model, or continue the run that the folder holds.

    The preset sets every option; any of them can be changed here. The same command again continues after a stop.
    """

    preset: str
    """Settings to start from; see `edm2 info` for the names."""
    out: Path
    """Folder of the run: checkpoints, snapshots, log, and the final model."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 train`."""
    name = _value_of("--preset", words)
    settings = get_preset("digits" if name is None else name)
    default: Any = _Train(preset=tyro.MISSING if name is None else name, out=tyro.MISSING, config=settings)
    chosen = tyro.cli(_Train, prog=prog, args=list(words), default=default)
    try:
        model = train(chosen.config, chosen.out, preset=chosen.preset)
    except Stopped as stop:
        end(str(stop), EXIT_STOPPED)
    print(f"model:     {model}\nsnapshots: {chosen.out / SNAPSHOTS}\nlog:       {chosen.out / LOG_FILE}")


def _value_of(option: str, words: Sequence[str]) -> str | None:
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.split("=", 1)[1]
    return None
