"""Consistency tuning: turn a diffusion model into one that maps noise to images in one to four evaluations.

A denoiser is consistent if it gives the same image anywhere on a path of the probability-flow ODE; one evaluation then
goes to the end of the path. Tuning starts from a diffusion model, the teacher, and makes neighbouring points of a path
agree: D(x_t, t) is pulled towards D(x_r, r) with r < t, while the gap between t and r shrinks.

Ref: consistency models (arXiv 2303.01469); Easy Consistency Tuning (arXiv 2406.14548).
"""

import copy
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edm2.data import ImageDataset
from edm2.diffusion import MODEL_FILE, Denoiser, DenoiserFn, WithoutLabels, load_model, save_model
from edm2.diffusion.fixed_weights import SamplingNetwork
from edm2.diffusion.loss import TrainableDenoiser, draw_sigma
from edm2.nn import faster_channels_last, keyed_normal, use_channels_last
from edm2.train.coding import Coding
from edm2.train.config import TrainConfig
from edm2.train.config_groups import ConsistencyConfig
from edm2.train.objectives import NOISE_STREAM, SIGMA_STREAM, TrainingBatch
from edm2.train.run_folder import TEACHER, check_free

GUIDE_FILE = "guide.safetensors"
IGNORES_LABELS = "ignores_labels"  # in the info of a guide
SIGMA_MIN = 0.002
# How much wider the gap is at low noise, and how fast that fades: k and b of the paper.
_WIDER, _FADING = 8.0, 1.0


@dataclass(frozen=True)
class Teacher:
    """The diffusion model that a student starts from, and the network that guides it.

    Args:
        model: In eval mode, without gradients.
        info: What the model's file says about it.
        guide: Likewise in eval mode; None without guidance.
        guide_info: What the guide's file says about it, such as that it is to be given no labels.
    """

    model: Denoiser
    info: dict[str, Any]
    guide: Denoiser | None = None
    guide_info: dict[str, Any] = field(default_factory=dict)

    @property
    def coding(self) -> Coding:
        """Conversion of stored images to the teacher's units."""
        return Coding.from_json(self.info["coding"])

    @property
    def guide_for_sampling(self) -> DenoiserFn | None:
        """The guide as samplers take it."""
        if self.guide is not None and self.guide_info.get(IGNORES_LABELS):
            return WithoutLabels(self.guide, self.guide.label_dim or 0)
        return self.guide

    @property
    def licence(self) -> dict[str, Any]:
        """What the weights carry about their licence, and a student's then carry, too."""
        return {key: self.info[key] for key in ("license", "license_notice") if key in self.info}

    def student(self, dtype: str) -> Denoiser:
        """A trainable copy of the model, which computes in a precision."""
        student = copy.deepcopy(self.model).requires_grad_(True)
        for (
            parameter
        ) in student.parameters():  # the trainer chooses their layout, and shards contiguous ones only
            parameter.data = parameter.data.contiguous()
        student.dtype = getattr(torch, dtype)
        return student

    def with_fixed_weights(self) -> "Teacher":
        """The same teacher for evaluation only, faster and equal up to rounding; its states have other values."""
        guide = None if self.guide is None else SamplingNetwork(self.guide).module
        return replace(self, model=SamplingNetwork(self.model).module, guide=guide)

    def save(self, run: Path) -> None:
        """Write what is missing of the folder `teacher` in a student's run.

        Raises:
            ValueError: If the folder holds something other than a run.
        """
        check_free(run)
        for name, network, info in (
            (MODEL_FILE, self.model, self.info),
            (GUIDE_FILE, self.guide, self.guide_info),
        ):
            if network is not None and not (run / TEACHER / name).exists():
                save_model(run / TEACHER / name, network.options, network.state_dict(), info)

    @classmethod
    def load(cls, run: Path, device: torch.device | str = "cpu") -> "Teacher":
        """Read the folder `teacher` of a student's run.

        Raises:
            ValueError: If it is missing or damaged.
        """
        folder = run / TEACHER
        if not (folder / MODEL_FILE).exists():
            raise ValueError(
                f"{folder} has no {MODEL_FILE}: restore it from a copy, or start with `edm2 distill`, which writes it"
            )
        model, info = load_model(folder / MODEL_FILE, device=device)
        guide: Denoiser | None = None
        guide_info: dict[str, Any] = {}
        if (folder / GUIDE_FILE).exists():
            guide, guide_info = load_model(folder / GUIDE_FILE, device=device)
        for network in (model, guide):
            if network is not None and faster_channels_last(network):
                use_channels_last(network)
        return cls(model, info, guide, guide_info)

    def check_data(self, dataset: ImageDataset) -> None:
        """Raise ValueError unless the teacher makes images, and a data set holds such images and classes."""
        if self.info.get("residual") or self.info.get("objective"):
            raise ValueError(
                "the teacher is a regression or a residual model, which cannot be distilled: give a "
                "diffusion model of images"
            )
        shape, classes = dataset.image_shape, dataset.num_classes
        ours = (self.model.img_shape, self.model.label_dim or 0)
        channels = shape[0] // 2 if self.coding.kind == "latents" else shape[0]
        theirs = ((channels, *shape[1:]), classes)
        if ours != theirs:
            raise ValueError(
                f"{dataset.name!r} has images {theirs[0]} with {classes} classes, and the teacher makes {ours[0]} with "
                f"{ours[1]}: give the teacher's training data"
            )


