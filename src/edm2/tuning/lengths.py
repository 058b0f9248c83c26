"""How a run's score depends on the EMA length: at several moments of its training, and for groups of its layers.

Ref: EDM2 Sec. 3.3, Fig. 5.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from edm2.data import ImageDataset
from edm2.diffusion import SamplerName
from edm2.ema import reconstruct_many
from edm2.ema.reconstruct import reconstruct_each
from edm2.ema.storage.manifest import Time, Width, read_manifest
from edm2.evaluation.judge import FRECHET, OWN_CLASSIFIER, Judge
from edm2.evaluation.noise_errors import errors_by_noise, noise_density
from edm2.files import from_json, read_sealed, write_sealed
from edm2.generate import ImageGenerator, snapshots_of
from edm2.generate.lengths import generators
from edm2.generate.own_guide import gives
from edm2.generate.sampler_options import STUDENT_SAMPLER
from edm2.progress import Progress
from edm2.report.magnitudes import level_of
from edm2.train.build import open_run_data
from edm2.train.settings_file import run_settings
from edm2.tuning.bench import moments
from edm2.tuning.evaluations import Evaluations
from edm2.tuning.plan import SEARCH_SEED, TuningPlan
from edm2.tuning.result import FOLDER, Score, judged

_FILE = "lengths.json"
_TRIAL = 16  # images with which the time is estimated
REST = "embedding, output"


class ModelScore(Protocol):
    """A number about a model, lower being better.

    Attributes:
        metric: What it is, in words.
        features: What it is measured in or on, in words.
        fingerprint: Identifies what is measured.
        work: What one measurement takes, in words.
        count: Number of images.
    """

    @property
    def metric(self) -> str: ...  # noqa: D102 - described above
    @property
    def features(self) -> str: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    @property
    def work(self) -> str: ...  # noqa: D102
    @property
    def count(self) -> int: ...  # noqa: D102

    def measure(self, generator: ImageGenerator, count: int) -> float:
        """Measure a model with that many images."""


class SampleDistance:
    """Frechet distance of samples to a run's training images, in features of a classifier trained on them.

    Args:
        dataset: The training images, with classes.
        count: Number of samples; the same seeds for every model.
        num_steps: Noise levels of the sampler.
        sampler: The sampler.
    """

    metric, features = FRECHET, OWN_CLASSIFIER

    def __init__(self, dataset: ImageDataset, count: int, num_steps: int, sampler: SamplerName) -> None:
        self._judge, self.count = Judge(dataset), count
        self._options: dict[str, Any] = {"num_steps": num_steps, "sampler": sampler}
        self.fingerprint = f"{self._judge.fingerprint}, {count} images, {num_steps} steps of {sampler}"
        self.work = f"{count:,} images in {num_steps} steps of {sampler}"

    def measure(self, generator: ImageGenerator, count: int) -> float:
        """Sample and measure."""
        return self._judge.score(generator, range(SEARCH_SEED, SEARCH_SEED + count), **self._options)


class TrainingLoss:
    """Squared error on training images with fixed noise, weighted as in training: for runs without classes.

    Args:
        run: Folder of the run.
        dataset: Its training images.
        count: Number of images, spread over the data set.
    """

    metric = "weighted squared error"

    def __init__(self, run: Path, dataset: ImageDataset, count: int) -> None:
        self._data, self._loss, self.count = dataset, run_settings(run).loss, min(count, len(dataset))
        self.features = f"{self.count:,} training images with fixed noise"
        self.fingerprint = f"loss of {self.count} images of {dataset.fingerprint}"
        self.work = f"{self.count:,} images at 25 noise levels"

    def measure(self, generator: ImageGenerator, count: int) -> float:
        """Denoise and measure."""
        rows = np.linspace(0, len(self._data) - 1, count).astype(np.int64)
        labels = self._data.labels(rows) if self._data.num_classes else None
        sigma, _, errors = errors_by_noise(
            generator, self._data.images(rows), labels, **self._data.given(rows)
        )
        density = noise_density(sigma, p_mean=self._loss.p_mean, p_std=self._loss.p_std)
        return float((density * np.exp(errors)).sum() / density.sum())


def length_score(run: Path, count: int) -> ModelScore:
    """The score that suits a run: a distance where its images have classes, else the loss.

    Raises:
        ValueError: If the run has neither: a regression, or a student without classes.
    """
    dataset, config = open_run_data(run), run_settings(run)
    is_student = config.consistency is not None
    if config.objective == "mean" or config.residual is not None:
        raise ValueError(f"{run} is a regression or a residual model: its EMA length is not scored")
    if dataset.num_classes > 1 and dataset.dtype == np.uint8 and dataset.conditions is None:
        steps, sampler = (2, STUDENT_SAMPLER) if is_student else (16, "dpmpp-2m")
        return SampleDistance(dataset, count, steps, sampler)  # type: ignore[arg-type]
    if is_student:
        raise ValueError(f"{run} is a student without classes, which has no score for its EMA length")
    return TrainingLoss(run, dataset, count)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How the score depends on the EMA length; each curve is a list of pairs of length and score.

    Attributes:
        metric: What the score is, in words.
        features: What it is measured in or on, in words.
        work: What one score took, in words.
        best: EMA length with the lowest score at the last moment.
        moments: Moments in training images, ascending.
        by_moment: A curve for each.
        groups: Names of groups of layers, such as `encoder 8x8`.
        by_group: A curve for each at the last moment: the score if that group alone has another length than `best`.
    """

    metric: str
    features: str
    work: str
    best: Width
    moments: list[Time]
    by_moment: list[list[list[Score]]]
    groups: list[str]
    by_group: list[list[list[Score]]]

    def __post_init__(self) -> None:
        if [len(self.moments), len(self.groups)] != [len(self.by_moment), len(self.by_group)]:
            raise ValueError("there must be a curve for each moment and each group")
        if any(len(pair) != 2 for curve in (*self.by_moment, *self.by_group) for pair in curve):
            raise ValueError("curves must consist of pairs")

    @property
    def judged(self) -> str:
        """What was measured, in words."""
        return judged(self.metric, self.features)


