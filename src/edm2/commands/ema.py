"""`edm2 ema`: averages of the weights, after training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from edm2.commands.ema_plan import check_picture, numbers, plan
from edm2.ema import Target, reconstruct_many
from edm2.ema.checkpoints import merge_checkpoints
from edm2.ema.maths.plans import spread
from edm2.ema.storage.manifest import MANIFEST, ForeignSnapshots, Manifest, read_manifest
from edm2.ema.storage.snapshots import damaged
from edm2.files import write_atomic
from edm2.generate.reconstructed import reconstruct_models, snapshots_of
from edm2.interop.ema_folders import is_ema_folder, open_ema_folder
from edm2.interop.licence import LICENCE, NOTICE_FILE, NOTICE_LINE, write_notice
from edm2.interop.nvlabs import open_snapshots
from edm2.progress import show
from edm2.report.ema_figures import reconstruction_figure
from edm2.report.style import figure_png
from edm2.train.memory import size_text

__all__ = ["list", "merge", "plan", "profile", "reconstruct", "verify"]


@dataclass(kw_only=True)
class _Source:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, of its snapshots, of official ones (network-snapshot-*.pkl), or of another library's averages
    (ema-pytorch, nitrous-ema, pytorch-posthoc-ema)."""
    prefix: str | None = None
    """Training run to choose, if a folder of official snapshots holds several."""
    given_sigma_rels: str | None = None
    """For another library's folder: the sigma_rels of its PostHocEMA, in the same order: 0.05,0.28."""
    update_every: int | None = None
    """For another library's folder: the update_every of its PostHocEMA."""


@dataclass(kw_only=True)
class _List(_Source):
    """Show what a snapshot folder holds: times, tracks, stored type, sizes."""


@dataclass(kw_only=True)
class _Verify:
    """Read every file and compare it with the sha256 stored when it was written. Exit code 1 if one is damaged."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or of snapshots."""


@dataclass(kw_only=True)
class _Reconstruct(_Source):
    """Write models with any EMA length from the snapshots of one run.

    Interrupted, the same command continues: files that it wrote already are kept.
    """

    sigma_rel: str
    """EMA lengths relative to the training time, separated by commas: 0.05,0.10 or 0.010,0.015,...,0.250."""
    out: Path
    """Folder for the models, which are named after their EMA lengths."""
    t: Annotated[float | None, tyro.conf.arg(aliases=["--images"])] = None
    """Time at which the averages end, in the run's clock. Default: the time of the last snapshot."""
    tracks: str | None = None
    """Use only the snapshots with these EMA lengths: 0.05,0.10. Default: all."""
    skip_existing: bool = False
    """Keep existing files whatever they were made from, instead of stopping at files of other averages."""


@dataclass(kw_only=True)
class _Profile(_Source):
    """Draw the wanted profiles and those that the snapshots give, and summarise the coefficients."""

    sigma_rel: str | None = None
    """EMA lengths, separated by commas. Default: four from the shortest tracked length to the longest."""
    out: Path
    """PNG file."""
    t: float | None = None
    """Time at which the averages end, in the run's clock. Default: the time of the last snapshot."""


