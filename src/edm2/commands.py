"""The commands of the command line: each takes its words, and says what the options mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from edm2.describe import describe_path, describe_preset
from edm2.generate import Generator, parse_seeds, reconstruct_models, write_samples
from edm2.presets import PRESETS, get_preset
from edm2.train import TrainConfig
from edm2.train import train as run_training
from edm2.train.build import pick_device
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


@dataclass(kw_only=True)
class _Demo:
    """Train on handwritten digits, tune the EMA length, sample, measure and write a report."""

    out: Path = Path("runs/demo")
    """Folder for everything."""


@dataclass(kw_only=True)
class _Reconstruct:
    """Write models with any EMA length from the snapshots of one run."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, or of its snapshots."""
    sigma_rel: str
    """EMA lengths relative to the training time, separated by commas: 0.05,0.10."""
    out: Path
    """Folder for the models, named after their lengths."""
    images: float | None = None
    """Time in images at which the averages are wanted; default: the last snapshot's."""


@dataclass(kw_only=True)
class _Sample:
    """Make images with a model: one PNG a seed, and a grid. A folder that is half full is continued."""

    model: Path
    """Model file, or the folder of a finished run."""
    out: Path
    """Folder for the images."""
    seeds: str = "0-63"
    """One image a seed: 0-63 or 1,5,10-12. Noise and class come from the seed alone."""
    label: int | None = None
    """Class of all images; default: seed modulo the number of classes."""
    guide: Path | None = None
    """Model to guide with: an unconditional one, or a weaker one."""
    guidance: float = 1.0
    """Guidance weight; 1 for none."""
    num_steps: int = 32
    """Noise levels; the network runs twice on each but the last."""
    sigma_min: float = 0.002
    """Lowest noise level."""
    sigma_max: float = 80.0
    """Highest noise level."""
    rho: float = 7.0
    """Exponent of the schedule."""
    s_churn: float = 0.0
    """Strength of added noise; 0 is deterministic."""
    batch: int = 250
    """Images at a time."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""


@dataclass(kw_only=True)
class _Info:
    """Print parameters, Gflops an image, and state of a preset or a saved model. Without a name: all presets."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A preset's name, a model file, or the folder of a run."""


def train(prog: str, words: Sequence[str]) -> None:
    """`edm2 train`."""
    name = _value_of("--preset", words)
    settings = get_preset("digits" if name is None else name)
    default: Any = _Train(preset=tyro.MISSING if name is None else name, out=tyro.MISSING, config=settings)
    chosen = tyro.cli(_Train, prog=prog, args=list(words), default=default)
    model = run_training(chosen.config, chosen.out, preset=chosen.preset)
    print(f"model:     {model}\nsnapshots: {chosen.out / SNAPSHOTS}\nlog:       {chosen.out / LOG_FILE}")


def demo(prog: str, words: Sequence[str]) -> None:
    """`edm2 demo`."""
    from edm2.demo import run_demo

    chosen = tyro.cli(_Demo, prog=prog, args=list(words))
    measured = run_demo(chosen.out)
    print(
        f"intended class recognised: {100 * measured.agreement:.1f}% "
        f"(real test digits: {100 * measured.accuracy_real:.1f}%)\n"
        f"Frechet distance: {measured.frechet:.3f} at EMA length {measured.best:g} "
        f"(real test digits: {measured.frechet_real:.3f})\n"
        f"report:  {chosen.out / 'report.html'}\n"
        f"samples: {chosen.out / 'samples.png'}\n"
        f"model:   {chosen.out / 'ema' / f'ema-{measured.best:.4g}.safetensors'}"
    )


def ema_reconstruct(prog: str, words: Sequence[str]) -> None:
    """`edm2 ema reconstruct`."""
    chosen = tyro.cli(_Reconstruct, prog=prog, args=list(words))
    for path, error in reconstruct_models(
        chosen.run, _lengths(chosen.sigma_rel), chosen.out, t=chosen.images
    ):
        print(f"{path}  expected relative error {error:.1e}")


def sample(prog: str, words: Sequence[str]) -> None:
    """`edm2 sample`."""
    chosen = tyro.cli(_Sample, prog=prog, args=list(words))
    seeds = parse_seeds(chosen.seeds)
    device = pick_device(chosen.device)
    generator = Generator.load(chosen.model, device=device)
    options = {
        name: getattr(chosen, name)
        for name in ("num_steps", "sigma_min", "sigma_max", "rho", "s_churn", "guidance")
    }
    if chosen.guide is not None:
        options["guide"] = Generator.load(chosen.guide, device=device).denoiser
    labels = None if chosen.label is None else [chosen.label] * len(seeds)
    print(write_samples(generator, chosen.out, seeds, labels=labels, batch_size=chosen.batch, **options))


def info(prog: str, words: Sequence[str]) -> None:
    """`edm2 info`."""
    chosen = tyro.cli(_Info, prog=prog, args=list(words))
    if chosen.name is None:
        print("\n".join(PRESETS))
    elif chosen.name in PRESETS:
        print(describe_preset(chosen.name))
    elif Path(chosen.name).exists():
        print(describe_path(Path(chosen.name)))
    else:
        get_preset(chosen.name)


def _value_of(option: str, words: Sequence[str]) -> str | None:
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.split("=", 1)[1]
    return None


def _lengths(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--sigma-rel {text!r}: write lengths separated by commas, 0.05,0.10") from None
