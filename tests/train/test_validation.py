"""Held-out images: a stored split, a loss that is exact and repeatable, the best checkpoints, an early end."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import files_of, log_of, tiny_config, tiny_data

from edm2.data import ArrayDataset, Subset
from edm2.ema import PowerEMA
from edm2.train import Stopped, TrainConfig, Trainer, train
from edm2.train.checkpoint import prune
from edm2.train.config_groups import ValidateConfig
from edm2.train.logs import VALIDATION_FILE, read_log
from edm2.train.validation import (
    SPLIT_FILE,
    Validation,
    best_moments,
    has_ended,
    held_out_rows,
    is_flat,
    split_data,
)

OFTEN = ValidateConfig(every=16)


def run(out: Path, stop: int | None = None, **changes: Any) -> Path:
    def on_step(trainer: Trainer) -> None:
        if trainer.num_images == stop:
            trainer.request_stop()

    settings = {"validation": "0.2", "validate": OFTEN, **changes}
    return train(tiny_config(**settings), out, dataset=tiny_data(), quiet=True, on_step=on_step)


def test_the_split_is_a_function_of_seed_and_size_and_is_stored(tmp_path: Path) -> None:
    rows = held_out_rows(40, 0.2, 0)
    assert len(set(rows)) == 8
    assert list(rows) == sorted(rows)
    assert not np.array_equal(rows, held_out_rows(40, 0.2, 1))
    run(tmp_path / "run", num_images=16)
    stored = json.loads((tmp_path / "run" / SPLIT_FILE).read_text())
    assert stored["rows"] == rows.tolist()
    assert stored["names"][0] == f"image {rows[0]}"
    rest, held_out = split_data(tiny_data(), tiny_config(validation="0.2"))
    assert isinstance(held_out, Subset)
    assert np.array_equal(held_out.images(np.arange(8)), tiny_data().images(rows))
    assert len(rest) == 32
    assert rest.fingerprint != tiny_data().fingerprint


def test_training_does_not_see_them_and_measuring_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path / "measured")
    rest, _ = split_data(tiny_data(), tiny_config(validation="0.2"))
    train(tiny_config(), tmp_path / "alone", dataset=rest, quiet=True)
    ours = files_of(tmp_path / "measured")
    for name, digest in files_of(tmp_path / "alone").items():
        if name.endswith(".safetensors"):
            assert ours[name] == digest, name


class Perfect:
    """Knows the clean images, but for a constant."""

    sigma_data = 0.5

    def __init__(self, clean: torch.Tensor, off: float) -> None:
        self.clean, self.off = clean, off

    def parameters(self) -> Any:
        return iter([self.clean])

    def eval(self) -> None: ...

    def train(self) -> None: ...

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: Any, **_: Any) -> torch.Tensor:
        start = int(x.new_zeros(1)) + self.seen
        self.seen = (self.seen + len(x)) % len(self.clean)
        return self.clean[start : start + len(x)] + self.off

    seen = 0


def test_the_loss_of_a_known_error(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(validation="0.2", batch_size=8), tiny_data(), tmp_path / "run")
    validation = trainer._validation
    assert validation is not None
    assert len(validation.levels) == 8
    assert math.exp(-0.4) == pytest.approx(math.exp(np.mean(np.log(validation.levels))))
    held_out = validation._held_out.images(np.arange(8))
    clean = trainer.coding.encode(torch.from_numpy(held_out), torch.arange(8), seed=0)
    losses = validation._losses(Perfect(clean, 0.1))  # type: ignore[arg-type]
    expected = [(s * s + 0.25) / (s * 0.5) ** 2 * 0.01 for s in validation.levels]
    assert losses == pytest.approx(expected, rel=1e-4)


def test_raw_weights_and_average_are_measured_apart(tmp_path: Path) -> None:
    run(tmp_path / "run")
    records = read_log(tmp_path / "run", VALIDATION_FILE)
    assert [r["num_images"] for r in records] == list(range(16, 161, 16))
    assert all(r["loss"] != r["loss_ema"] and r["sigma_rel"] == 0.1 for r in records)
    assert records[-1]["loss"] == pytest.approx(np.mean(records[-1]["by_level"]))


def test_the_size_of_batches_does_not_matter(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(validation="0.2"), tiny_data(), tmp_path / "run")
    trainer.step()
    assert isinstance(trainer.ema, PowerEMA)
    found = []
    for size in (8, 3):
        config = dataclasses.replace(trainer.config, batch_size=size)
        _, held_out = split_data(tiny_data(), config)
        assert held_out is not None
        validation = Validation(config, held_out, trainer.coding, trainer._stepper.objective)
        found.append(validation.measure(trainer.denoiser, trainer.ema, 0.1)["by_level"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("stop", [40, 72])
def test_resume(tmp_path: Path, stop: int) -> None:
    options = {"keep_best": 2, "keep_checkpoints": 1}
    run(tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        run(tmp_path / "parts", stop, **options)
    run(tmp_path / "parts", **options)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    for name in ("log.jsonl", VALIDATION_FILE):
        assert log_of(tmp_path / "parts", name) == log_of(tmp_path / "whole", name)


def test_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path / "run", keep_best=2, keep_checkpoints=1)
    best = best_moments(read_log(tmp_path / "run", VALIDATION_FILE), 2)
    kept = {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {*best, 160}


def test_unwanted_best_checkpoints_go(tmp_path: Path) -> None:
    run(tmp_path / "run", keep_best=3, keep_checkpoints=1)
    prune(tmp_path / "run" / "checkpoints", keep=1, best=())
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"{160:012d}"]


@pytest.mark.parametrize(
    ("losses", "options", "flat"),
    [
        ([3, 2, 1], {"patience": 2}, False),
        ([3, 2, 2, 2], {"patience": 2}, True),
        ([3, 2, 2.1, 1.9, 2], {"patience": 2}, False),
        ([3, 2, 1.99, 1.98], {"patience": 2, "change": 0.05}, True),
        ([3, 2, 1.95, 1.8, 1.79], {"patience": 2, "change": 0.05}, False),
        ([-1.0, -1.01, -1.02], {"patience": 2, "change": 0.05}, True),
        ([4, 2, 4, 2, 4, 2], {"patience": 3, "window": 2}, True),
        ([4, 2, 3, 1, 2, 0], {"patience": 2, "window": 2}, False),
        ([1.0, math.nan, math.nan], {"patience": 2}, True),
        ([], {"patience": 1}, False),
    ],
)
def test_flatness(losses: list[float], options: dict[str, Any], flat: bool) -> None:
    assert is_flat(losses, **{"change": 0.0, "window": 1, **options}) is flat


def test_a_flat_run_ends_as_a_finished_one_and_stays_so(tmp_path: Path) -> None:
    never_lower = ValidateConfig(every=16, min_change=0.99)
    options = {"stop_when_flat": 2, "validate": never_lower}
    model = run(tmp_path / "run", **options)
    files = files_of(tmp_path / "run")
    assert model.exists()
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        f"{n:012d}" for n in (40, 48)
    ]
    assert run(tmp_path / "run", **options) == model
    assert files_of(tmp_path / "run") == files
    run(tmp_path / "run", stop_when_flat=0)  # goes on where it ended
    assert read_log(tmp_path / "run")[-1]["num_images"] == 160
    with pytest.raises(Stopped):
        run(tmp_path / "parts", 24, **options)
    run(tmp_path / "parts", **options)
    assert {k: v for k, v in files_of(tmp_path / "parts").items() if "checkpoints" not in k} == {
        k: v for k, v in files.items() if "checkpoints" not in k
    }


def test_another_data_set(tmp_path: Path) -> None:
    path = tmp_path / "held.npz"
    data = tiny_data(12)
    np.savez(path, images=data.images(np.arange(12)), labels=data.labels(np.arange(12)))
    run(tmp_path / "run", num_images=16, validation=str(path))
    assert len(read_log(tmp_path / "run", VALIDATION_FILE)) == 1
    assert tiny_config(validation=str(path)).run_id("x") == tiny_config().run_id("x")
    np.savez(path, images=np.zeros((4, 1, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="the images of the validation data"):
        run(tmp_path / "other", validation=str(path))
    np.savez(path, images=data.images(np.arange(12)))
    with pytest.raises(ValueError, match="has 0 classes, the training data 3"):
        run(tmp_path / "other", validation=str(path))


def test_held_out_pairs_in_two_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = {name: str(tmp_path / f"{name}.npy") for name in ("data", "condition", "held", "given")}
    for name, path in paths.items():
        np.save(path, rng.normal(3, 1, (24 if name in ("data", "condition") else 8, 1, 4, 4)))
    options = ValidateConfig(every=16, condition=paths["given"])
    config = tiny_config(
        num_images=16,
        data=paths["data"],
        condition=paths["condition"],
        validation=paths["held"],
        validate=options,
    )
    train(config, tmp_path / "run", quiet=True)
    assert len(read_log(tmp_path / "run", VALIDATION_FILE)) == 1
    with pytest.raises(ValueError, match="the conditions of the validation data 'held' are None"):
        train(dataclasses.replace(config, validate=ValidateConfig()), tmp_path / "other", quiet=True)


def test_mistakes() -> None:
    for changes, told in (
        ({"validation": "1.5"}, "validation 1.5 must be a share between 0 and 1, or a data set"),
        ({"keep_best": 1}, "keep_best 1 needs held-out images: give validation"),
        ({"stop_when_flat": 1}, "stop_when_flat 1 needs held-out images"),
        ({"keep_best": -1}, "keep_best -1 must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=told):
            TrainConfig(**changes)  # type: ignore[arg-type]
    for changes, told in (
        ({"every": 0}, "every 0 must be at least 1: change --validate.every"),
        ({"most": 0}, "most 0 must be"),
        ({"window": 0}, "window 0 must be"),
        ({"min_change": 1.0}, r"min_change 1.0 must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=told):
            ValidateConfig(**changes)  # type: ignore[arg-type]
    data = ArrayDataset(np.zeros((3, 1, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="leaves 3 for training and 0 held out"):
        split_data(data, TrainConfig(validation="0.01"))


def test_an_objective_without_such_a_loss(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(), tiny_data(), tmp_path / "run")
    with pytest.raises(ValueError, match="has no loss on held-out images"):
        Validation(trainer.config, tiny_data(), trainer.coding, lambda *_: torch.zeros(1))


def test_no_measurement_ends_no_run() -> None:
    assert not has_ended([], TrainConfig(validation="0.1", stop_when_flat=1))
