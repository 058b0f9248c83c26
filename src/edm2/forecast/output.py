"""A forecast of many cases and members, written in units that survive a kill, then packed into one file."""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import edm2
from edm2.files import claimed, read_json, replacing, write_json
from edm2.forecast.cases import Cases
from edm2.forecast.files import Forecast, check_format, read_forecast, write_forecast
from edm2.forecast.rollout import past_frames, roll_out
from edm2.generate import ImageGenerator, SamplerOptions
from edm2.generate.checks import check_inputs, warn_of_strange
from edm2.generate.members import member_seeds
from edm2.generate.output import check_same, digest
from edm2.progress import Progress
from edm2.train.world import World

_SETTINGS = "settings.json"
_MEMBERS = "members.npy"


def make_forecast(
    generator: ImageGenerator,
    cases: Cases,
    out: Path,
    *,
    steps: int,
    members: int,
    seed: int = 0,
    common: bool = False,
    guide: ImageGenerator | None = None,
    batch_size: int = 64,
    quiet: bool = False,
    world: World | None = None,
    **options: Any,
) -> Forecast:
    """Forecast all cases into one file; the same call continues interrupted work.

    The work is cut into units of `batch_size` roll-outs, always the same, so that the result does not depend on
    interruptions or on the number of processes that share them. Units are in `NAME.parts` until the file is written.

    Args:
        generator: Model of the next frame given the last ones.
        cases: Where to start, and what is known of the truth.
        out: `.npz`, `.nc` or `.zarr`.
        steps: Frames to forecast.
        members: Members of each case.
        seed: Member m of case i depends on (seed, i, m) and its start alone.
        common: Whether a member has the same noise in all cases.
        guide: Model to guide with.
        batch_size: Roll-outs at a time.
        quiet: Whether to show no progress.
        world: The processes that share the work; default: this one alone.
        **options: Fields of `SamplerOptions`.

    Returns:
        The forecast, as `read_forecast` gives it.

    Raises:
        ValueError: If the cases or options do not fit the model, `out` holds another forecast, or another process is
            writing it; nothing is changed then.
    """
    frames, shape = past_frames(generator), generator.denoiser.img_shape
    if cases.start.shape[1:] != (frames, *shape):
        raise ValueError(
            f"starts of shape {list(cases.start.shape)} must be [N, {frames}, {', '.join(map(str, shape))}] for this "
            "model"
        )
    _check_vectors(generator, cases.vectors, steps)
    warn_of_strange(generator, cases.start.reshape(len(cases), -1, *shape[1:]), cases.vectors)

    def make(rows: np.ndarray, members: np.ndarray, on_step: Callable[[], None]) -> np.ndarray:
        some = cases.take(rows)
        assert some.numbers is not None
        return roll_out(
            generator,
            some.start,
            some.numbers,
            members,
            steps=steps,
            seed=seed,
            common=common,
            vectors=some.vectors,
            labels=some.labels,
            guide=guide,
            on_step=on_step,
            **options,
        )

    job = _Job(
        out=out,
        make=make,
        cases=len(cases),
        members=members,
        steps=steps,
        size=batch_size,
        truth=None if cases.truth is None else padded(cases.truth, steps),
        start=cases.start,
    )
    given = {"start": cases.start, "vectors": cases.vectors, "labels": cases.labels}
    noise = {"seed": seed, "noise": "common" if common else "independent", **_told(cases.numbers)}
    return job.run(_settings(job, generator, guide, given, SamplerOptions(**options), noise), world, quiet)