@dataclass(kw_only=True)
class _Merge:
    """Average plain checkpoints of a training that tracked no EMA, into a checkpoint of the same form.

    Reads safetensors, Hugging Face's shards, torch files, and folders of torch.distributed.checkpoint. Memory holds one
    tensor at a time. Run the same command again after an interruption; once it is done, it changes nothing.
    """

    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folder of checkpoints whose names contain their steps, or the checkpoints themselves."""
    target: tuple[str, ...]
    """Averages: an EMA length, 0.1, or a profile and its window in steps: minus_sqrt:10000, uniform:5000, linear:5000,
    exponential:1000 (half-life)."""
    out: Path
    """Folder for the merged model. With several targets, each gets a folder inside it."""
    t: float | None = None
    """Step at which the averages end. Default: that of the last checkpoint."""
    start: float = 0
    """Step at which training began."""
    key: str | None = None
    """Key under which the weights are stored in files that hold more, such as model. Default: found automatically."""


def list(prog: str, words: Sequence[str]) -> None:
    """`edm2 ema list`."""
    chosen = tyro.cli(_List, prog=prog, args=[*words])
    manifest = read_manifest(_open(chosen))
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
    lengths, source = numbers("--sigma-rel", chosen.sigma_rel), _open(chosen)
    info = (read_manifest(source).run.metadata or {}).get("info")
    tracks = None if chosen.tracks is None else numbers("--tracks", chosen.tracks)
    for path, error in reconstruct_models(
        source, lengths, chosen.out, t=chosen.t, tracks=tracks, skip_existing=chosen.skip_existing
    ):
        show(f"{path}  expected relative error {error:.1e}")
    if isinstance(info, dict) and info.get("license") == LICENCE:
        write_notice(chosen.out)
        show(f"{NOTICE_LINE}; see {chosen.out / NOTICE_FILE}")


def merge(prog: str, words: Sequence[str]) -> None:
    """`edm2 ema merge`."""
    chosen = tyro.cli(_Merge, prog=prog, args=[*words])
    targets = [_target(text) for text in chosen.target]
    many = len(targets) > 1
    outs = [chosen.out / text.replace(":", "-") if many else chosen.out for text in chosen.target]
    source = chosen.checkpoints[0] if len(chosen.checkpoints) == 1 else chosen.checkpoints
    for path, error in merge_checkpoints(source, targets, outs, chosen.t, start=chosen.start, key=chosen.key):
        show(f"{path}  expected relative error {error:.1e}")


def _target(text: str) -> Target:
    kind, _, window = text.partition(":")
    kinds: dict[str, Callable[[float], Target]] = {
        "": Target.power,
        "minus_sqrt": Target.minus_sqrt,
        "uniform": Target.uniform,
        "linear": Target.linear,
        "exponential": Target.exponential,
    }
    try:
        value, make = float(window or kind), kinds[kind if window else ""]
    except (KeyError, ValueError):
        raise ValueError(
            f"--target {text!r} is not understood: write a length, 0.1, or a profile with its window in steps,"
            " minus_sqrt:10000, uniform:5000, linear:5000 or exponential:1000"
        ) from None
    return make(value)


def profile(prog: str, words: Sequence[str]) -> None:
    """`edm2 ema profile`."""
    chosen = tyro.cli(_Profile, prog=prog, args=[*words])
    check_picture(chosen.out)
    source = _open(chosen)
    manifest = read_manifest(source)
    tracks = {s.sigma_rel for s in manifest.snapshots}
    if chosen.sigma_rel is not None or not tracks:
        lengths = numbers("--sigma-rel", chosen.sigma_rel or "0.1")
    else:
        lengths = sorted({float(f"{x:.4f}") for x in spread((min(tracks), max(tracks)), 4)})
    last = max((s.t for s in manifest.snapshots), default=None)
    # A trainer may write meanwhile: the picture shows the snapshots that were there when it began.
    results = reconstruct_many(source, lengths, last if chosen.t is None else chosen.t, read=False)
    show(f"{'wanted':<16} {'files':>5}  {'largest coefficient':>19}  amplification  expected relative error")
    for result in results:
        largest = max(result.coefficients.values(), key=abs)
        show(
            f"{result.label:<16} {len(result.coefficients):>5}  {largest:>19.3g}  {result.amplification:>13.2f}"
            f"  {result.expected_error:.1e}"
        )
    show(write_atomic(chosen.out, figure_png(reconstruction_figure(manifest, results))))


def _open(source: _Source) -> Path | ForeignSnapshots:
    """Our snapshots, official ones, or another library's; nothing in their files is executed."""
    folder = snapshots_of(source.run)
    if not (folder / MANIFEST).exists():
        if is_ema_folder(folder):
            given = source.given_sigma_rels
            return open_ema_folder(
                folder,
                sigma_rels=None if given is None else numbers("--given-sigma-rels", given),
                update_every=source.update_every,
            )
        if next(folder.glob("*.pkl"), None) is not None:
            return open_snapshots(folder, prefix=source.prefix)
    for option, value in (
        ("--prefix", source.prefix),
        ("--given-sigma-rels", source.given_sigma_rels),
        ("--update-every", source.update_every),
    ):
        if value is not None:
            raise ValueError(
                f"{option} {value} is for folders of other libraries, and {folder} is not one: leave it out"
            )
    return folder


def _headline(folder: Path, manifest: Manifest) -> str:
    run, entries = manifest.run, manifest.snapshots
    tracks = sorted({s.sigma_rel for s in entries})
    return (
        f"{folder}: run {run.run_id}, time in {run.clock} from {run.start:g};"
        f" {len(entries)} files, {size_text(sum(s.num_bytes for s in entries))}:"
        f" {len({s.t for s in entries})} times, tracks {', '.join(f'{s:g}' for s in tracks)}"
    )
