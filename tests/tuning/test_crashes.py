"""`edm2 tune` and the pages, stopped at every operation on files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crashes import check_every_interruption

from edm2.report import Page
from edm2.tuning import Knobs, TuningPlan, bench, evaluations, read_tuned, result, save_tuned, tune

pytestmark = pytest.mark.filterwarnings("ignore")
PLAN = TuningPlan(
    sigma_rels=(0.1,), guide_moments=(0.5,), guide_factors=(1.0,), guidances=(), highs=(), lows=(),
    samples=2, final_samples=2, repeats=2,
)  # fmt: skip


class Preferring:
    """Takes what stands in for images as the score."""

    fingerprint = metric = "preference"
    features = "knobs"

    def distance(self, images: Any) -> float:
        return float(images)


@pytest.mark.slow
def test_tune_goes_on_after_any_interruption(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def images(_: Any, knobs: Knobs, seeds: range) -> float:
        return knobs.sigma_rel - (0.01 if knobs.is_guided else 0.0)

    def work(root: Path) -> None:
        torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
        with pytest.MonkeyPatch.context() as patch:
            for module in (evaluations, result):
                patch.setattr(module, "FOLDER", str(root / "tuning"))
            save_tuned(digits_run, tune(digits_run, Preferring(), PLAN))
            found = read_tuned(digits_run)
            assert found is not None
            assert found.is_better

    monkeypatch.setattr(bench.Bench, "images", images)
    assert check_every_interruption(tmp_path, work) > 15
    lines = (tmp_path / "whole" / "tuning" / "evaluations.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 2 + 2 + 2


@pytest.mark.slow
def test_a_page_is_whole_after_any_interruption(tmp_path: Path) -> None:
    def work(root: Path) -> None:
        page = Page("title")
        page.text("text")
        page.write(root / "new" / "page.html")

    assert check_every_interruption(tmp_path, work) > 3
