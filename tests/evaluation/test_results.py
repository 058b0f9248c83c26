"""Results that were damaged are refused by name, whatever became of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from edm2.evaluation import read_result, write_result
from edm2.evaluation.results import provenance_of
from edm2.hub import read_results
from edm2.metrics import Scores


@pytest.fixture
def result(tmp_path: Path) -> Path:
    images = {"source": "samples", "num_images": 8, "sampling": {"model": {"digest": "ab"}, "sampler": {}}}
    extractor = {"name": "classifier", "sha256": "ab" * 32, "num_features": 4}
    provenance = provenance_of(images, extractor, keep=0, seed=0)
    provenance["reference"] = {"images": {"source": "digits", "num_images": None}, "sha256": "cd" * 32}
    write_result(tmp_path / "r.json", provenance, Scores(frechet=3.25), ["few images"])
    return tmp_path / "r.json"


def test_a_result_comes_back(result: Path) -> None:
    assert read_result(result)["scores"]["frechet_distance"] == 3.25
    assert read_results(result)[0].value == 3.25


@pytest.mark.parametrize(
    "change",
    [
        {"scores": None},
        {"scores": {"frechet_distance": "3"}},
        {"extractor": {}},
        {"images": {"source": 1, "num_images": 8}},
        {"images": {"source": "samples", "num_images": "8"}},
        {"reference": {"images": None}},
        {"warnings": "few"},
        {"warnings": [1]},
    ],
)
def test_damaged_results_are_refused(result: Path, change: dict[str, Any]) -> None:
    result.write_text(json.dumps({**json.loads(result.read_text()), **change}))
    for read in (read_result, read_results):
        with pytest.raises(ValueError, match=re.escape(f"{result} is damaged: restore it from a copy, or")):
            read(result)


@pytest.mark.parametrize("sampling", [[1], {"model": "x"}, {"model": {"digest": "ab"}, "sampler": 3}])
def test_damaged_settings_of_samples_are_refused(result: Path, sampling: Any) -> None:
    content = json.loads(result.read_text())
    content["images"]["sampling"] = sampling
    result.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"r\.json is damaged \(.*\): restore it from a copy, or measure again"
    ):
        read_results(result)