def make_ensemble(
    generator: ImageGenerator,
    conditions: np.ndarray,
    out: Path,
    *,
    members: int,
    truth: np.ndarray | None = None,
    vectors: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    numbers: np.ndarray | None = None,
    seed: int = 0,
    guide: ImageGenerator | None = None,
    batch_size: int = 64,
    quiet: bool = False,
    world: World | None = None,
    **options: Any,
) -> Forecast:
    """Sample several members for each condition into one file; otherwise like `make_forecast`, with one step.

    Args:
        generator: A model that is conditioned on images.
        conditions: `[N, C, h, w]` in the units of the training data.
        out: `.npz`, `.nc` or `.zarr`.
        members: Members of each case.
        truth: `[N, C, H, W]`, NaN where it is missing.
        vectors: `[N, V]`.
        labels: `[N]` classes; default: 0 for models with classes.
        numbers: `[N]` number of each case; default: 0, 1, 2 ...
        seed: Member m of case i depends on (seed, i, m) and what it is given alone.
        guide: Model to guide with.
        batch_size: Images at a time.
        quiet: Whether to show no progress.
        world: The processes that share the work; default: this one alone.
        **options: Fields of `SamplerOptions`.

    Returns:
        The members, with one lead.

    Raises:
        ValueError: As in `make_forecast`.
    """
    count = len(conditions)
    if labels is None and generator.num_classes:
        labels = np.zeros(count, np.int64)
    check_inputs(generator, count, labels, conditions, vectors)
    shape = (count, *generator.denoiser.img_shape)
    if truth is not None and truth.shape != shape:
        raise ValueError(f"truth of shape {list(truth.shape)} must be {list(shape)}, one for each condition")
    warn_of_strange(generator, conditions, vectors)

    def make(rows: np.ndarray, members: np.ndarray, on_step: Callable[[], None]) -> np.ndarray:
        made = generator.images(
            member_seeds(rows if numbers is None else numbers[rows], members, seed=seed),
            None if labels is None else labels[rows],
            conditions=conditions[rows],
            vectors=None if vectors is None else vectors[rows],
            guide=guide,
            batch_size=len(rows),
            **options,
        )
        on_step()
        return made[:, None]

    job = _Job(
        out=out,
        make=make,
        cases=count,
        members=members,
        steps=1,
        size=batch_size,
        truth=None if truth is None else truth[:, None],
        start=None,
    )
    given = {"conditions": conditions, "vectors": vectors, "labels": labels}
    noise = {"seed": seed, **_told(numbers)}
    return job.run(_settings(job, generator, guide, given, SamplerOptions(**options), noise), world, quiet)


def _told(numbers: np.ndarray | None) -> dict[str, str]:
    """Numbers of cases in a forecast's settings, if they are not the usual ones."""
    usual = numbers is None or np.array_equal(numbers, np.arange(len(numbers)))
    return {} if numbers is None or usual else {"cases": digest(numbers.astype(np.int64))}


def _check_vectors(generator: ImageGenerator, given: np.ndarray | None, steps: int) -> None:
    coding = generator.coding.vectors
    wanted = 0 if coding is None else len(coding.mean)
    got = "none were given" if given is None else f"not {list(given.shape)}"
    if (given is not None) != (wanted > 0) or (
        given is not None and (given.ndim != 3 or given.shape[1] < steps or given.shape[2] != wanted)
    ):
        asked = f"[N, {steps}, {wanted}] with the starts" if wanted else "none: this model takes no vectors"
        raise ValueError(f"vectors for each step must be {asked}; {got}")


