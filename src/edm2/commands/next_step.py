"""The command to give next: the last line of every command, on standard error, so that results stay alone on output."""

import shlex
from pathlib import Path

from edm2.generate import read_coding
from edm2.generate.own_guide import own_guide
from edm2.progress import tell
from edm2.train.settings_file import run_settings
from edm2.tuning.result import read_tuned


def tell_next(*words: str | Path) -> None:
    """Name the next command.

    Args:
        *words: The command's words after `edm2`; those with spaces are quoted, except lists of options.
    """
    tell("next: edm2 " + " ".join(w if isinstance(w, str) else shlex.quote(str(w)) for w in words))


def run_for(data: str | Path) -> Path:
    """Folder to name for a run on some data: `runs/photos` for `some/photos-32.zip`."""
    name = Path(data).name
    return Path("runs") / (name.removesuffix(Path(name).suffix) or name)


def after_training(run: Path) -> None:
    """Sample with the guide that usually helps most; then find the best one."""
    settings = run_settings(run)
    if read_coding(run).condition is not None:
        given = settings.condition or settings.data
        tell_next("sample", run, "--conditions", given, "--out", run / "samples.npz")
    elif settings.consistency is None:
        tell_next("sample", run, own_guide(run).words(), "--out", run / "samples")
    else:
        tell_next("sample", run, "--out", run / "samples")
    _tell_to_tune(run)


def after_looking(run: Path) -> None:
    """Find the best settings; of a tuned run, sample with them."""
    if read_tuned(run) is None:
        return _tell_to_tune(run)
    tell_next("sample", run, "--out", run / "samples")


def _tell_to_tune(run: Path) -> None:
    if read_coding(run).condition is None:
        tell_next("tune", run)
    else:
        tell_next("tune", run, "--metric crps --cases HELD_OUT_PAIRS")
