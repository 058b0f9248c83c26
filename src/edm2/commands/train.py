"""`edm2 train`."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from edm2.advice import SUGGESTED, Advice, check_pictures, suggest
from edm2.cli import EXIT_STOPPED, end
from edm2.commands.common import take_option
from edm2.commands.next_step import after_training
from edm2.data import LatentDecoder
from edm2.data.autoencoder import PixelRange
from edm2.generate.live_samples import LiveSamples
from edm2.generate.own_guide import own_guide
from edm2.presets import get_preset
from edm2.progress import show
from edm2.train import Stopped, TrainConfig, train
from edm2.train.amounts import Amount
from edm2.train.build import open_training_data, pick_device
from edm2.train.dry_run import DryRun, dry_run
from edm2.train.loggers import open_loggers
from edm2.train.logs import LOG_FILE
from edm2.train.run_folder import CONFIG_FILE, SNAPSHOTS
from edm2.train.settings_file import read_settings, run_settings
from edm2.train.signals import under_torchrun
from edm2.train.with_config import with_config


@dataclass(kw_only=True)
class _Train:
    """Train a model, or continue the run in the folder. Interrupted runs resume: run the same command again.

    A run in the folder continues with its own settings. Otherwise settings come from a preset, from a file, or, with
    neither, from the data and the speed of this machine, as `edm2 suggest` finds them. --config changes what
    the paper changes for that configuration, and options given here override everything.
    """

    preset: str = ""
    """Settings to start from; `edm2 info` lists the names."""
    settings: Path | None = None
    """File of settings (.json, .toml, .yaml), or a run to copy them from. Options on the command line override them."""
    out: Path
    """Folder of the run, for checkpoints, snapshots, logs and the final model."""
    hours: float | None = None
    """Hours to train, for settings from the data. Default: 0.25 on a CPU, 2 on a GPU."""
    dry_run: bool = False
    """Measure a few steps, print the cost of the run, and write nothing."""
    print_settings: bool = False
    """Print all settings as JSON, which --settings takes, and write nothing."""
    machines: int = 1
    """With --dry-run: estimate the time for this many machines like this one."""
    sample_images: Amount | None = None
    """Training images between grids of samples (same seeds each time) in the run's folder `progress`. Default: none."""
    sample_sigma_rel: float | None = None
    """EMA length of these samples. Default: the longest tracked length."""
    sample_vae: str | None = None
    """AutoencoderKL that decodes the samples of a latent model: a name on the hub, or a folder. Default: each channel
    is drawn."""
    sample_pixel_range: PixelRange = "zero-one"
    """Scale of its output, as in `edm2 data encode`."""
    log_to: tuple[str, ...] = ()
    """Also log to tensorboard, wandb or trackio; several may be given."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 train`."""
    name, settings, cost = _starting_point(prog, list(words))
    settings = _without_rampup(settings, list(words))
    default: Any = _Train(preset=name, out=tyro.MISSING, config=settings)
    chosen = tyro.cli(_Train, prog=prog, args=list(words), default=default)
    if chosen.hours is not None and cost is None:
        raise ValueError(
            f"--hours {chosen.hours:g} has no effect: presets, files and runs already have a length, which "
            "--images changes"
        )
    for option, value in (("machines", chosen.machines), ("sample-images", chosen.sample_images)):
        if value is not None and value < 1:
            raise ValueError(f"--{option} {value} must be at least 1")
    if chosen.print_settings:
        return show(json.dumps(chosen.config.to_json(), indent=1))
    if chosen.dry_run:
        cost = cost if chosen.config == settings and cost is not None else dry_run(chosen.config)
        return show(cost.describe(chosen.machines))
    if chosen.sample_vae is not None and chosen.sample_images is None:
        raise ValueError(f"--sample-vae {chosen.sample_vae} has no effect without --sample-images: give both")
    loggers = open_loggers(chosen.log_to)
    live = None
    if chosen.sample_images is not None:
        live = LiveSamples(
            every=chosen.sample_images, sigma_rel=chosen.sample_sigma_rel, decoder=_decoder(chosen)
        )
        live.check(chosen.config.ema.sigma_rels)
    train_or_stop(
        lambda: train(chosen.config, chosen.out, preset=chosen.preset, on_step=live, loggers=loggers),
        chosen.out,
        grid=chosen.preset == SUGGESTED,
    )


def _decoder(chosen: _Train) -> LatentDecoder | None:
    """The decoder of samples, checked before training begins."""
    if chosen.sample_vae is None:
        return None
    options = chosen.config.dataset
    if options.coding != "latents":
        raise ValueError(
            f"--sample-vae {chosen.sample_vae} is for latents, and --dataset.coding is {options.coding}: leave it out"
        )
    device = pick_device(chosen.config.device)
    decoder = LatentDecoder.load(chosen.sample_vae, device=device, pixel_range=chosen.sample_pixel_range)
    if len(options.mean) not in (1, decoder.latent_channels):
        raise ValueError(
            f"--sample-vae {chosen.sample_vae} decodes latents of {decoder.latent_channels} channels, and "
            f"--dataset.mean has {len(options.mean)} values: name the one that encoded the training data"
        )
    return decoder


