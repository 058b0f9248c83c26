"""The augmentation of small data sets, as a run applies it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import files_of, log_of, tiny_config, tiny_data

from edm2.data import AUGMENT_DIM, Augmentation
from edm2.diffusion import load_model
from edm2.train import DataConfig, Stopped, Trainer, train


def seen_in_a_step(out: Path, **changes: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The noisy images and labels of augmentation that the network is shown in a run's first step."""
    trainer = Trainer(tiny_config(**changes), tiny_data(), out)
    noisy, labels = [], []

    def look(_module: Any, inputs: Any, options: dict[str, Any]) -> None:
        noisy.append(inputs[0])
        labels.append(options.get("augment_labels"))

    with trainer.denoiser.register_forward_pre_hook(look, with_kwargs=True):
        trainer.step()
    trainer.close()
    return torch.cat(noisy), None if labels[0] is None else torch.cat(labels)


def test_the_network_sees_what_the_labels_say(tmp_path: Path) -> None:
    augment = {"dataset": DataConfig(augment=0.1)}
    plain, none = seen_in_a_step(tmp_path / "plain")
    whole, labels = seen_in_a_step(tmp_path / "whole", **augment)
    parts, part_labels = seen_in_a_step(tmp_path / "parts", microbatch=2, **augment)
    assert none is None
    assert labels is not None
    assert part_labels is not None
    assert torch.equal(labels, Augmentation(probability=0.1).labels(torch.arange(8), seed=0))
    still = (labels == 0).all(1)
    assert 0 < still.sum() < 8
    assert torch.equal(whole[still], plain[still])
    assert not any(torch.equal(a, b) for a, b in zip(whole[~still], plain[~still], strict=True))
    assert torch.equal(part_labels, labels)
    assert torch.allclose(parts, whole, atol=1e-6)


@pytest.mark.parametrize("letter", list("ABCDEFG"))
def test_stopped_and_continued_is_the_whole_run(tmp_path: Path, letter: Any) -> None:
    config = tiny_config(config=letter, dataset=DataConfig(augment=0.3, mirror=True))

    def stop(trainer: Trainer) -> None:
        if trainer.num_images == 72:
            trainer.request_stop()

    train(config, tmp_path / "whole", dataset=tiny_data(), quiet=True)
    with pytest.raises(Stopped):
        train(config, tmp_path / "pieces", dataset=tiny_data(), quiet=True, on_step=stop)
    train(config, tmp_path / "pieces", dataset=tiny_data(), quiet=True)
    assert files_of(tmp_path / "pieces") == files_of(tmp_path / "whole")
    assert log_of(tmp_path / "pieces") == log_of(tmp_path / "whole")
    denoiser, _ = load_model(tmp_path / "whole")
    assert denoiser.options["augment_dim"] == AUGMENT_DIM
    assert denoiser.unet.emb_augment is not None


def test_runs_without_it_are_what_they_were(tmp_path: Path) -> None:
    assert "augment" not in tiny_config().identity()["dataset"]
    # From before there was this option: such runs must still continue.
    assert tiny_config().run_id("x") == "576013092aa2d4dd"
    augmented = tiny_config(dataset=DataConfig(augment=0.12))
    assert augmented.run_id("x") != tiny_config().run_id("x")
    train(tiny_config(num_images=16), tmp_path / "run", dataset=tiny_data(), quiet=True)
    assert load_model(tmp_path / "run")[0].options["augment_dim"] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["dataset"]["augment"] == 0
    with pytest.raises(ValueError, match=r"holds another run \(dataset.augment None there, 0.12 here\)"):
        train(augmented, tmp_path / "run", dataset=tiny_data(), quiet=True)


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"augment 0.1 does not suit latents"):
        DataConfig(augment=0.1, coding="latents", mean=(0.0,), std=(1.0,))
    with pytest.raises(ValueError, match=r"augment 1.5 must be a probability, in \[0, 1\]"):
        DataConfig(augment=1.5)
