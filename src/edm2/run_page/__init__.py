"""The page about one training run, or about several side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path

from edm2.progress import Progress
from edm2.report import Page
from edm2.run_page.curves import (
    add_averages,
    add_held_out,
    add_length_curves,
    add_overview,
    add_run_magnitudes,
    add_settings,
    add_training,
    add_tuning,
)
from edm2.run_page.pictures import (
    add_best,
    add_copy_check,
    add_noise_errors,
    add_samples_over_time,
    add_teacher_and_student,
)
from edm2.run_page.run import Run

__all__ = ["write_run_report"]

_OF_SNAPSHOTS = (
    add_averages, add_noise_errors, add_best, add_samples_over_time, add_copy_check, add_teacher_and_student
)  # fmt: skip


def write_run_report(
    runs: Sequence[str | Path], out: str | Path, *, samples: bool = True, quiet: bool = False
) -> Path:
    """Write one self-contained page about training runs.

    Args:
        runs: Folders of one or more runs, finished or under way; several are shown side by side.
        out: The HTML file.
        samples: Whether to run the networks: samples over time, and errors by noise level.
        quiet: Whether to show no progress.

    Returns:
        The file.

    Raises:
        ValueError: If a folder is not a run or has logged nothing yet; nothing is written then.
    """
    opened = [Run(Path(run)) for run in runs]
    if len({run.name for run in opened}) < len(opened):
        for run in opened:
            run.name = str(run.folder)
    page = Page(
        f"Training of {', '.join(run.name for run in opened)}",
        lead="What happened in training, drawn from the files of the run.",
    )
    parts: dict[str, Callable[[Page, Run], None]] = {"Training": add_training, "EMA profiles": add_averages}
    if samples:
        parts = {"Samples": add_best, "Samples over time": add_samples_over_time, **parts}
        parts |= {"Error by noise level": add_noise_errors, "Copies": add_copy_check}
        if any(run.is_student for run in opened):
            parts["Teacher and student"] = add_teacher_and_student
    if any(run.lengths for run in opened):
        parts["EMA length"] = add_length_curves
    if any(run.tuned for run in opened):
        parts["Tuning"] = add_tuning
    with Progress("report", len(parts) * len(opened), "parts", quiet=quiet) as progress:
        add_overview(page, opened)
        for heading, draw in parts.items():
            page.section(heading)
            for run in opened:
                if len(opened) > 1:
                    page.text(run.name)
                if draw in _OF_SNAPSHOTS and not run.times:
                    page.text("No snapshot yet.")
                else:
                    draw(page, run)
                progress.advance(1)
            if draw is add_training:
                add_held_out(page, opened)
                add_run_magnitudes(page, opened)
    add_settings(page, opened)
    return page.write(out)
