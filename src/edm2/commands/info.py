"""`edm2 info`: describe a preset, a saved model or a run."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import tyro

from edm2.diffusion import Denoiser, build_denoiser, read_model
from edm2.ema.storage.manifest import read_manifest
from edm2.interop.released import SAMPLING_PRESETS, sampling_preset
from edm2.nn import count_flops
from edm2.presets import PRESETS, get_preset, image_shape
from edm2.progress import clean, show
from edm2.train.logs import is_progress, read_log
from edm2.train.run_folder import CONFIG_FILE, SNAPSHOTS, read_config
from edm2.train.settings_file import run_settings

if TYPE_CHECKING:
    from edm2.hub import Parts

_SMALL = 64  # base width of a network that is built in an instant


@dataclass(kw_only=True)
class _Info:
    """Describe a preset, a saved model or a run. Without a name, list all presets."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None
    """Name of a preset or a published setting, model file, or folder of a run or a shared model."""


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 info`."""
    chosen = tyro.cli(_Info, prog=prog, args=list(words))
    if chosen.name is None:
        show("\n".join(PRESETS))
    elif chosen.name in PRESETS:
        show(describe_preset(chosen.name))
    elif chosen.name in SAMPLING_PRESETS:
        show(describe_released(chosen.name))
    elif Path(chosen.name).exists():
        show(describe_path(Path(chosen.name)))
    else:
        try:
            get_preset(chosen.name)
        except ValueError as error:
            raise ValueError(f"no file or folder is called {chosen.name!r}, and {error}") from None


def describe_preset(name: str) -> str:
    """Describe the network, cost, settings and state names of a preset."""
    config = get_preset(name)
    channels, height, width, classes = image_shape(name)
    assert height == width
    # On the meta device nothing takes memory, but the first operation loads torch's compilers for seconds.
    device = "cpu" if config.network.model_channels <= _SMALL else "meta"
    with torch.device(device):
        denoiser = build_denoiser(height, channels, classes, **vars(config.network)).eval()
    lines = [f"preset {name}", *_network_lines(denoiser, device)]
    lines.append(
        f"training    {config.num_images:,} images in {config.num_steps:,} steps of {config.batch_size}"
    )
    settings = json.dumps(config.to_json(), indent=1)
    return "\n".join([*lines, "", "settings", settings, "", "state", _state(denoiser)])


def describe_released(name: str) -> str:
    """Describe what `edm2 import` makes from the name of a published setting."""
    preset = sampling_preset(name)
    guide = "none" if preset.guide is None else f"{preset.guide}, weight {preset.guidance:g}"
    return "\n".join(
        [
            f"setting     {name}, published with {preset.metric} {preset.reported:g}",
            f"network     {preset.network}",
            f"guide       {guide}",
            f"next        edm2 import {name} --out FOLDER --from SOURCE",
        ]
    )


def describe_path(path: Path) -> str:
    """Describe a model file, a run, or settings with the models that they name."""
    from edm2.hub import find_parts  # loads evaluation, which a preset does not need

    parts = find_parts(path)
    if parts is not None:
        return "\n".join([*_parts_lines(path, parts), describe_path(parts.model)])
    lines = []
    if (path / CONFIG_FILE).is_file():
        lines += _run_lines(path)
        if not any(path.glob("*.safetensors")):
            return "\n".join([*lines, "model       none yet: the run has not ended"])
    file, denoiser, info = read_model(path)
    lines += [f"model       {file}, {file.stat().st_size / 1e6:.1f} MB", *_network_lines(denoiser)]
    for key, label in (
        ("sigma_rel", "EMA length"),
        ("num_images", "images seen"),
        ("data", "trained on"),
        ("license", "licence"),
    ):
        if info.get(key) is not None:
            value = f"{info[key]:,}" if isinstance(info[key], int) else _one_line(info[key])
            lines.append(f"{label:<11} {value}")
    if info.get("expected_error") is not None:
        lines.append(f"expected relative error of the reconstruction: {info['expected_error']:.1e}")
    return "\n".join(lines) + "\n\nstate\n" + _state(denoiser)


def _parts_lines(path: Path, parts: "Parts") -> list[str]:
    sampling = parts.sampling
    lines = [f"settings    {path}, {sampling.sampler}, {sampling.num_steps} steps"]
    if parts.guide is not None:
        low, high = sampling.interval or (0.0, math.inf)
        lines.append(
            f"guide       {parts.guide}, weight {sampling.guidance:g} for sigma in ({low:g}, {high:g}]"
        )
    return lines + [f"result      {_one_line(result.metric)} {result.value:g}" for result in parts.results]


def _one_line(text: object) -> str:
    return clean(" ".join(str(text).split()), keep="")


def _network_lines(denoiser: Denoiser, device: str = "meta") -> list[str]:
    denoiser = denoiser.to(device)  # a network of the user's own may have tensors elsewhere
    with torch.device(device):
        channels, height, width = denoiser.img_shape
        image = torch.zeros(1, channels, height, width)
        labels = torch.zeros(1, denoiser.label_dim) if denoiser.label_dim else None
        condition = denoiser.cond_channels
        extra = {"condition": torch.zeros(1, condition, height, width)} if condition else {}
        flops = count_flops(denoiser, image, torch.ones(1), labels, **extra)
    title = denoiser.title.removeprefix("config ")
    return [
        f"{'config' if title != denoiser.title else 'network':<11} {clean(title, keep='')}",
        f"images      {channels} x {height} x {width}, "
        + (f"{denoiser.label_dim} classes" if denoiser.label_dim else "unconditional"),
        f"parameters  {sum(p.numel() for p in denoiser.parameters()):,}",
        f"Gflops      {flops / 1e9:.4g} per evaluation of one image, a multiply-accumulate counted once",
    ]


def _state(denoiser: Denoiser) -> str:
    state = denoiser.state_dict()
    width = max(map(len, state))
    return "\n".join(f"  {name:<{width}}  {list(tensor.shape)}" for name, tensor in state.items())


def _run_lines(run: Path) -> list[str]:
    config, log = run_settings(run), read_log(run, is_wanted=is_progress)
    seen = log[-1]["num_images"] if log else 0
    loss = f", loss {log[-1]['loss']:.4f}" if log and log[-1]["loss"] is not None else ""
    lines = [
        f"run         {run}, preset {read_config(run)['settings'].get('preset') or 'none'}",
        f"progress    {seen:,} of {config.num_images:,} images{loss}",
    ]
    if (run / SNAPSHOTS).is_dir():
        snapshots = read_manifest(run / SNAPSHOTS).snapshots
        lengths = ", ".join(f"{value:g}" for value in sorted({s.sigma_rel for s in snapshots}))
        times = len({s.t for s in snapshots})
        lines.append(f"snapshots   {times} times, EMA lengths {lengths or 'none yet'}")
    return lines
