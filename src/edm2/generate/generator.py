"""From a saved model to images, each of which depends only on its own seed."""

import copy
import hashlib
import itertools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edm2.data import LatentDecoder
from edm2.diffusion import Denoiser, DenoiserFn, GivenDenoiser, WithoutLabels, load_model
from edm2.diffusion.fixed_weights import SamplingNetwork
from edm2.diffusion.samplers import Callback
from edm2.generate.checks import check_decoder, check_guide, check_inputs
from edm2.generate.features import block_names, image_features
from edm2.generate.reconstructed import read_info, reconstruct_denoiser
from edm2.generate.sampler_options import SamplerOptions, options_for
from edm2.generate.seeds import batches
from edm2.nn import faster_channels_last, keyed_normal, use_channels_last
from edm2.train.coding import Coding
from edm2.train.consistency import IGNORES_LABELS
from edm2.train.residual import Residual, open_residual, regression

_PRECISIONS = ("float32", "bfloat16", "float16")
# First of the image's streams of keyed random numbers for noise that a sampler adds; 0 is its starting noise.
_NOISE_STREAM = 2


class ImageGenerator:
    """A denoiser with the coding of its images.

    Args:
        denoiser: Denoiser in eval mode.
        coding: Conversion between network units and pixels.
        info: What the model's file says about it.
        fix_weights: Whether to normalise the weights once per call, in a copy, instead of in every evaluation.
        compile: Whether to use torch.compile, which implies fixed weights.
        decoder: Decoder of a latent model's latents.
        residual: Regression that a model of residuals adds to its samples.

    Attributes:
        num_classes: Number of classes; 0 for an unconditional model and for one that is conditioned on vectors only.
        class_names: One for each class, or empty.
        pixel_channels: Channels of its pictures; 0 if it makes floats, or latents without a decoder.

    Raises:
        ValueError: If the decoder does not fit the model.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        coding: Coding,
        info: dict[str, Any] | None = None,
        *,
        fix_weights: bool = False,
        compile: bool = False,
        decoder: LatentDecoder | None = None,
        residual: Residual | None = None,
    ) -> None:
        if decoder is not None:
            check_decoder(decoder, coding)
        self.denoiser, self.coding, self.decoder = denoiser, coding, decoder
        self.info, self.residual = info or {}, residual
        self.takes_vectors = denoiser.takes_vectors
        self.num_classes = coding.num_classes if self.takes_vectors else denoiser.label_dim or 0
        self.class_names = tuple(self.info.get("class_names", ()))
        self.pixel_channels = coding.num_channels if coding.kind == "pixels" else 0
        if decoder is not None:
            self.pixel_channels = decoder.num_channels
        self._fixed = SamplingNetwork(denoiser, compile=compile) if fix_weights or compile else None

    @classmethod
    def load(
        cls,
        path: str | Path,
        sigma_rel: float | None = None,
        *,
        num_images: float | None = None,
        device: torch.device | str = "cpu",
        dtype: str | torch.dtype = "float32",
        compile: bool = False,
        decoder: LatentDecoder | None = None,
    ) -> "ImageGenerator":
        """Open a saved model, or reconstruct an average from a run's snapshots.

        Args:
            path: Model file, or folder of a finished run or of one reconstruction; with `sigma_rel`, a run.
            sigma_rel: EMA length.
            num_images: Time of that average, in training images. None: the last snapshot's.
            device: Device to compute on.
            dtype: Precision of the network: float32, bfloat16 or float16.
            compile: Whether to use torch.compile.
            decoder: Decoder of a latent model's latents, such as `edm2.data.LatentDecoder.load()`.

        Raises:
            ValueError: As in `edm2.diffusion.load_model` and `edm2.ema.reconstruct`, or if the file does not say
                how images are coded, or the decoder does not fit.
        """
        if sigma_rel is None and num_images is not None:
            raise ValueError(f"{num_images:g} images of which average? Give its EMA length, too")
        precision = str(dtype).removeprefix("torch.")
        if precision not in _PRECISIONS:
            raise ValueError(f"dtype {precision} must be {', '.join(_PRECISIONS)}")
        coding = read_coding(path, sigma_rel)
        if decoder is not None:
            check_decoder(decoder, coding)
        if sigma_rel is None:
            denoiser, info = load_model(path, device=device)
        else:
            denoiser, info = reconstruct_denoiser(path, sigma_rel, num_images)
            denoiser.to(device)
        denoiser.dtype = getattr(torch, precision)
        if faster_channels_last(denoiser):
            use_channels_last(denoiser)
        residual = open_residual(path, info, device)
        return cls(
            denoiser, coding, info, fix_weights=True, compile=compile, decoder=decoder, residual=residual
        )

    def without_labels(self) -> "ImageGenerator":
        """The same model with labels left out: the guide of classifier-free guidance by a single network.

        Raises:
            ValueError: If the model has no labels to leave out.
        """
        if not self.denoiser.label_dim:
            raise ValueError(
                "an unconditional model cannot guide itself, because it has no labels to leave out: choose another "
                "guide"
            )
        if not (self.info.get("label_dropout") or self.ignores_labels):
            warnings.warn(
                "the model was not trained with missing labels (label_dropout), which a guide without "
                "labels relies on",
                stacklevel=2,
            )
        other = copy.copy(self)
        other.info = {**self.info, IGNORES_LABELS: True}
        return other

    @property
    def ignores_labels(self) -> bool:
        """Whether this is a model whose labels are left out."""
        return bool(self.info.get(IGNORES_LABELS))

    def to(self, device: torch.device | str) -> "ImageGenerator":
        """Move to a device; returns itself."""
        self.denoiser.to(device)
        if self._fixed is not None:
            self._fixed.to(device)
        for part in (self.decoder, self.residual):
            if part is not None:
                part.to(device)
        return self

    def identity(self) -> dict[str, Any]:
        """A digest of everything that the model's images depend on, and the model's origin."""
        network = [self.denoiser.options, self.coding.to_json()]
        digest = hashlib.sha256(json.dumps(network, sort_keys=True).encode())
        for name, tensor in sorted(self.denoiser.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        facts = {key: self.info.get(key) for key in ("run_id", "num_images", "sigma_rel", "data")}
        precision = str(self.denoiser.dtype).removeprefix("torch.")
        decoding: dict[str, Any] = {} if self.decoder is None else {"decoder": self.decoder.identity()}
        if self.ignores_labels:
            decoding[IGNORES_LABELS] = True
        if self.residual is not None:
            decoding["regression"] = self.residual.sha256[:16]
        return {**facts, "digest": digest.hexdigest()[:16], "dtype": precision, **decoding}

    def decode(self, x: Tensor) -> Tensor:
        """Convert network units to images, `[B, C, H, W]`, uint8 for pictures."""
        decoded = self.coding.decode(x)
        return decoded if self.decoder is None else self.decoder(decoded)

    def labels_for(self, seeds: Sequence[int]) -> np.ndarray:
        """Default class of each seed: seed modulo the number of classes, `[N]` int64."""
        return np.asarray(seeds, np.int64) % max(self.num_classes, 1)

    @property
    def is_student(self) -> bool:
        """Whether the model makes images in a few evaluations, by `sample_consistency` alone; see `edm2 distill`."""
        return "consistency" in self.info

    def sampler_options(self, **options: Any) -> SamplerOptions:
        """Options of the sampler, with the defaults that suit the model; see `options_for`."""
        return options_for(self.info, **options)

    def latents(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | np.ndarray | None = None,
        *,
        conditions: np.ndarray | Tensor | None = None,
        vectors: np.ndarray | None = None,
        guide: "ImageGenerator | DenoiserFn | None" = None,
        on_step: Callback | None = None,
        **options: Any,
    ) -> Tensor:
        """Sample in network units, all seeds in one batch; see `images`.

        `on_step` is called at each step with its index, noise level, noisy and denoised images.

        Returns:
            `[N, C, H, W]` float32.
        """
        chosen = self.sampler_options(**options)
        self._refresh()
        if isinstance(guide, ImageGenerator):
            check_guide(self, guide)
            guide._refresh()
        return self._sample(seeds, labels, conditions, vectors, guide, chosen, on_step)

    def images(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | np.ndarray | None = None,
        *,
        conditions: np.ndarray | Tensor | None = None,
        vectors: np.ndarray | None = None,
        batch_size: int = 250,
        **options: Any,
    ) -> np.ndarray:
        """Sample images.

        Args:
            seeds: One per image; the seed alone determines the image's noise and default class.
            labels: Class of each image. Default: seed modulo the number of classes. For a model conditioned on
                vectors whose coding it does not store: `[N, label_dim]` floats.
            conditions: Images given as conditions, `[N, C, H, W]` in the units of the training data; of unit magnitude
                for a model that does not store their coding.
            vectors: Vectors given with the images, `[N, D]` in the units of the training data.
            batch_size: Images per batch.
            **options: Guide, as in `latents`, and the fields of `SamplerOptions`.

        Returns:
            `[N, C, H, W]` uint8 for pixels and decoded latents; float32 in the data's units for float data, and
            for latents without a decoder.

        Raises:
            ValueError: If labels, conditions, guide or sampler options do not fit.
            FloatingPointError: If values are not finite.
        """
        if conditions is not None and self.coding.condition is not None:
            self.coding.condition.check(np.asarray(conditions))
        parts = []
        for part in batches(len(seeds), batch_size):
            given = {"labels": labels, "conditions": conditions, "vectors": vectors}
            chosen: Any = {name: rows[part] for name, rows in given.items() if rows is not None}
            latents = self.latents(seeds[part], **chosen, **options)
            self._check_finite(latents, seeds[part])
            parts.append(self.decode(latents).cpu().numpy())
        return np.concatenate(parts)

    @property
    def blocks(self) -> list[str]:
        """Names of the network's blocks, for `features`."""
        return block_names(self.denoiser)

    def features(
        self,
        images: np.ndarray,
        sigma: float,
        block: str,
        *,
        labels: np.ndarray | None = None,
        cells: int = 1,
        seed: int = 0,
    ) -> np.ndarray:
        """Output of a block for noisy images, averaged over the pixels, `[N, width * cells^2]` float32.

        Args:
            images: `[N, C, H, W]` stored images: uint8 for pixels, floats otherwise.
            sigma: Noise level, in network units: the standard deviation of clean images is sigma_data (0.5).
            block: One of `blocks`.
            labels: Classes, or vectors, to condition on; None for missing labels.
            cells: Parts of each side of the image over which the output is averaged.
            seed: Seed of the noise, which also depends on the image's number.

        Raises:
            ValueError: For a block or noise level that does not exist, or images or labels that do not fit.
        """
        found = image_features(
            self.denoiser, self.coding, images, sigma, [block], labels=labels, cells=cells, seed=seed
        )
        return found[block]

    def _check_finite(self, latents: Tensor, seeds: Sequence[int]) -> None:
        broken = ~latents.flatten(1).isfinite().all(dim=1)
        if broken.any():
            precision = str(self.denoiser.dtype).removeprefix("torch.")
            first = seeds[int(broken.int().argmax())]
            raise FloatingPointError(
                f"the network gives values that are not finite, first for seed {first}: its "
                f"weights are broken, {precision} is too coarse for it, or the guidance too strong"
            )

    def _refresh(self) -> None:
        if self._fixed is not None:
            self._fixed.refresh()

    def _bind(self, condition: Tensor | None) -> DenoiserFn:
        network: Any = self.denoiser if self._fixed is None else self._fixed
        return GivenDenoiser(network, condition if self.denoiser.cond_channels else None)

    def _sample(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | np.ndarray | None,
        conditions: np.ndarray | Tensor | None,
        vectors: np.ndarray | None,
        guide: "ImageGenerator | DenoiserFn | None",
        options: SamplerOptions,
        on_step: Callback | None,
    ) -> Tensor:
        device = next(self.denoiser.parameters()).device
        index = torch.tensor(list(seeds), dtype=torch.int64, device=device)
        shape = self.denoiser.img_shape
        chosen = None if labels is None else np.asarray(labels)
        if chosen is None and self.num_classes:
            chosen = self.labels_for(seeds)
        check_inputs(self, len(index), chosen, conditions, vectors)
        given = None if chosen is None else torch.from_numpy(chosen).to(device)
        if self.coding.vectors is not None:
            given = self.coding.labels(given, torch.as_tensor(vectors, dtype=torch.float32, device=device))
        elif given is not None:
            given = given.float() if self.takes_vectors else given.long()
        condition = None if conditions is None else torch.as_tensor(conditions, device=device)
        if condition is not None:
            coding = self.coding.condition
            condition = condition.float() if coding is None else coding.encode(condition)

        streams = itertools.count(_NOISE_STREAM)

        def randn_like(x: Tensor) -> Tensor:
            return keyed_normal(index, shape, stream=next(streams)).to(x.dtype)

        network = self._bind(condition)
        second: DenoiserFn | None
        if isinstance(guide, ImageGenerator):
            # One object where they share a network, so that one batch can evaluate both.
            shared = guide.denoiser is self.denoiser and condition is None
            second = network if shared else guide._bind(condition)
            if guide.ignores_labels:
                second = WithoutLabels(second, guide.denoiser.label_dim or 0)
        elif isinstance(guide, WithoutLabels) and guide.network is self.denoiser:
            second = WithoutLabels(self._bind(condition), guide.label_dim)
        else:
            second = guide
        noise = keyed_normal(index, shape)
        if self.info.get("objective") == "mean":
            return regression(network, noise, given)
        sampled = options.sample(
            network,
            noise,
            given,
            guide=second,
            bounds=self._pixel_range(device) if options.clip_denoised else None,
            randn_like=randn_like,
            callback=on_step,
        )
        return sampled if self.residual is None else self.residual.add(sampled, given, condition)

    def _pixel_range(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Lowest and highest value of pixels in network units, `[1, C, 1, 1]` each; None for floats and latents."""
        if self.coding.kind != "pixels" or self.residual is not None:
            return None
        ends = torch.tensor([0, 255], dtype=torch.uint8, device=device)
        low, high = self.coding.values.encode(
            ends[:, None, None, None].expand(2, self.coding.num_channels, 1, 1)
        )
        return low[None], high[None]


def read_coding(path: str | Path, sigma_rel: float | None = None) -> Coding:
    """Coding of a saved model's images, or with an EMA length, of a run's snapshots; reads no weights.

    Raises:
        ValueError: If there is no model, or its file does not say how images are coded.
    """
    info = read_info(path, sigma_rel)
    if "coding" not in info:
        raise ValueError(
            f"{path} does not say how its images are coded: load it with edm2.diffusion.load_model"
        )
    try:
        return Coding.from_json(info["coding"])
    except ValueError as error:
        raise ValueError(f"{path} describes {error}: restore it from a copy") from error
