"""A forecast of many cases and members, written in units that survive a kill, then packed into one file."""

import json
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import edm2
from edm2.files import claimed, read_json, replacing, write_json
from edm2.forecast.cases import Cases
from edm2.forecast.files import Forecast, check_format, read_forecast, write_forecast
from edm2.forecast.rollout import past_frames, roll_out
from edm2.generate import ImageGenerator, SamplerOptions
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
    interruptions or on the number of processes that share them. Units lie in `NAME.parts` until the file is written.

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
    check_format(out)
    for name, value in (("steps", steps), ("members", members), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    world = World(rank=0, size=1, device=torch.device("cpu")) if world is None else world
    sampler = SamplerOptions(**options)
    _check(generator, cases, steps)
    settings = {
        "model": generator.identity(),
        "guide": None if guide is None else guide.identity(),
        "start": digest(cases.start),
        "truth": None if cases.truth is None else digest(cases.truth),
        "vectors": None if cases.vectors is None else digest(cases.vectors),
        "steps": steps,
        "members": members,
        "seed": seed,
        "noise": "common" if common else "independent",
        "batch": batch_size,
        "sampler": sampler.to_json(),
        "made_with": {"edm2": edm2.__version__, "torch": torch.__version__},
    }
    settings = json.loads(json.dumps(settings))
    parts = out.with_name(f"{out.name}.parts")
    if out.exists():
        _check_out(out, settings)
        world.on_first(lambda: shutil.rmtree(parts, ignore_errors=True))  # left by a kill just after the file
        return read_forecast(out)
    work = _Work(generator, cases, parts, steps, members, batch_size)
    with ExitStack() as stack:
        world.on_first(lambda: _claim(stack, parts, out, settings))
        _sample(work, world, quiet, seed=seed, common=common, guide=guide, **options)
        world.any(False)
        world.on_first(lambda: _pack(work, out, settings))
    world.on_first(lambda: shutil.rmtree(parts, ignore_errors=True))
    return read_forecast(out)


class _Work(NamedTuple):
    generator: ImageGenerator
    cases: Cases
    parts: Path
    steps: int
    members: int
    size: int

    @property
    def rows(self) -> int:
        return len(self.cases) * self.members

    def units(self) -> list[tuple[Path, np.ndarray]]:
        """Each unit's file, and its rows: member `row % members` of case `row // members`."""
        starts = range(0, self.rows, self.size)
        return [
            (self.parts / f"{number:06d}.npy", np.arange(start, min(start + self.size, self.rows)))
            for number, start in enumerate(starts)
        ]


def _check(generator: ImageGenerator, cases: Cases, steps: int) -> None:
    frames, shape = past_frames(generator), generator.denoiser.img_shape
    if cases.start.shape[1:] != (frames, *shape):
        raise ValueError(
            f"starts of shape {list(cases.start.shape)} must be [N, {frames}, {', '.join(map(str, shape))}] for this "
            "model"
        )
    coding, given = getattr(generator.coding, "vectors", None), cases.vectors
    wanted = 0 if coding is None else len(coding.mean)
    got = "none were given" if given is None else f"not {list(given.shape)}"
    if (given is not None) != (wanted > 0) or (
        given is not None and (given.ndim != 3 or given.shape[1] < steps or given.shape[2] != wanted)
    ):
        asked = f"[N, {steps}, {wanted}] with the starts" if wanted else "none: this model takes no vectors"
        raise ValueError(f"vectors for each step must be {asked}; {got}")


def _claim(stack: ExitStack, parts: Path, out: Path, settings: dict[str, Any]) -> None:
    stack.enter_context(claimed(parts, out))
    path = parts / _SETTINGS
    if path.exists():
        check_same(parts, read_json(path), settings, what="parts of a forecast")
    else:
        write_json(path, settings)


def _check_out(out: Path, settings: dict[str, Any]) -> None:
    try:
        old = dict(read_forecast(out).settings)
    except ValueError as error:
        raise ValueError(f"{out} exists and is not a forecast of edm2: choose another --out") from error
    check_same(out, old, settings, what="a forecast")


def _sample(work: _Work, world: World, quiet: bool, **options: Any) -> None:
    units = work.units()
    todo = [unit for unit in units if not _is_whole(unit[0])]
    world.any(False)  # all processes have looked before the first file is added
    mine = todo[world.rank :: world.size]
    count = sum(len(rows) for _, rows in mine) * work.steps
    done = (work.rows * work.steps - count) if world.size == 1 else 0
    with Progress(
        "forecasting", done + count, "frames", done=done, quiet=quiet or not world.is_first
    ) as progress:
        for path, rows in mine:
            cases, members = rows // work.members, rows % work.members
            some = work.cases.take(cases)
            made = roll_out(
                work.generator,
                some.start,
                cases,
                members,
                steps=work.steps,
                vectors=some.vectors,
                labels=some.labels,
                on_step=partial(progress.advance, len(rows)),
                **options,
            )
            with replacing(path) as file:
                np.save(file, made, allow_pickle=False)


def _is_whole(path: Path) -> bool:
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return True


def _pack(work: _Work, out: Path, settings: dict[str, Any]) -> None:
    """Write the file from the units; a second copy of the members lies on the disk meanwhile, not in memory."""
    units = work.units()
    first = np.load(units[0][0], mmap_mode="r", allow_pickle=False)
    path = work.parts / _MEMBERS
    # Scratch of this process, which holds the folder: written anew after a kill.
    whole = np.lib.format.open_memmap(path, "w+", first.dtype, (work.rows, *first.shape[1:]))
    for file, rows in units:
        whole[rows] = np.load(file, allow_pickle=False)
    count, cases = len(work.cases), work.cases
    made = Forecast(
        members=whole.reshape(count, work.members, *first.shape[1:]),
        truth=None if cases.truth is None else padded(cases.truth, work.steps),
        start=cases.start,
        settings=settings,
    )
    write_forecast(out, made)


def padded(truth: np.ndarray, steps: int) -> np.ndarray:
    """Truth `[N, leads, ...]` cut to a number of leads, or filled up with NaN, which marks what is not known."""
    if truth.shape[1] >= steps:
        return truth[:, :steps]
    missing = np.full((len(truth), steps - truth.shape[1], *truth.shape[2:]), np.nan, np.float32)
    return np.concatenate([truth.astype(np.float32), missing], axis=1)