def train_or_stop(work: Callable[[], Path], out: Path, *, grid: bool = False) -> None:
    """Train and say where everything lies; a run that was asked to stop ends the process with its exit code.

    Args:
        work: Trains, and returns the model's file.
        out: Folder of the run.
        grid: Whether to make a grid of samples at the end.
    """
    is_first = os.environ.get("RANK", "0") == "0"  # set by torchrun; the first process speaks for all
    try:
        model = work()
    except Stopped as stop:
        # torchrun takes any other code for a failure, and would start all processes again.
        code = 0 if under_torchrun() else EXIT_STOPPED
        if not is_first:
            raise SystemExit(code) from None
        end(str(stop), code)
    if is_first:
        show(f"model:     {model}\nsnapshots: {out / SNAPSHOTS}\nlog:       {out / LOG_FILE}")
        picture = out / "samples.png"
        if grid and own_guide(out).save_grid(picture):
            show(f"samples:   {picture}")
        after_training(out)


def _starting_point(prog: str, words: list[str]) -> tuple[Any, TrainConfig, DryRun | None]:
    """The name of the preset, the settings that the other options change, and their cost where it was measured."""
    file, letter = take_option("--settings", words)[0], take_option("--config", words)[0]
    name, out = take_option("--preset", words)[0], take_option("--out", words)[0]
    if file is None and name is None and out is not None and (Path(out) / CONFIG_FILE).exists():
        file = out
    if file is None and name is None:
        advice = _advice(prog, words)
        return SUGGESTED, advice.config if letter is None else with_config(advice.config, letter), advice.cost
    return *_stored(name, file, letter), None


def _without_rampup(settings: TrainConfig, words: list[str]) -> TrainConfig:
    """With --init, no ramp-up unless one is asked for: weights that are trained already need none.

    A run that exists keeps the one that it began with.
    """
    asked = any(word.replace("_", "-").startswith("--optimizer.rampup-mimg") for word in words)
    if asked or take_option("--init", words)[0] is None:
        return settings
    out, rampup = take_option("--out", words)[0], 0.0
    if out is not None and (Path(out) / CONFIG_FILE).exists():
        rampup = run_settings(Path(out)).optimizer.rampup_mimg
    return dataclasses.replace(
        settings, optimizer=dataclasses.replace(settings.optimizer, rampup_mimg=rampup)
    )


def _advice(prog: str, words: list[str]) -> Advice:
    """Settings from the data and the speed of this machine, which are shown with their reasons."""
    given = tyro.cli(_Train, prog=prog, args=words)
    config = given.config
    if under_torchrun():
        raise ValueError(
            "settings from the data are measured by one process: give a preset, or write them with `edm2 suggest` and "
            "give them with --settings"
        )
    for source in filter(None, (config.data, config.condition)):
        check_pictures(source, labels=config.dataset.labels, device=config.device)
    # Every image is decoded when the run starts.
    options = config.dataset
    if options.crop is None:  # the advice pads
        options = dataclasses.replace(options, pad_to=None)
    whole = dataclasses.replace(config, verify_data=False, dataset=options)
    advice = suggest(
        open_training_data(whole),
        data=config.data,
        condition=config.condition,
        hours=given.hours,
        device=config.device,
        options=config.dataset,
    )
    show(advice.headline())
    show(advice.describe())
    if _without_rampup(advice.config, words) != advice.config:
        show("note: --init starts from trained weights, which need no ramp-up (--optimizer.rampup-mimg 0)")
    return advice


def _stored(name: str | None, file: str | None, letter: str | None) -> tuple[str, TrainConfig]:
    """The name of the preset, and settings from it, from a file, or from a run."""
    if file is None:
        assert name is not None
        settings = get_preset(name)
        return name, settings if letter is None else with_config(settings, letter)
    given = read_settings(file)
    if given.values.get("consistency") is not None:
        raise ValueError(
            f"{file} is a student's run: give its teacher to `edm2 distill`, or other settings to `edm2 train`"
        )
    if given.is_complete:
        if name is not None:
            raise ValueError(
                f"--preset {name} has no effect, because the run {file} has every setting: leave it out"
            )
        settings = given.apply(TrainConfig())
        return given.preset or "", settings if letter in (None, settings.config) else with_config(
            settings, letter
        )
    name = given.preset if name is None else name
    # The rest of the file overrides what the configuration changes, as options do.
    letter = given.values.get("config", "G") if letter is None else letter
    settings = with_config(TrainConfig() if name is None else get_preset(name), letter)
    return name or "", dataclasses.replace(given, values={**given.values, "config": letter}).apply(settings)
