"""Checks, before anything is sampled, that what is given with a model fits it."""

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from edm2.data import LatentDecoder
from edm2.train.coding import Coding

if TYPE_CHECKING:
    from edm2.generate.generator import ImageGenerator


# Beyond the range of training by this share of it, an entry of a vector is strange, such as a longer lead time. Models
# of earlier versions do not know the range: there it is 4 standard deviations on both sides.
_BEYOND, _FAR = 1e-3, 4.0


def check_inputs(
    model: "ImageGenerator",
    count: int,
    labels: np.ndarray | None,
    conditions: np.ndarray | Tensor | None,
    vectors: np.ndarray | None = None,
) -> None:
    """Raise ValueError unless labels, conditions and vectors fit a model and `count` images."""
    size = model.denoiser.label_dim or 0
    if model.coding.vectors is not None:
        wanted: tuple[int, ...] = (count, size - model.num_classes)
        if vectors is None or vectors.shape != wanted:
            got = "none were given" if vectors is None else f"not of shape {list(vectors.shape)}"
            raise ValueError(f"this model is conditioned on vectors: give vectors {list(wanted)}, {got}")
        _check_finite(vectors)
        size = model.num_classes
    elif vectors is not None:
        raise ValueError("vectors were given to a model that was not trained with any: leave them out")
    if labels is not None and len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} seeds: give one each")
    if model.takes_vectors and model.coding.vectors is None:
        if labels is None or labels.ndim != 2 or labels.shape[1] != size:
            got = "none were given" if labels is None else f"not of shape {labels.shape}"
            raise ValueError(f"this model is conditioned on vectors: give labels [N, {size}], {got}")
    elif labels is not None:
        _check_classes(labels, size)
    channels = model.denoiser.cond_channels
    coding = model.coding.condition
    wanted = (count, *((channels, *model.denoiser.img_shape[1:]) if coding is None else coding.shape))
    if conditions is None and channels:
        raise ValueError(f"this model is conditioned on images: give conditions {list(wanted)}")
    if conditions is not None and tuple(conditions.shape) != wanted:
        what = list(wanted) if channels else "none"
        raise ValueError(f"conditions of shape {list(conditions.shape)}: this model takes {what}")


def warn_of_strange(
    model: "ImageGenerator", conditions: np.ndarray | None, vectors: np.ndarray | None
) -> None:
    """Warn of conditions and vectors that the model was not trained for.

    Args:
        model: The model.
        conditions: `[N, C, H, W]` as stored.
        vectors: `[..., V]` in the data's own units.

    Raises:
        ValueError: If conditions are of another kind, or must have other units, or vectors are not finite.
    """
    coding = model.coding
    if (
        conditions is not None
        and coding.condition is not None
        and (remark := coding.condition.check(conditions))
    ):
        warnings.warn(remark, stacklevel=3)
    if vectors is None or coding.vectors is None:
        return
    _check_finite(vectors)
    mean, std = np.asarray(coding.vectors.mean), np.asarray(coding.vectors.std)
    low, high = coding.vector_range or (mean - _FAR * std, mean + _FAR * std)
    low, high = np.asarray(low), np.asarray(high)
    entries = vectors.reshape(-1, len(mean))
    beyond = np.maximum(low - entries, entries - high) / (high - low)
    row, entry = np.unravel_index(int(beyond.argmax()), beyond.shape)
    if beyond[row, entry] > _BEYOND:
        was = (
            f"it was {mean[entry]:.4g} with a standard deviation of {std[entry]:.4g}"
            if coding.vector_range is None
            else f"it was between {low[entry]:.4g} and {high[entry]:.4g}"
        )
        warnings.warn(
            f"entry {entry} of the vectors reaches {entries[row, entry]:.4g}, and in training {was}: the model was not "
            "trained on such values",
            stacklevel=3,
        )


def _check_finite(vectors: np.ndarray) -> None:
    if not np.isfinite(vectors).all():
        raise ValueError("vectors hold values that are not finite: fill them, or leave these cases out")


def _check_classes(labels: np.ndarray, size: int) -> None:
    if not size:
        raise ValueError("labels were given to an unconditional model: leave them out")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels of {labels.dtype} {labels.shape} must be class indices, integers [N]")
    wrong = labels[(labels < 0) | (labels >= size)]
    if len(wrong):
        raise ValueError(f"class {wrong[0]} is outside 0..{size - 1}")


def check_guide(model: "ImageGenerator", guide: "ImageGenerator") -> None:
    """Raise ValueError unless one model can guide another."""
    ours, theirs = model.denoiser, guide.denoiser
    for what, own, other, fits in (
        ("images", ours.img_shape, theirs.img_shape, ()),
        ("label size", ours.label_dim, theirs.label_dim, (0,)),
        ("condition channels", ours.cond_channels, theirs.cond_channels, (0,)),
    ):
        if other != own and other not in fits:
            raise ValueError(f"the guide has {what} {other}, the model {own}: choose a guide that fits")
    # What the guide is not given need not agree.
    own_coding, guide_coding = (
        replace(
            coding,
            condition=coding.condition if theirs.cond_channels else None,
            vectors=coding.vectors if theirs.label_dim else None,
            num_classes=coding.num_classes if theirs.label_dim else 0,
        )
        for coding in (model.coding, guide.coding)
    )
    if guide.info.get("residual") != model.info.get("residual"):
        raise ValueError("model and guide must be of residuals of the same regression, or both of images")
    if guide_coding != own_coding:
        raise ValueError(
            f"the guide's images are coded as {guide.coding.to_json()}, the model's as {model.coding.to_json()}: "
            "choose a guide that was trained with the same coding"
        )


def check_decoder(decoder: LatentDecoder, coding: Coding) -> None:
    """Raise ValueError unless a decoder fits a model's coding."""
    if coding.kind != "latents":
        raise ValueError(f"the model makes {coding.kind}, not latents: leave the autoencoder out")
    if decoder.latent_channels != coding.num_channels:
        raise ValueError(
            f"the autoencoder decodes latents of {decoder.latent_channels} channels and the model's have "
            f"{coding.num_channels}: name the one that its training data was encoded with"
        )


def class_index(name: str, class_names: Sequence[str], num_classes: int) -> int:
    """Number of a class that is given by its name, or by its number.

    Raises:
        ValueError: If there is no such class.
    """
    if name in class_names:
        return class_names.index(name)
    if name.isdecimal() and int(name) < max(num_classes, 1):
        return int(name)
    if not num_classes:
        raise ValueError(f"the model has no classes, and --label names {name!r}: leave it out")
    near = difflib.get_close_matches(name, class_names, n=2, cutoff=0.5)
    if near:
        known = f"did you mean {' or '.join(near)}?"
    elif class_names:
        more = f", and {len(class_names) - 12} more" if len(class_names) > 12 else ""
        known = f"there are {', '.join(class_names[:12])}{more}"
    else:
        known = f"give a number from 0 to {num_classes - 1}"
    raise ValueError(f"there is no class {name!r}: {known}")
