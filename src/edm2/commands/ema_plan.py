"""`edm2 ema plan`: which averages to track and when to store them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from edm2.ema import PLANS, Plan
from edm2.ema import plan as find_plan
from edm2.ema.maths.plans import MOVEMENT, WINDOWS_PER_RUN, named_plan, spread
from edm2.ema.maths.profiles import FloatArray
from edm2.files import write_atomic
from edm2.progress import show
from edm2.report.ema_figures import plan_figure
from edm2.report.style import figure_png
from edm2.train.memory import size_text

# The official folders hold the paper's pair every 32 Mi images of up to 2 Gi.
_RELEASED = Plan(
    name="released (every 32 Mi)", sigma_rels=(0.05, 0.1), times=tuple((i + 1) / 64 for i in range(64))
)


@dataclass(kw_only=True)
class _Plan:
    """Choose which averages to track and when to store them, so that any length in a range is available later."""

    sigma_range: str = "0.03,0.25"
    """Shortest and longest EMA length that you want, relative to the training time."""
    name: str | None = None
    """Show a named plan (paper, compact, lean, small). Combines only with --dtype, --sigma-range and --params."""
    tracks: int | None = None
    """Number of averages to track. Default: the best number within the budgets."""
    times: int | None = None
    """Number of times at which they are stored. 1: only at the end of training."""
    params: str = "100M"
    """Number of parameters of the model, such as 100M or 1.5G."""
    memory: str | None = None
    """Memory for the running averages, such as 2GB."""
    storage: str | None = None
    """Disk space for the snapshots, such as 10GB."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of stored snapshots."""
    mid_run: bool = False
    """Make every length available at each stored time, not only at the end. The error is the worst of all times."""
    out: Path | None = None
    """PNG file for a plot of the error at each length, compared with the paper's and the released models' snapshots."""


def plan(prog: str, words: Sequence[str]) -> None:
    """`edm2 ema plan`."""
    chosen = tyro.cli(_Plan, prog=prog, args=[*words])
    check_picture(chosen.out)
    num_params = round(_amount("--params", chosen.params))
    ends = numbers("--sigma-range", chosen.sigma_range)
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
                f"--name {chosen.name} fixes tracks and times: leave out --tracks, --times, --memory, --storage and"
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
        "compared with   "
        + "\n                ".join(
            _comparison(x, num_params, widths) for x in others if x.name != found.name
        )
    )
    if chosen.out is not None:
        fine = spread((ends[0], ends[1]), 601)
        shown = [found, *(other for other in others if other.name != found.name)]
        curves = [(f"{p.name}, {p.num_files} files", p.errors(fine)) for p in shown]
        show(write_atomic(chosen.out, figure_png(plan_figure(fine, curves))))


def check_picture(out: Path | None) -> None:
    """Refuse names of pictures that are not PNG files."""
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
            f" parameters{_in_long_runs(found, num_params)}",
            f"storage         {size_text(found.storage_bytes(num_params))}",
            f"in Python       PowerEMA(model, {_argument(found, tracks)})",
            f"in edm2 train   --ema.sigma-rels {tracks.replace(',', '')}",
        ]
    )


def _in_long_runs(found: Plan, num_params: int) -> str:
    later = found.memory_bytes(num_params, updates=WINDOWS_PER_RUN + 1)
    if later == found.memory_bytes(num_params):
        return ""
    return f"; {size_text(later)} in runs of more than {WINDOWS_PER_RUN:,} updates"


def _argument(found: Plan, tracks: str) -> str:
    known = PLANS.get(found.name)
    same = known is not None and known.sigma_rels == found.sigma_rels
    return f'plan="{found.name}"' if same else f"sigma_rels=[{tracks}]"


def _comparison(other: Plan, num_params: int, widths: FloatArray) -> str:
    return (
        f"{other.name}: {other.num_files} files, {size_text(other.storage_bytes(num_params))},"
        f" worst error {float(other.errors(widths).max()):.2g}"
    )


def numbers(option: str, text: str) -> list[float]:
    """Numbers separated by commas; `0.010,0.015,...,0.250` counts on in equal steps."""
    parts = [part.strip() for part in text.split(",")]
    try:
        if len(parts) < 4 or parts[-2] != "...":
            return [float(part) for part in parts]
        *begin, second, last = (float(part) for part in (*parts[:-2], parts[-1]))
        step = second - begin[-1]
        count = round((last - second) / step)
        if step == 0 or not 0 <= count <= 10_000 or abs(second + count * step - last) > 1e-6 * abs(last):
            raise ValueError
        return [*begin, second, *(float(f"{x:.9g}") for x in np.linspace(second, last, count + 1)[1:])]
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"{option} {text!r}: write lengths separated by commas, 0.05,0.10, or in equal steps, 0.01,0.02,...,0.1"
        ) from None


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