def _settings(
    job: "_Job",
    generator: ImageGenerator,
    guide: ImageGenerator | None,
    given: Mapping[str, np.ndarray | None],
    sampler: SamplerOptions,
    noise: Mapping[str, Any],
) -> dict[str, Any]:
    arrays = {**given, "truth": job.truth}
    settings = {
        "model": generator.identity(),
        "guide": None if guide is None else guide.identity(),
        **{name: None if array is None else digest(array) for name, array in arrays.items()},
        "steps": job.steps,
        "members": job.members,
        "batch": job.size,
        **noise,
        "sampler": sampler.to_json(),
        "made_with": {"edm2": edm2.__version__, "torch": torch.__version__},
    }
    record: dict[str, Any] = json.loads(json.dumps(settings))
    return record


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Members of cases, made in units by `make(cases, members, on_step)`, `[B, steps, C, H, W]`, one row for each."""

    out: Path
    make: Callable[[np.ndarray, np.ndarray, Callable[[], None]], np.ndarray]
    cases: int
    members: int
    steps: int
    size: int
    truth: np.ndarray | None
    start: np.ndarray | None

    def __post_init__(self) -> None:
        check_format(self.out)
        for name, value in (("steps", self.steps), ("members", self.members), ("batch_size", self.size)):
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")

    @property
    def _parts(self) -> Path:
        return self.out.with_name(f"{self.out.name}.parts")

    @property
    def _rows(self) -> int:
        return self.cases * self.members

    def _units(self) -> list[tuple[Path, np.ndarray]]:
        """Each unit's file, and its rows: member `row % members` of case `row // members`."""
        starts = range(0, self._rows, self.size)
        return [
            (self._parts / f"{number:06d}.npy", np.arange(start, min(start + self.size, self._rows)))
            for number, start in enumerate(starts)
        ]

    def run(self, settings: dict[str, Any], world: World | None, quiet: bool) -> Forecast:
        """Do what is left to do, and return what is written."""
        world = World(rank=0, size=1, device=torch.device("cpu")) if world is None else world
        if self.out.exists():
            self._check_out(settings)  # parts may be left by a kill just after the file
        else:
            with ExitStack() as stack:
                world.on_first(lambda: self._claim(stack, settings))
                self._sample(world, quiet)
                world.any(False)
                world.on_first(lambda: self._pack(settings))
        world.on_first(lambda: shutil.rmtree(self._parts, ignore_errors=True))
        return read_forecast(self.out)

    def _check_out(self, settings: dict[str, Any]) -> None:
        try:
            old = dict(read_forecast(self.out).settings)
        except ValueError as error:
            raise ValueError(
                f"{self.out} exists and is not a forecast of edm2: choose another --out"
            ) from error
        check_same(self.out, old, settings, what="a forecast")

    def _claim(self, stack: ExitStack, settings: dict[str, Any]) -> None:
        stack.enter_context(claimed(self._parts, self.out))
        path = self._parts / _SETTINGS
        if path.exists():
            try:
                old = dict(read_json(path))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} is damaged ({error}): choose another --out") from error
            check_same(self._parts, old, settings, what="parts of a forecast")
        else:
            write_json(path, settings)

    def _sample(self, world: World, quiet: bool) -> None:
        todo = [unit for unit in self._units() if not _is_whole(unit[0])]
        world.any(False)  # all processes have looked before the first file is added
        mine = todo[world.rank :: world.size]
        count = sum(len(rows) for _, rows in mine) * self.steps
        done = self._rows * self.steps - count if world.size == 1 else 0
        quiet = quiet or not world.is_first
        with Progress("forecasting", done + count, "frames", done=done, quiet=quiet) as progress:
            for path, rows in mine:
                on_step = partial(progress.advance, len(rows))
                made = self.make(rows // self.members, rows % self.members, on_step)
                with replacing(path) as file:
                    np.save(file, made, allow_pickle=False)

    def _pack(self, settings: dict[str, Any]) -> None:
        """Write the file from the units; a second copy of the members lies on the disk meanwhile, not in memory."""
        units = self._units()
        first = np.load(units[0][0], mmap_mode="r", allow_pickle=False)
        # Scratch of this process, which holds the folder: written anew after a kill.
        whole = np.lib.format.open_memmap(
            self._parts / _MEMBERS, "w+", first.dtype, (self._rows, *first.shape[1:])
        )
        for file, rows in units:
            whole[rows] = np.load(file, allow_pickle=False)
        members = whole.reshape(self.cases, self.members, *first.shape[1:])
        write_forecast(
            self.out, Forecast(members=members, truth=self.truth, start=self.start, settings=settings)
        )


def _is_whole(path: Path) -> bool:
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return True


def padded(truth: np.ndarray, steps: int) -> np.ndarray:
    """Truth `[N, leads, ...]` cut to a number of leads, or filled up with NaN, which marks what is not known."""
    if truth.shape[1] >= steps:
        return truth[:, :steps]
    missing = np.full((len(truth), steps - truth.shape[1], *truth.shape[2:]), np.nan, np.float32)
    return np.concatenate([truth.astype(np.float32), missing], axis=1)
