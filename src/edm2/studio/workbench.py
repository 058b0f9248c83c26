"""What the studio shows of a run: models of any EMA length, their images, denoising paths and curves."""

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from edm2.data import LatentDecoder
from edm2.data.autoencoder import RELEASED_AUTOENCODER
from edm2.diffusion import MODEL_FILE, SamplerName
from edm2.ema import reconstruct_many
from edm2.ema.reconstruct import free_memory
from edm2.ema.storage.manifest import Manifest, read_manifest
from edm2.evaluation.noise_errors import errors_by_noise, noise_density
from edm2.generate import ImageGenerator, read_coding, snapshots_of
from edm2.generate.checks import check_guide
from edm2.generate.reconstructed import read_info
from edm2.generate.sampler_options import STUDENT_SAMPLER
from edm2.hub import Pretrained, Sampling, save_pretrained
from edm2.report import uncertainty_curve
from edm2.report.ema_figures import reconstruction_figure
from edm2.report.grids import coloured
from edm2.report.style import SERIES
from edm2.studio.cases import Cases
from edm2.studio.choices import EVERYWHERE, Choice
from edm2.train.build import open_run_data
from edm2.train.run_folder import read_config
from edm2.tuning.page import knob_curves
from edm2.tuning.result import read_tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAVED = "studio"
_KEPT_MODELS = 12
_KEPT_BYTES = 2 << 30
_EXAMPLES = 32