def lower_levels(sigma: Tensor, num_images: int, options: ConsistencyConfig) -> Tensor:
    """The lower noise level r of each pair, a fraction of t that rises towards 1 as the gap is halved.

    After h halvings `r = t (1 - 2^-(2 + h) (1 + 8 sigmoid(-t)))`, and 0 where that is below 0.002. The gap is wider at
    low noise.

    Args:
        sigma: `[B]` levels t.
        num_images: Images seen.
        options: Number and length of the halvings.

    Returns:
        `[B]`.

    Ref: arXiv 2406.14548 Sec. 3.
    """
    assert options.halving_images is not None
    halvings = min(num_images / options.halving_images, options.halvings)
    gap = 2.0 ** -(2 + halvings) * (1 + _WIDER * torch.sigmoid(-_FADING * sigma))
    lower = sigma * (1 - gap)
    return torch.where(lower < SIGMA_MIN, torch.zeros_like(lower), lower)


class ConsistencyObjective:
    """The loss of consistency tuning: `h / (t - r)`, with h the pseudo-Huber distance of D(x_t, t) from D(x_r, r).

    The learned uncertainty u estimates the logarithm of the loss at each noise level, and weighs nothing.

    Args:
        config: All settings, with those of `consistency`.
        teacher: Model and guide; evaluated only where a point of its path is wanted.

    Ref: arXiv 2406.14548 Sec. 3; with a teacher's step, arXiv 2303.01469 Alg. 2.
    """

    def __init__(self, config: TrainConfig, teacher: Teacher) -> None:
        assert config.consistency is not None
        self.config, self.options, self.teacher = config, config.consistency, teacher

    def __call__(self, denoiser: TrainableDenoiser, batch: TrainingBatch, /) -> Tensor:
        """Compute the loss of each image, `[B, 1, 1, 1]`; see `edm2.train.objectives.Objective`."""
        loss, seed, given = self.config.loss, self.config.seed, batch.network_arguments(self.config.seed)
        drawn = draw_sigma(batch.index, p_mean=loss.p_mean, p_std=loss.p_std, seed=seed, stream=SIGMA_STREAM)
        assert self.options.sigma_max is not None
        t = drawn.clamp(SIGMA_MIN, self.options.sigma_max).reshape(-1, 1, 1, 1)
        r = lower_levels(t, batch.num_images, self.options)
        noise = keyed_normal(batch.index, batch.images.shape[1:], seed=seed, stream=NOISE_STREAM)
        noisy = batch.images + t * noise
        with torch.no_grad():
            if self.options.path == "teacher":
                nearer = self._step(noisy, t, r, batch.labels, given)
            else:
                nearer = batch.images + r * noise
            target = denoiser(nearer, r.clamp_min(SIGMA_MIN), batch.labels, **given)
            # At level 0 every consistent denoiser is the identity.
            target = torch.where(r > 0, target, nearer)
        denoised, logvar = denoiser(noisy, t, batch.labels, return_logvar=True, **given)
        error = denoised - target
        if batch.mask is not None:
            error = torch.where(batch.mask, error, 0.0)
        distance = pseudo_huber(error, self.options.huber) / (t - r)
        # Every parameter has a gradient, as processes that share the work expect.
        balanced: Tensor = distance + distance.detach() / logvar.exp() + logvar
        return balanced

    def _step(self, x: Tensor, t: Tensor, r: Tensor, labels: Tensor | None, given: dict[str, Any]) -> Tensor:
        """Heun's step of the teacher's ODE from t to r, or Euler's where r is 0."""
        slope = (x - self._denoise(x, t, labels, given)) / t
        nearer = x + (r - t) * slope
        lower = r.clamp_min(SIGMA_MIN)
        end = (nearer - self._denoise(nearer, lower, labels, given)) / lower
        return x + (r - t) * torch.where(r > 0, (slope + end) / 2, slope)

    def _denoise(self, x: Tensor, sigma: Tensor, labels: Tensor | None, given: dict[str, Any]) -> Tensor:
        """The teacher's images, guided at the levels of the interval."""
        main: Tensor = self.teacher.model(x, sigma, labels, **given)
        guide, (low, high) = self.teacher.guide, self.options.interval
        if guide is None:
            return main
        if not guide.augment_dim:
            given = {**given, "augment_labels": None}
        if not guide.cond_channels:
            given = {name: value for name, value in given.items() if name != "condition"}
        if self.teacher.guide_info.get(IGNORES_LABELS):
            labels = None
        reference: Tensor = guide(x, sigma, labels, **given)
        acts = (low < sigma) & (sigma <= high)
        guided: Tensor = torch.where(acts, reference + self.options.guidance * (main - reference), main)
        return guided


def pseudo_huber(error: Tensor, scale: float) -> Tensor:
    """`sqrt(|error|^2 + c^2) - c` of each image, with `c = scale sqrt(D)` for D elements: `[B, 1, 1, 1]`.

    Its gradient has a norm of at most 1, so that no image outweighs the others.

    Ref: arXiv 2310.14189 Sec. 3.3.
    """
    c = scale * math.sqrt(error[0].numel())
    square = error.square().sum(dim=(1, 2, 3), keepdim=True)
    return square / ((square + c**2).sqrt() + c)  # the difference of two large numbers would lose digits
