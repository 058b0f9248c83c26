"""Labels left out: how many, which, and that a run with them resumes bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import files_of, log_of, tiny_config, tiny_data

from edm2.data import ArrayDataset
from edm2.diffusion import read_model_header
from edm2.train import Stopped, Trainer, train
from edm2.train.label_dropout import drop_labels

INDEX = torch.arange(20_000)


def dropped(index: torch.Tensor, labels: torch.Tensor, **changes: Any) -> torch.Tensor:
    return drop_labels(labels, index, **{"num_classes": 3, "probability": 0.1, "seed": 0, **changes})


def test_share_and_values() -> None:
    labels = INDEX % 3
    found = dropped(INDEX, labels)
    kept = found.any(dim=1)
    assert float((~kept).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(found[kept].argmax(1), labels[kept])
    assert torch.equal(found[kept].sum(1), torch.ones(int(kept.sum())))


def test_a_function_of_seed_and_position() -> None:
    labels = INDEX % 3
    whole = dropped(INDEX, labels)
    parts = torch.cat([dropped(INDEX[:7], labels[:7]), dropped(INDEX[7:], labels[7:])])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, dropped(INDEX, labels, seed=1))


def test_vectors_become_zeros() -> None:
    vectors = torch.randn(len(INDEX), 3)
    found = dropped(INDEX, vectors)
    assert torch.equal(found.any(dim=1), dropped(INDEX, INDEX % 3).any(dim=1))
    assert torch.equal(found[found.any(dim=1)], vectors[found.any(dim=1)])


def run(out: Path, stop: int | None = None, **changes: Any) -> Path:
    def on_step(trainer: Trainer) -> None:
        if trainer.num_images == stop:
            trainer.request_stop()

    return train(tiny_config(**changes), out, dataset=tiny_data(), quiet=True, on_step=on_step)


def test_resume_and_record(tmp_path: Path) -> None:
    final = run(tmp_path / "whole", label_dropout=0.3)
    with pytest.raises(Stopped):
        run(tmp_path / "parts", 72, label_dropout=0.3)
    run(tmp_path / "parts", label_dropout=0.3)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert read_model_header(final)[1]["info"]["label_dropout"] == 0.3


def test_only_a_run_that_drops_labels_has_another_name() -> None:
    assert "label_dropout" not in tiny_config().identity()
    assert tiny_config(label_dropout=0.1).run_id("x") != tiny_config().run_id("x")


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"label_dropout 1.0 must be a probability, in \[0, 1\): change --label-dro"
    ):
        tiny_config(label_dropout=1.0)
    data = ArrayDataset(np.zeros((8, 1, 4, 4), np.uint8) + np.arange(4, dtype=np.uint8))
    with pytest.raises(
        ValueError, match=r"label_dropout 0.1 has no effect, because the training data has no labels"
    ):
        Trainer(tiny_config(label_dropout=0.1), data, tmp_path / "run")
