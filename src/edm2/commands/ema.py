"""`edm2 ema`: averages of the weights, after training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from edm2.ema import PLANS, Plan, Reconstruction, reconstruct_many
from edm2.ema import plan as find_plan
from edm2.ema.maths.plans import MOVEMENT, WINDOWS_PER_RUN, named_plan, spread
from edm2.ema.maths.profiles import FloatArray
from edm2.ema.storage.manifest import MANIFEST, ForeignSnapshots, Manifest, read_manifest
from edm2.ema.storage.tensorfile import save_tensors
from edm2.ema.storage.verify import damaged
from edm2.files import write_atomic
from edm2.generate import reconstruct_models
from edm2.generate.reconstructed import ema_file_name, snapshots_of
from edm2.interop.licence import LICENCE, NOTICE_FILE, NOTICE_LINE, write_notice
from edm2.interop.nvlabs import open_snapshots
from edm2.progress import show
from edm2.report.ema_figures import plan_figure, reconstruction_figure
from edm2.report.style import figure_png
from edm2.train.memory import size_text

_RUN = Annotated[Path, tyro.conf.Positional]
Numbers = list[float]  # a name, because a command below is called list

# The official folders hold the paper's pair every 32 Mi images of up to 2 Gi.
_RELEASED = Plan(
    name="released (every 32 Mi)", sigma_rels=(0.05, 0.1), times=tuple((i + 1) / 64 for i in range(64))
)


@dataclass(kw_only=True)
class _List:
    """Show what a folder of snapshots holds: times, tracks, stored type, sizes."""

    run: _RUN
    """Folder of a run, of its snapshots, or of official ones, network-snapshot-*.pkl."""
    prefix: str | None = None
    """Which training, for a folder of official snapshots of several."""


@dataclass(kw_only=True)
class _Verify:
    """Read every file and compare it with the sha256 noted when it was written. Exit code 1 if one is damaged."""

    run: _RUN
    """Folder of a run, or of snapshots."""


@dataclass(kw_only=True)
class _Reconstruct:
    """Write models with any EMA length from the snapshots of one run."""

    run: _RUN
    """Folder of the run, of its snapshots, or of official ones, network-snapshot-*.pkl."""
    sigma_rel: str
    """EMA lengths relative to the training time, separated by commas: 0.05,0.10. All come from one pass."""
    out: Path
    """Folder for the models, named after their lengths."""
    t: Annotated[float | None, tyro.conf.arg(aliases=["--images"])] = None
    """Time, in the run's clock, at which the averages are wanted; default: the last snapshot's."""
    prefix: str | None = None
    """Which training, for a folder of official snapshots of several."""


@dataclass(kw_only=True)
class _Profile:
    """Draw the wanted profiles and what the snapshots make of them; print the coefficients in short."""

    run: _RUN
    """Folder of the run, of its snapshots, or of official ones, network-snapshot-*.pkl."""
    sigma_rel: str | None = None
    """EMA lengths, separated by commas; default: four from the shortest track to the longest."""
    out: Path
    """PNG file."""
    t: float | None = None
    """Time, in the run's clock; default: the last snapshot's."""
    prefix: str | None = None
    """Which training, for a folder of official snapshots of several."""


@dataclass(kw_only=True)
class _Plan:
    """Choose which averages to track and when to store them, so that any length in a range can be had later."""

    sigma_range: str = "0.03,0.25"
    """Shortest and longest EMA length wanted, relative to the training time."""
    name: str | None = None
    """Show a named plan instead: paper, compact, lean, small; with --dtype, --sigma-range and --params alone."""
    tracks: int | None = None
    """Averages to track; default: the best number within the budgets."""
    times: int | None = None
    """Times at which they are stored; 1 is the end of training alone."""
    params: str = "100M"
    """Parameters of the model: 100M, 1.5G."""
    memory: str | None = None
    """Room for the running averages: 2GB."""
    storage: str | None = None
    """Room for the snapshots: 10GB."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """How snapshots are stored."""
    mid_run: bool = False
    """Every length is also wanted at each stored time, not only at the end; the error is the worst of all."""
    out: Path | None = None
    """PNG file: the error at each length, beside that of the paper's and the released models' snapshots."""


def list(prog: str, words: Sequence[str]) -> None:
    """`edm2 ema list`."""
    chosen = tyro.cli(_List, prog=prog, args=[*words])
    manifest = read_manifest(_open(chosen.run, chosen.prefix))
    show(_headline(snapshots_of(chosen.run), manifest))
    if manifest.snapshots:
        show(f"{'time':>16}  {'sigma_rel':>9}  {'type':<4}  {'size':>9}  to weights  file")
    for s in manifest.snapshots:
        distance = "unknown" if math.isnan(s.distance) else f"{s.distance:.1%}"
        show(
            f"{s.t:>16,.10g}  {s.sigma_rel:>9g}  {s.dtype:<4}  {size_text(s.num_bytes):>9}  {distance:>10}  {s.file}"
        )


def verify(prog: str, words: Sequence[str]) -> None:
    """`edm2 ema verify`."""
    folder = snapshots_of(tyro.cli(_Verify, prog=prog, args=[*words]).run)
    manifest = read_manifest(folder)
    wrong = [*damaged(folder, manifest)]
    if wrong:
        raise OSError(f"{len(wrong)} of {len(manifest.snapshots)} files:\n  " + "\n  ".join(wrong))
    show(f"{_headline(folder, manifest)}\nall files are as they were written")


def reconstruct(prog: str, words: Sequence[str]) -> None:
    """`edm2 ema reconstruct`."""
    chosen = tyro.cli(_Reconstruct, prog=prog, args=[*words])
    lengths, source = _numbers("--sigma-rel", chosen.sigma_rel), _open(chosen.run, chosen.prefix)
    metadata = read_manifest(source).run.metadata or {}
    if "network" in metadata:
        written = reconstruct_models(source, lengths, chosen.out, t=chosen.t)
    else:
        paths = [chosen.out / ema_file_name(length) for length in lengths]
        for path in paths:
            if path.exists():
                raise FileExistsError(f"{path} exists already: choose another --out or move it away")
        results = reconstruct_many(source, lengths, chosen.t)
        written = [(_save(p, r), r.expected_error) for p, r in zip(paths, results, strict=True)]
    for path, error in written:
        show(f"{path}  expected relative error {error:.1e}")
    if metadata.get("info", {}).get("license") == LICENCE:
        write_notice(chosen.out)
        show(f"{NOTICE_LINE}; see {chosen.out / NOTICE_FILE}")


def profile(prog: str, words: Sequence[str]) -> None:
    """`edm2 ema profile`."""
    chosen = tyro.cli(_Profile, prog=prog, args=[*words])
    _check_picture(chosen.out)
    source = _open(chosen.run, chosen.prefix)
    manifest = read_manifest(source)
    tracks = {s.sigma_rel for s in manifest.snapshots}
    if chosen.sigma_rel is not None or not tracks:
        lengths = _numbers("--sigma-rel", chosen.sigma_rel or "0.1")
    else:
        lengths = sorted({float(f"{x:.4f}") for x in spread((min(tracks), max(tracks)), 4)})
    results = reconstruct_many(source, lengths, chosen.t, read=False)
    show(f"{'wanted':<16} {'files':>5}  {'largest coefficient':>19}  amplification  expected relative error")
    for result in results:
        largest = max(result.coefficients.values(), key=abs)
        show(
            f"{result.label:<16} {len(result.coefficients):>5}  {largest:>19.3g}  {result.amplification:>13.2f}"
            f"  {result.expected_error:.1e}"
        )
    show(write_atomic(chosen.out, figure_png(reconstruction_figure(manifest, results))))


def plan(prog: str, words: Sequence[str]) -> None:
    """`edm2 ema plan`."""
    chosen = tyro.cli(_Plan, prog=prog, args=[*words])
    _check_picture(chosen.out)
    num_params = round(_amount("--params", chosen.params))
    ends = _numbers("--sigma-range", chosen.sigma_range)
    if len(ends) != 2:
        raise ValueError(
            f"--sigma-range {chosen.sigma_range!r}: write the shortest and the longest, 0.03,0.25"
        )
    room = {
        f"{name}_bytes": None if text is None else round(_amount(f"--{name}", text))
        for name, text in (("memory", chosen.memory), ("storage", chosen.storage))
    }
    if chosen.name is not None:
        if chosen.tracks or chosen.times or chosen.mid_run or any(room.values()):
            raise ValueError(
                f"--name {chosen.name} has its tracks and times: leave out --tracks, --times, --memory, --storage and"
                " --mid-run, or --name"
            )
        found = replace(named_plan(chosen.name), dtype=chosen.dtype)
    else:
        found = _in_words_of_options(
            lambda: find_plan(
                (ends[0], ends[1]), tracks=chosen.tracks, times=chosen.times, num_params=num_params,
                dtype=chosen.dtype, mid_run=chosen.mid_run, **room,
            )
        )  # fmt: skip
    others = [PLANS["paper"], _RELEASED]
    widths = spread((ends[0], ends[1]), 121)
    show(_plan_text(found, num_params, widths, mid_run=chosen.mid_run))
    show(
        "beside it       "
        + "\n                ".join(
            _comparison(x, num_params, widths) for x in others if x.name != found.name
        )
    )
    if chosen.out is not None:
        fine = spread((ends[0], ends[1]), 601)
        shown = [found, *(other for other in others if other.name != found.name)]
        curves = [(f"{p.name}, {p.num_files} files", p.errors(fine)) for p in shown]
        show(write_atomic(chosen.out, figure_png(plan_figure(fine, curves))))


def _open(run: Path, prefix: str | None) -> Path | ForeignSnapshots:
    """Snapshots of ours, or official ones, of which nothing is run."""
    folder = snapshots_of(run)
    if not (folder / MANIFEST).exists() and next(folder.glob("*.pkl"), None) is not None:
        return open_snapshots(folder, prefix=prefix)
    if prefix is not None:
        raise ValueError(
            f"--prefix {prefix} chooses among official snapshots, and {folder} holds none: leave it out"
        )
    return folder


def _check_picture(out: Path | None) -> None:
    if out is not None and out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: pictures are PNG files, give a name that ends in .png")


def _in_words_of_options(find: Callable[[], Plan]) -> Plan:
    """Call the planner, and put its complaints in terms of what was typed."""
    try:
        return find()
    except ValueError as error:
        text = str(error)
        for name, option in (
            ("memory_bytes", "--memory"), ("storage_bytes", "--storage"), ("sigma_range", "--sigma-range"),
        ):  # fmt: skip
            text = text.replace(name, option)
        raise ValueError(text) from None


def _plan_text(found: Plan, num_params: int, widths: FloatArray, *, mid_run: bool) -> str:
    error = max(float(found.errors(widths, at=t).max()) for t in (found.times if mid_run else (1.0,)))
    times = "the end alone" if len(found.times) == 1 else ", ".join(f"{t:.3g}" for t in found.times)
    tracks = ", ".join(f"{s:g}" for s in found.sigma_rels)
    return "\n".join(
        [
            f"track           {tracks}",
            f"store at        {times if len(found.times) <= 16 else f'{len(found.times)} equal steps'}"
            f"{'' if len(found.times) == 1 else ' of the run'}, as {found.dtype}: {found.num_files} files",
            f"worst error     {error:.2g} of the profile, for lengths {widths[0]:g} to {widths[-1]:g};"
            f" about {error * MOVEMENT:.1g} of the parameters",
            f"memory          {size_text(found.memory_bytes(num_params))} for the running averages of {num_params:,}"
            f" parameters; {size_text(found.memory_bytes(num_params, updates=WINDOWS_PER_RUN + 1))} in runs of more"
            f" than {WINDOWS_PER_RUN:,} updates",
            f"storage         {size_text(found.storage_bytes(num_params))}",
            f"in Python       PowerEMA(model, {_argument(found, tracks)})",
            f"in edm2 train   --ema.sigma-rels {tracks.replace(',', '')}",
        ]
    )


def _argument(found: Plan, tracks: str) -> str:
    known = PLANS.get(found.name)
    same = known is not None and known.sigma_rels == found.sigma_rels
    return f'plan="{found.name}"' if same else f"sigma_rels=[{tracks}]"


def _comparison(other: Plan, num_params: int, widths: FloatArray) -> str:
    return (
        f"{other.name}: {other.num_files} files, {size_text(other.storage_bytes(num_params))},"
        f" worst error {float(other.errors(widths).max()):.2g}"
    )


def _save(path: Path, result: Reconstruction) -> Path:
    facts = ("label", "t", "clock", "run_id", "expected_error")
    return save_tensors(path, result.tensors, {name: str(getattr(result, name)) for name in facts})


def _headline(folder: Path, manifest: Manifest) -> str:
    run, entries = manifest.run, manifest.snapshots
    tracks = sorted({s.sigma_rel for s in entries})
    return (
        f"{folder}: run {run.run_id}, time in {run.clock} from {run.start:g};"
        f" {len(entries)} files, {size_text(sum(s.num_bytes for s in entries))}:"
        f" {len({s.t for s in entries})} times, tracks {', '.join(f'{s:g}' for s in tracks)}"
    )


def _numbers(option: str, text: str) -> Numbers:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}: write lengths separated by commas, 0.05,0.10") from None


def _amount(option: str, text: str) -> float:
    """A number with k, M, G or T after it, and perhaps a B."""
    number = text.removesuffix("B")
    factor = 1000 ** (1 + "kMGT".index(number[-1])) if number and number[-1] in "kMGT" else 1
    try:
        value = float(number[: len(number) - (factor > 1)]) * factor
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e18:
        raise ValueError(f"{option} {text!r} is not understood: write a number such as 500k, 100M, 2.5G, 1T")
    return value
