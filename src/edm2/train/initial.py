"""Starting a run from the weights of a saved model: what is taken over, what starts afresh, what cannot fit."""

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edm2.diffusion import Denoiser, load_model, read_model_header
from edm2.diffusion.model_file import model_checksum
from edm2.nn import UNet
from edm2.train.config import TrainConfig
from edm2.train.run_folder import CONFIG_FILE, read_config

# A network may lack them: they add to the embedding, or weigh the loss.
_OPTIONAL = ("unet.emb_label.", "unet.emb_augment.", "logvar_")
_CARRIED = ("license", "license_notice")


def identify_models(config: TrainConfig, out: Path) -> dict[str, Any]:
    """Say which models the settings name, by their content.

    Args:
        config: All settings.
        out: Folder of the run. If it exists, the models that it started with need not.

    Returns:
        For each setting that names a model, the checksum of its weights, and its licence if it has one.

    Raises:
        ValueError: If a model is missing or damaged.
    """
    paths = {"init": config.init, "residual": config.residual}
    return {name: _identify(path, out, name) for name, path in paths.items() if path is not None}


def carried_licence(models: dict[str, Any]) -> dict[str, str]:
    """What the licences of models demand to be stored with all that is made from them."""
    return {key: model[key] for model in models.values() for key in _CARRIED if key in model}


def _identify(path: str, out: Path, setting: str) -> dict[str, Any]:
    if not Path(path).exists() and (out / CONFIG_FILE).exists():
        known = read_config(out)
        found: dict[str, Any] | None = known["identity"].get(setting)
        if found is not None and known["settings"].get(setting) == path:
            return found
    info = read_model_header(path)[1]["info"]
    carried = {key: info[key] for key in _CARRIED if info.get(key) is not None}
    return {"sha256": model_checksum(path), **carried}


@torch.no_grad()
def take_over(denoiser: Denoiser, path: str) -> None:
    """Give a new network the weights of a saved model.

    A network of the same shape becomes bit-identical to it. Further channels of a condition start without effect, and
    further classes with random weights, as in a new network. Warns about all that is not taken over.

    Args:
        denoiser: The new network, on the CPU.
        path: A model file, or a folder that holds one, such as a finished run.

    Raises:
        ValueError: If the model cannot be read, or does not fit.
    """
    source = load_model(path)[0]
    if differences := _differences(denoiser, source):
        raise _misfit(path, "; ".join(differences))
    own, theirs = denoiser.state_dict(), _renamed(source, denoiser)
    told = []
    for name, target in own.items():
        value = theirs.pop(name, None)
        if value is None and name.startswith(_OPTIONAL):
            told.append(f"{name} is not in it and starts at random")
            continue
        if value is not None and value.shape != target.shape:
            value, note = _widened(name, value, target, source, denoiser)
            told.append(note)
        if value is None:
            raise _misfit(path, f"its {name} is missing or of another shape than {list(target.shape)}")
        target.copy_(value)
    if foreign := [name for name in theirs if not name.startswith(_OPTIONAL)]:
        raise _misfit(path, f"it has {foreign[0]}, which this network lacks")
    told += [f"{name} has no place in this network" for name in theirs]
    if told:
        warnings.warn(f"{path} is only used in part: {'; '.join(told)}", stacklevel=3)


def _differences(new: Denoiser, old: Denoiser) -> list[str]:
    """What makes one network compute something else than the other, whatever the weights."""
    pairs: dict[str, tuple[Any, Any]] = {
        "sigma_data": (new.sigma_data, old.sigma_data),
        "img_channels": (new.img_channels, old.img_channels),
    }
    if isinstance(new.unet, UNet) and isinstance(old.unet, UNet):
        for field in dataclasses.fields(new.unet.features):
            if field.name not in ("title", "dropout", "attn_resolutions"):
                pairs[field.name] = (
                    getattr(new.unet.features, field.name),
                    getattr(old.unet.features, field.name),
                )
        pairs["config"] = pairs.pop("name")
        if new.label_dim and old.label_dim:
            pairs["label_kind"] = (new.unet.label_kind, old.unet.label_kind)
        defaults = {
            "model_channels": 192,
            "channel_mult": [1, 2, 3, 4],
            "num_blocks": 3,
            "channels_per_head": 64,
        }
        for name, default in defaults.items():
            pairs[name] = (new.options.get(name, default), old.options.get(name, default))
    elif type(new.unet) is not type(old.unet):
        pairs["network"] = (type(new.unet).__name__, type(old.unet).__name__)
    return [f"{name} {old} there, {new} here" for name, (new, old) in pairs.items() if new != old]


def _renamed(old: Denoiser, new: Denoiser) -> dict[str, Tensor]:
    """The weights of a network under the names that another resolution gives them."""
    state = old.state_dict()
    if not isinstance(old.unet, UNet) or old.img_resolution == new.img_resolution:
        return state
    assert isinstance(new.unet, UNet)
    levels = dict(zip(_levels(old.unet), _levels(new.unet), strict=False))
    names = {name: name.split(".") for name in state}
    for parts in names.values():
        if parts[1] in ("enc", "dec"):
            level, _, block = parts[2].partition("_")
            parts[2] = f"{levels.get(level, level)}_{block}"
    return {".".join(parts): state[name] for name, parts in names.items()}


def _levels(unet: UNet) -> list[str]:
    return list(dict.fromkeys(name.partition("_")[0] for name in unet.enc))


def _widened(
    name: str, value: Tensor, target: Tensor, old: Denoiser, new: Denoiser
) -> tuple[Tensor | None, str]:
    """The weights of a layer with other inputs: those that it lacks get zeros, classes their own of a new network.

    A class whose weights start from zeros would need some 30 steps to reach the size of the others, since Adam moves
    each weight by at most about the learning rate in a step.

    Returns:
        The weights, None if they cannot fit, and what changes, in words.
    """
    if (
        not isinstance(new.unet, UNet)
        or value.shape[0] != target.shape[0]
        or value.shape[2:] != target.shape[2:]
    ):
        return None, ""
    before, after, are_classes = value.shape[1], target.shape[1], False
    features, scale, last = new.unet.features, 1.0, 0
    if name == "unet.emb_label.weight":
        what, shared = "entries of its labels", min(before, after)
        are_classes = not new.takes_vectors and after > before
        if features.weights == "plain" and features.unit_labels and not new.takes_vectors:
            scale = math.sqrt(before / after)  # one-hot labels are scaled by the root of their number
    elif name == f"unet.enc.{_levels(new.unet)[0]}_conv.weight":
        what, last = "channels of its condition", int(features.constant_channel)
        shared = min(before, after) - last
    else:
        return None, ""
    widened = torch.zeros_like(target)
    if are_classes:
        widened[:, shared:] = target[:, shared:]
    if features.weights != "plain":
        # The RMS of each row stays what it was, so that old inputs keep their effect.
        if are_classes:
            widened[:, shared:] *= _rms(value) / _rms(target[:, shared:])
        else:
            scale = math.sqrt(after / before)
    widened[:, :shared] = scale * value[:, :shared]
    if last:
        widened[:, -last:] = scale * value[:, -last:]
    start = "at random" if are_classes else "without effect"
    change = f"{after - before} more start {start}" if after > before else f"{before - after} are left out"
    return widened, f"{name}: of the {what}, {change}"


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(1, keepdim=True).sqrt()


def _misfit(path: str, reason: str) -> ValueError:
    return ValueError(
        f"the weights of {path} do not fit this network ({reason}): give the settings of its network, which --settings "
        "takes from a run, or leave --init out"
    )