class LengthStudy:
    """Measures how a run's score depends on the EMA length.

    Args:
        run: Folder of the run. Snapshots that training adds later are not read.
        score: What to measure.
        sigma_rels: EMA lengths.
        most_moments: Moments of the run; each about half of the next.
        device: Where the networks run.

    Attributes:
        num_models: Number of averages to measure.

    Raises:
        ValueError: If there is no snapshot, or they give none of the lengths at the last moment.
    """

    def __init__(
        self,
        run: Path,
        score: ModelScore,
        *,
        sigma_rels: tuple[float, ...] = TuningPlan.sigma_rels,
        most_moments: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        self._run, self._score, self._device = run, score, device
        self._folder = snapshots_of(run)
        self._run_id = read_manifest(self._folder).run.run_id
        stored = moments(run)
        wanted = [stored[-1] / 2**k for k in range(most_moments)]
        near = {min(stored, key=lambda t: abs(math.log(t / w))) for w in wanted}
        self._given = {t: [s for s in sigma_rels if gives(self._folder, s, t)] for t in sorted(near)}
        self._given = {t: lengths for t, lengths in self._given.items() if lengths}
        self._last = stored[-1]
        if self._last not in self._given:
            reconstruct_many(self._folder, sigma_rels, self._last, read=False)  # says why
        model = next(generators(self._folder, self._given[self._last][:1], self._last, device=device))
        self._groups = layer_groups(model)
        self._trial = model
        others = len(self._given[self._last]) - 1
        self.num_models = sum(map(len, self._given.values())) + len(self._groups) * others

    def seconds(self) -> float:
        """Estimate the time of the whole, by measuring one model with a few images."""
        count = min(_TRIAL, self._score.count)
        start = time.monotonic()
        self._score.measure(self._trial, count)
        return (time.monotonic() - start) / count * self._score.count * self.num_models

    def measure(self, *, quiet: bool = False) -> Lengths:
        """Measure, and store the result in the run's folder.

        Scores that an earlier call measured are not measured again.

        Raises:
            FloatingPointError: If the images are not finite.
        """
        evaluations = Evaluations(self._run)
        with Progress("EMA lengths", self.num_models, "averages", quiet=quiet) as progress:

            def score(generator: ImageGenerator, t: float, length: float, *others: Any) -> list[float]:
                facts = [self._run_id, t, self._score.fingerprint, length, *others]
                found = evaluations.score(
                    facts,
                    lambda: self._score.measure(generator, self._score.count),
                    num_images=t,
                    knobs=" ".join([f"EMA {length:g}", *map(str, others)]),
                )
                progress.advance(1)
                return [length, found]

            curves = []
            for t, lengths in self._given.items():
                models = generators(self._folder, lengths, t, device=self._device)
                curves.append([score(model, t, s) for s, model in zip(lengths, models, strict=True)])
            best = min(curves[-1], key=lambda pair: pair[1])
            groups: dict[str, list[list[float]]] = {name: [best] for name in self._groups}
            for name, length, model in self._mixed(best[0]):
                groups[name].append(score(model, self._last, length, "in", name, "else", best[0]))
        found = Lengths(
            metric=self._score.metric,
            features=self._score.features,
            work=self._score.work,
            best=best[0],
            moments=list(self._given),
            by_moment=curves,
            groups=list(groups),
            by_group=[sorted(pairs) for pairs in groups.values()],
        )
        (self._run / FOLDER).mkdir(exist_ok=True)
        write_sealed(self._run / FOLDER / _FILE, vars(found))
        return found

    def _mixed(self, best: float) -> Iterator[tuple[str, float, ImageGenerator]]:
        """The best average, with one group of layers at a time from another one."""
        model = next(generators(self._folder, [best], self._last, device=self._device))
        state = {name: tensor.clone() for name, tensor in model.denoiser.state_dict().items()}
        lengths = [s for s in self._given[self._last] if s != best]
        made = reconstruct_each(self._folder, lengths, self._last, warn_above=math.inf)
        for length, result in zip(lengths, made, strict=True):
            for name, tensors in self._groups.items():
                model.denoiser.load_state_dict(state | {n: result.tensors[n] for n in tensors})
                yield name, length, model


def layer_groups(model: ImageGenerator) -> dict[str, list[str]]:
    """Parameters by level of encoder and decoder, and the rest; empty for networks without such levels."""
    groups: dict[str, list[str]] = {}
    for name, _ in model.denoiser.named_parameters():
        groups.setdefault(level_of(name) or REST, []).append(name)
    return groups if len(groups) > 1 else {}


def read_lengths(run: Path) -> Lengths | None:
    """Read what `LengthStudy.measure` stored for a run; None if there is nothing.

    Raises:
        ValueError: If the file is damaged.
    """
    path = run / FOLDER / _FILE
    if not path.exists():
        return None
    try:
        return from_json(Lengths, read_sealed(path))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): run `edm2 report --lengths` again") from error
