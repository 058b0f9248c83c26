"""The command to give next: the last line of every command, on standard error, so that results stay alone on output."""

import shlex
from pathlib import Path

from edm2.diffusion import MODEL_FILE
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
    """Sample with the guide that usually helps most; then find the best one, or train on a regression's residuals."""
    settings, coding = run_settings(run), read_coding(run)
    is_regression = settings.objective == "mean"
    alone = coding.condition is None and coding.vectors is None
    guided = alone and not is_regression and settings.consistency is None
    tell_to_sample(run, *([own_guide(run).words()] if guided else []))
    if is_regression:
        residual = run.with_name(f"{run.name}-residual")
        return tell_next("train --settings", run, "--objective denoise --residual", run, "--out", residual)
    _tell_to_tune(run)


def after_looking(run: Path) -> None:
    """Continue an unfinished run; find the best settings of a finished one; sample a tuned one."""
    if not (run / MODEL_FILE).exists():
        return tell_next("train --out", run)
    if read_tuned(run) is None and run_settings(run).objective != "mean":
        return _tell_to_tune(run)
    tell_to_sample(run)


def tell_to_sample(run: Path, *options: str) -> None:
    """Name the command that samples a run, with the source of what its model is given.

    Args:
        run: Folder of the run.
        *options: Further options.
    """
    settings = run_settings(run)
    finished = (run / MODEL_FILE).exists()
    coding = read_coding(run, None if finished else settings.ema.sigma_rels[0])
    tuned = read_tuned(run)
    if not finished and not (tuned and tuned.is_better):
        options = (f"--ema {settings.ema.sigma_rels[-1]:g}", *options)
    given: list[str | Path] = []
    if coding.condition is not None:
        # Those of the training data are larger than what a network of crops takes.
        cropped = settings.dataset.crop is not None
        given = ["--conditions", "CROPS.npy" if cropped else Path(settings.condition or settings.data)]
    elif coding.vectors is not None:
        given = ["--labels VECTORS.npy"]
    out = "samples.npz" if given else "samples"
    tell_next("sample", run, *given, *options, "--out", run / out)


def _tell_to_tune(run: Path) -> None:
    coding = read_coding(run)
    if coding.condition is not None:
        tell_next("tune", run, "--metric crps --cases HELD_OUT_PAIRS")
    elif coding.vectors is None:
        tell_next("tune", run)