class Workbench:
    """A run, and models made of it.

    Models are kept in memory after their first use, the latest twelve, or fewer where they are large. All methods may
    be called from several threads; networks are run one at a time.

    Args:
        run: Folder of a run, finished or under way.
        other: Model file or run that may guide.
        vae: Autoencoder that decodes the latents of a latent model; see `edm2 sample`.
        device: Where networks run.

    Attributes:
        times: Times of the snapshots in training images, ascending.
        lengths: Shortest and longest tracked EMA length.
        other: As given, opened; None if there is none.
        is_student: Whether the run is one of `edm2 distill`.
        samplers: Names of the samplers that suit it, the usual one first.
        cases: What a conditional run is given; None for other runs.

    Raises:
        ValueError: If the folder is not a run with snapshots, its model is conditioned on vectors alone, its latents
            cannot be decoded, the data of a conditional run is gone, the other model cannot guide it, or the model is
            too large for the memory.
    """

    def __init__(
        self,
        run: str | Path,
        other: str | Path | None = None,
        *,
        vae: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.run, self._device = Path(run), device
        read_config(self.run)
        self.snapshots = snapshots_of(self.run)
        self._models: OrderedDict[tuple[float, float], ImageGenerator] = OrderedDict()
        self._lock = threading.RLock()
        self.refresh()
        coding = read_coding(self.run, self.lengths[1])
        if vae is not None and coding.kind != "latents":
            raise ValueError(f"--vae is for latent models, and {run} makes {coding.kind}: leave it out")
        self._vae = vae
        self._decoder = None
        if coding.kind == "latents":
            self._decoder = LatentDecoder.load(vae or RELEASED_AUTOENCODER, device=device)
        newest = self.model(self.lengths[1], self.times[-1])
        if coding.condition is None and (newest.takes_vectors or newest.denoiser.cond_channels):
            raise ValueError(
                f"{run} is conditioned on vectors, or on images of unknown coding: sample with `edm2 sample`"
            )
        self.cases = None if coding.condition is None else Cases(self.run, coding)
        self._errors: dict[tuple[float, float], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.is_student = newest.is_student
        others: list[SamplerName] = ["dpmpp-2m", "heun", "euler", "dpmpp-3m", "dpmpp-2m-sde"]
        self.samplers: list[SamplerName] = [STUDENT_SAMPLER] if self.is_student else others
        self.num_classes = newest.num_classes
        self.class_names = newest.class_names or tuple(map(str, range(self.num_classes)))
        self.other_path = None if other is None else Path(other)
        self.other = None if other is None else ImageGenerator.load(other, device=device)
        if self.other is not None:
            check_guide(newest, self.other)

    def refresh(self) -> None:
        """See which snapshots there are now; a run under way may have written more."""
        self.settings = read_config(self.run)["settings"]
        self.manifest: Manifest = read_manifest(self.snapshots)
        self.times = sorted({float(s.t) for s in self.manifest.snapshots})
        if not self.times:
            raise ValueError(f"{self.run} has no snapshot yet: train on until the first")
        lengths = [s.sigma_rel for s in self.manifest.snapshots]
        self.lengths = (min(lengths), max(lengths))

    @property
    def has_ended(self) -> bool:
        """Whether the run has seen all its images, or has written a model of its newest snapshot."""
        seen = self.times[-1]
        if seen >= self.settings["num_images"]:
            return True
        return (self.run / MODEL_FILE).exists() and read_info(self.run)["num_images"] >= seen

    @property
    def status(self) -> str:
        """How far the run is, in words."""
        seen, total = self.times[-1], self.settings["num_images"]
        if self.has_ended:
            return f"finished after {seen:,.0f} training images"
        return f"still training: the newest snapshot is of {seen:,.0f} of {total:,} images"

    def first_choice(self) -> Choice:
        """What the page starts with: the settings that `edm2 tune` found, else the longest tracked average."""
        newest = self.times[-1]
        early = min(self.times, key=lambda t: abs(t - 0.4 * newest))  # what guides best in most runs
        plain = Choice(
            sigma_rel=self.lengths[1],
            num_images=newest,
            guide_sigma_rel=self.lengths[0],
            guide_images=early,
            guidance=1.5,
            sampler=self.samplers[0],
            num_steps=2 if self.is_student else 16,
        )
        tuned = read_tuned(self.run)
        if tuned is None or not tuned.is_better or tuned.best.guide is not None:
            return plain
        best = tuned.best
        sampler = cast(SamplerName, tuned.sampler)
        found = replace(plain, sigma_rel=best.sigma_rel, sampler=sampler, num_steps=tuned.num_steps)
        if best.guide_images is None or best.guide_sigma_rel is None:
            return found
        return replace(
            found,
            guide="earlier",
            guide_images=best.guide_images,
            guide_sigma_rel=best.guide_sigma_rel,
            guidance=best.guidance,
            interval=best.interval,
        )

    def model(self, sigma_rel: float, num_images: float) -> ImageGenerator:
        """The model with an EMA length at a time, from memory or from the snapshots.

        Raises:
            ValueError: As in `edm2.ema.reconstruct`.
        """
        key = (sigma_rel, num_images)
        with self._lock:
            if key not in self._models:
                self._make_room()
                self._models[key] = ImageGenerator.load(
                    self.run, sigma_rel, num_images=num_images, device=self._device, decoder=self._decoder
                )
            self._models.move_to_end(key)
            while len(self._models) > _KEPT_MODELS:
                self._models.popitem(last=False)
            return self._models[key]

    def _make_room(self) -> None:
        """Let go of old models until another one fits into memory.

        Raises:
            ValueError: If it does not fit even alone.
        """
        stored = max(self.manifest.snapshots, key=lambda s: s.num_bytes)
        size = stored.num_bytes * (1 if stored.dtype == "fp32" else 2)
        # Its averages, the network, and the network with fixed weights.
        while self._models and (3 * size > free_memory() or (len(self._models) + 1) * 2 * size > _KEPT_BYTES):
            self._models.popitem(last=False)
        if 3 * size > (room := free_memory()):
            raise ValueError(
                f"the model needs {3 * size / 1e9:.1f} GB of memory, and {room / 1e9:.1f} GB are free: close other "
                "programs, or open the studio on a larger machine"
            )

    @contextmanager
    def _enough_memory(self) -> Iterator[None]:
        """Say in words that the images did not fit into memory."""
        try:
            yield
        except RuntimeError as error:
            if "allocate" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError("the images do not fit into memory: choose fewer of them") from error

    def images(self, choice: Choice) -> np.ndarray:
        """Images of a choice, `[count, C, H, W]` uint8, or float32 of a run on floats.

        Raises:
            ValueError: For settings that do not fit the run or each other.
            FloatingPointError: If values are not finite.
        """
        with self._lock, self._enough_memory():
            generator = self.model(choice.sigma_rel, choice.num_images)
            return generator.images(
                choice.seeds,
                **self._given(choice, choice.count),
                guide=self._guide(choice, generator),
                **choice.options(),
            )

    def given(self, choice: Choice, images: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """What a conditional run was given for images, their mean and spread, and the data's own image, as pictures.

        Args:
            choice: What the images were made with.
            images: From `images`.

        Returns:
            Name and picture `[1, C, H, W]` uint8 of each; empty for other runs.
        """
        if self.cases is None:
            return []
        condition = self.cases.given(choice, 1)["conditions"]
        spread = images.astype(np.float64).std(axis=0, keepdims=True)
        mean = images.mean(axis=0, keepdims=True, dtype=np.float64).astype(images.dtype)
        found = [("given", coloured(condition, condition)), ("mean", self.picture(mean))]
        found.append(
            (f"spread, at most {spread.max():.3g}", coloured(spread, np.append(spread, 0 * spread, 0)))
        )
        truth = self.cases.truth(choice)
        if truth is not None and truth.shape[1:] == images.shape[1:]:
            found.append(("truth", self.picture(truth)))
        return found

    def picture(self, images: np.ndarray) -> np.ndarray:
        """Images as uint8: pictures as they are, floats in colours that span the range of the run's data."""
        if images.dtype == np.uint8:
            return images
        return coloured(images, images if self._examples is None else self._examples[0])

    @cached_property
    def _examples(self) -> tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray]] | None:
        """Some training images, their labels, and what they are given; None if the data is gone."""
        try:
            dataset = open_run_data(self.run)
        except (ValueError, OSError):
            return None
        rows = np.linspace(0, len(dataset) - 1, min(len(dataset), _EXAMPLES)).astype(np.int64)
        labels = dataset.labels(rows) if dataset.num_classes else None
        return dataset.images(rows), labels, dataset.given(rows)

    def command(self, choice: Choice, *, may_write: bool = True) -> str:
        """The command that makes the same images; of a conditional run it needs a file, written into `studio/given`."""
        given = None
        if self.cases is not None:
            if not may_write:
                return "A command needs a file with the condition, and saving is off."
            folder = self.run / SAVED
            folder.mkdir(exist_ok=True)
            given = self.cases.file(choice, folder / "given")
        return choice.command(self.run, self.other_path, given=given, vae=self._vae)

    def path(self, choice: Choice) -> list[tuple[float, np.ndarray]]:
        """How the first image comes about: at each step the noise level, and what the network takes the image for."""
        found: list[tuple[float, Tensor]] = []

        def keep(step: int, sigma: Tensor, x: Tensor, denoised: Tensor) -> None:
            found.append((float(sigma), denoised))

        with self._lock:
            generator = self.model(choice.sigma_rel, choice.num_images)
            generator.latents(
                choice.seeds[:1],
                **self._given(choice, 1),
                guide=self._guide(choice, generator),
                on_step=keep,
                **choice.options(),
            )
            return [(sigma, self.picture(generator.decode(x).cpu().numpy())[0]) for sigma, x in found]

    def profile(self, choice: Choice) -> "Figure":
        """The EMA profile of the choice, wanted and made."""
        times = {(choice.sigma_rel, choice.num_images)}
        results = [
            reconstruct_many(self.snapshots, [s], t, warn_above=math.inf, read=False)[0] for s, t in times
        ]
        return reconstruction_figure(self.manifest, results)

    def tuning(self, choice: Choice) -> list[tuple[str, "Figure"]]:
        """The curves of `edm2 tune`, where the run was tuned, with the choice as a line."""
        tuned = read_tuned(self.run)
        if tuned is None:
            return []
        marks = {"EMA length": choice.sigma_rel, "EMA length with guide": choice.sigma_rel}
        marks |= {"guidance weight": choice.guidance} if choice.is_guided else {}
        found = []
        for stage, figure in knob_curves(tuned):
            mark = marks.get(stage)
            if mark is not None:
                figure.axes[0].axvline(mark, color=SERIES[1], linewidth=1.2)
            found.append((stage, figure))
        return found

    def noise(self, choice: Choice) -> "Figure | None":
        """Loss by noise level on some training images, with the interval of guidance.

        Returns:
            None without the data, and for students and regressions, whose loss is another.
        """
        if self.is_student or self.settings.get("objective") == "mean" or self.settings.get("residual"):
            return None
        if self._examples is None:
            return None
        key = (choice.sigma_rel, choice.num_images)
        with self._lock:
            generator = self.model(*key)
            if key not in self._errors:
                images, labels, given = self._examples
                self._errors[key] = errors_by_noise(generator, images, labels, **given)
        sigma, learned, errors = self._errors[key]
        loss = self.settings["loss"]
        density = noise_density(sigma, p_mean=loss["p_mean"], p_std=loss["p_std"])
        uncertainty = None if generator.denoiser.uncertainty is None else learned
        figure = uncertainty_curve(sigma, uncertainty, errors, density)
        if choice.is_guided and choice.interval != EVERYWHERE:
            low, high = (min(max(end, sigma.min()), sigma.max()) for end in choice.interval)
            figure.axes[0].axvspan(low, high, color=SERIES[1], alpha=0.12)
        return figure

    def save(self, choice: Choice, name: str) -> Path:
        """Write the model with its guide and settings into the run's folder `studio/NAME`, for `edm2 sample`.

        Raises:
            ValueError: For another kind of name, or a guide that has no file of its own.
            FileExistsError: If there is one of that name.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            raise ValueError(f"name {name!r}: use 1 to 64 letters, digits, - and _")
        if choice.is_guided and choice.guide == "without labels":
            raise ValueError(
                "a guide without labels has no file of its own: save without a guide, or use the command"
            )
        generator = self.model(choice.sigma_rel, choice.num_images)
        guide = self._guide(choice, generator)
        sampling = Sampling(
            sampler=choice.sampler,
            num_steps=choice.num_steps,
            guidance=choice.guidance if choice.is_guided else 1.0,
            interval=choice.interval if choice.is_guided and choice.interval != EVERYWHERE else None,
        )
        return save_pretrained(Pretrained(generator, guide=guide, sampling=sampling), self.run / SAVED / name)

    def _given(self, choice: Choice, count: int) -> dict[str, Any]:
        given = {} if self.cases is None else self.cases.given(choice, count)
        return given if choice.label is None else given | {"labels": np.full(count, choice.label, np.int64)}

    def _guide(self, choice: Choice, generator: ImageGenerator) -> ImageGenerator | None:
        if not choice.is_guided:
            return None
        if choice.guide == "earlier":
            return self.model(choice.guide_sigma_rel, choice.guide_images)
        if choice.guide == "without labels":
            if not self.num_classes:
                raise ValueError("this model has no labels to leave out: choose another guide")
            return generator.without_labels()
        if self.other is None:
            raise ValueError("no other model was given: start the studio with --guide")
        return self.other
