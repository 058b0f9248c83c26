"""Training on images with conditions, vectors and missing values: what the network is given, the run, its samples."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import files_of, log_of, tiny_config, tiny_network

from edm2.cli import main
from edm2.data import ArrayDataset, Batch, PairedDataset
from edm2.generate import ImageGenerator
from edm2.train import DataConfig, OptimizerConfig, Stopped, Trainer, train
from edm2.train.coding import Coding, make_coding
from edm2.train.dry_run import dry_run
from edm2.train.inputs import code_batch

COUNT = 40
RNG = np.random.default_rng(0)
TARGETS = RNG.normal(280, 8, (COUNT, 2, 4, 4)).astype(np.float32)  # in kelvins
CONDITIONS = RNG.normal(-3, 0.1, (COUNT, 3, 2, 2)).astype(np.float32)
VECTORS = RNG.normal([100, 0], [20, 1], (COUNT, 2)).astype(np.float32)
LABELS = np.arange(COUNT) % 3


def holes(values: np.ndarray, seed: int = 1) -> np.ndarray:
    return np.where(np.random.default_rng(seed).random(values.shape) < 0.2, np.nan, values).astype(np.float32)


def pairs(*, missing: bool = False, classes: bool = True) -> PairedDataset:
    images = ArrayDataset(
        holes(TARGETS) if missing else TARGETS, LABELS if classes else None, missing=missing
    )
    conditions = ArrayDataset(holes(CONDITIONS, 2) if missing else CONDITIONS, missing=missing)
    return PairedDataset(images, conditions, VECTORS)


def config_of(**changes: Any) -> Any:
    options = {"resample": "nearest", **changes}
    return tiny_config(dataset=DataConfig(**options), record_magnitudes=False)


def batch_of(data: PairedDataset, rows: slice = slice(None)) -> Batch:
    chosen = np.arange(COUNT)[rows]
    assert data.conditions is not None
    return Batch(
        0,
        torch.from_numpy(data.images(chosen)),
        torch.from_numpy(data.labels(chosen)) if data.num_classes else None,
        torch.from_numpy(data.conditions.images(chosen)),
        torch.from_numpy(data.vectors(chosen)),
    )


def test_all_that_a_network_is_given_has_unit_magnitude() -> None:
    data = pairs()
    coding = make_coding(config_of(), data)
    made = code_batch(batch_of(data), coding, seed=0, num_images=0)
    assert made.condition is not None
    assert made.labels is not None
    assert made.condition.shape == (COUNT, 3, 4, 4)
    assert torch.allclose(made.condition.square().mean((0, 2, 3)), torch.ones(3), atol=1e-3)
    assert made.labels.shape == (COUNT, 3 + 2)
    assert torch.allclose(made.labels.square().mean(), torch.ones(()), atol=1e-3)
    assert torch.equal(made.labels[:, :3].argmax(1), torch.from_numpy(LABELS))
    assert made.mask is None
    assert Coding.from_json(coding.to_json()) == coding


def test_missing_values_are_told_to_the_network_and_left_out_of_the_loss() -> None:
    data = pairs(missing=True)
    coding = make_coding(config_of(missing="mask"), data)
    assert Coding.from_json(coding.to_json()) == coding
    assert coding.values.mean == pytest.approx(np.nanmean(holes(TARGETS), (0, 2, 3)), rel=1e-6)
    made = code_batch(batch_of(data), coding, seed=0, num_images=0)
    assert made.mask is not None
    assert made.condition is not None
    gone = torch.from_numpy(np.isnan(holes(TARGETS)))
    assert torch.equal(made.mask, ~gone)
    assert made.images[gone].abs().max() == 0
    values, known = made.condition.chunk(2, dim=1)
    gone = torch.from_numpy(np.isnan(holes(CONDITIONS, 2))).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(known, torch.where(gone, -1.0, 1.0))
    assert values[gone].abs().max() == 0
    assert values.isfinite().all()


@pytest.mark.parametrize("options", [{"mirror": True}, {"augment": 0.8}], ids=["mirror", "augment"])
def test_images_conditions_and_masks_are_transformed_alike(options: dict[str, Any], tmp_path: Path) -> None:
    # The condition is the image itself, so that what the network is given of both must stay equal.
    same = ArrayDataset(holes(TARGETS), missing=True)
    data = PairedDataset(same, same, VECTORS)
    trainer = Trainer(config_of(missing="mask", **options), data, tmp_path)
    plain = code_batch(batch_of(data), trainer.coding, seed=0, num_images=0)
    made = trainer._stepper._inputs(batch_of(data), 0)
    assert made.condition is not None
    assert made.mask is not None
    assert not made.images.equal(plain.images)
    values, known = made.condition.chunk(2, dim=1)
    assert torch.allclose(made.images, values / 2, atol=1e-6)
    assert torch.equal(made.mask, (known - 1).abs() < 2e-3)
    assert 0.05 < made.mask.float().mean() < 0.85


def test_missing_values_have_no_gradient(tmp_path: Path) -> None:
    images = holes(TARGETS)
    data = PairedDataset(ArrayDataset(images, missing=True), ArrayDataset(CONDITIONS))
    trainer = Trainer(config_of(missing="mask"), data, tmp_path)
    stepper, losses = trainer._stepper, []
    objective = stepper.objective

    def watched(denoiser: Any, batch: Any) -> torch.Tensor:
        loss = objective(denoiser, batch)
        loss.retain_grad()
        losses.append((loss, batch.mask))
        return loss

    stepper.objective = watched
    trainer.step()
    ((loss, mask),) = losses
    assert loss.grad is not None
    assert torch.equal(loss.grad != 0, mask)


def test_a_run_on_pairs_continues_bit_for_bit(tmp_path: Path) -> None:
    data = pairs(missing=True)
    config = config_of(missing="mask", mirror=True)
    train(config, tmp_path / "whole", dataset=data, quiet=True)
    for position in (64, 104):
        with pytest.raises(Stopped):
            train(config, tmp_path / "parts", dataset=data, quiet=True, on_step=stop_at(position))
    train(config, tmp_path / "parts", dataset=data, quiet=True)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def stop_at(position: int) -> Any:
    def on_step(trainer: Trainer) -> None:
        if trainer.num_images == position:
            trainer.request_stop()

    return on_step


@pytest.mark.slow
def test_a_mean_that_depends_on_what_is_given_is_learned(tmp_path: Path) -> None:
    """Constant images that follow from condition, class and vector: samples must, too, in the data's units."""
    rng = np.random.default_rng(0)
    given = rng.choice([-1, 1], (256, 2))
    classes = rng.integers(0, 2, 256)
    level = 1000 + 30 * given[:, 0] + 20 * given[:, 1] + 10 * (2 * classes - 1)
    images = np.broadcast_to(level[:, None, None, None], (256, 1, 4, 4)) + rng.normal(0, 1, (256, 1, 4, 4))
    conditions = np.broadcast_to(7 + 0.1 * given[:, :1, None, None], (256, 1, 2, 2)) + np.zeros(
        (256, 1, 2, 2)
    )
    data = PairedDataset(ArrayDataset(images, classes), ArrayDataset(conditions), 50 + 5.0 * given[:, 1:])
    config = dataclasses.replace(
        config_of(),
        num_images=8_000,
        batch_size=32,
        snapshot_images=None,
        network=tiny_network(model_channels=16, dropout=0.0),
        checkpoint_images=1 << 20,
        optimizer=OptimizerConfig(ref_lr=0.03, ref_batches=100, rampup_mimg=0.0003),
    )
    model = ImageGenerator.load(train(config, tmp_path / "run", dataset=data, quiet=True))
    rows = np.arange(64)
    assert data.conditions is not None
    given = {"conditions": data.conditions.images(rows), "vectors": data.vectors(rows)}
    made = model.images(list(rows), classes[:64], **given, num_steps=8)
    error = made.mean((1, 2, 3)) - level[:64]
    assert np.abs(error).mean() < 6


@pytest.mark.filterwarnings("default:entry 1 of the vectors")
def test_the_command_line_trains_and_samples_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "pairs.npz", images=TARGETS, conditions=CONDITIONS, vectors=VECTORS, labels=LABELS)
    small = "--network.model-channels 8 --network.channel-mult 1 --network.num-blocks 1 --network.attn-resolutions"
    main(
        f"train --preset digits --data {tmp_path}/pairs.npz --out {tmp_path}/run --images 32 --batch 8 "
        f"--sample-images 16 --dataset.resample bilinear --device cpu {small} 4 --network.channels-per-head 8".split()
    )
    told = capsys.readouterr().err
    assert f"next: edm2 sample {tmp_path}/run --conditions {tmp_path}/pairs.npz" in told
    assert f"next: edm2 tune {tmp_path}/run --metric crps --cases HELD_OUT_PAIRS" in told
    assert len(list((tmp_path / "run" / "progress").glob("*.png"))) == 2
    main(f"report {tmp_path}/run --out {tmp_path}/page.html".split())
    assert (
        "Weighted squared error (natural logarithm) at each noise level"
        in (tmp_path / "page.html").read_text()
    )
    sample = f"sample {tmp_path}/run --seeds 0-5 --num-steps 2 --conditions {tmp_path}/pairs.npz"
    main(f"{sample} --out {tmp_path}/a.npz".split())
    main(f"{sample} --out {tmp_path}/b.npz --batch 4".split())
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a["arr_0"].shape == (6, 2, 4, 4)
        assert a["arr_0"].mean() > 200
        assert np.allclose(a["arr_0"], b["arr_0"])
        assert a["arr_1"].tolist() == LABELS[:6].tolist()
    np.savez(tmp_path / "late.npz", conditions=CONDITIONS, vectors=VECTORS + np.array([0, 9]))
    sample = f"sample {tmp_path}/run --seeds 0 --num-steps 2 --out {tmp_path}/late"
    main(f"{sample} --conditions {tmp_path}/late.npz".split())
    assert "entry 1 of the vectors reaches 10.42, and in training it was between" in capsys.readouterr().err
    np.savez(
        tmp_path / "bad.npz", conditions=CONDITIONS, vectors=np.where(VECTORS > 2, np.nan, VECTORS)[::-1]
    )
    with pytest.raises(SystemExit):
        main(f"sample {tmp_path}/run --out {tmp_path}/bad --conditions {tmp_path}/bad.npz".split())
    assert "vectors must be finite: entry 0 of image 0 is nan" in capsys.readouterr().err
    np.save(tmp_path / "nan.npy", VECTORS * np.nan)
    np.save(tmp_path / "conditions.npy", CONDITIONS)
    for labels, told in (
        ("nan.npy", "vectors hold values that are not finite"),
        ("late.npz", "cannot be read as a .npy file of numbers"),
    ):
        with pytest.raises(SystemExit):
            main(
                f"sample {tmp_path}/run --out {tmp_path}/bad --conditions {tmp_path}/conditions.npy "
                f"--labels {tmp_path}/{labels}".split()
            )
        assert told in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
    np.save(tmp_path / "wrong.npy", CONDITIONS + 273.15)
    np.save(tmp_path / "vectors.npy", VECTORS)
    with pytest.raises(SystemExit):
        main(
            f"sample {tmp_path}/run --out {tmp_path}/c.npz --conditions {tmp_path}/wrong.npy "
            f"--labels {tmp_path}/vectors.npy".split()
        )
    assert "channel 0 of the conditions has mean 270.2 and" in capsys.readouterr().err
    assert not (tmp_path / "c.npz").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x[:, :2],
            r"conditions of float32 \[40, 2, 2, 2\]: this model was trained on float \[N, 3, 2, 2\]",
        ),
        (lambda x: x.astype(np.uint8), "conditions of uint8"),
        (holes, "not finite .*, and the model was not trained with missing values"),
        (
            lambda x: x + 20,
            "has mean 17 and standard deviation 0.1018, in training -2.997 and 0.1018: give conditions in the units",
        ),
    ],
    ids=["channels", "bytes", "missing", "units"],
)
def test_conditions_that_differ_from_training_are_refused(change: Any, message: str) -> None:
    coding = make_coding(config_of(), pairs()).condition
    assert coding is not None
    assert coding.check(CONDITIONS) is None
    assert "are they in the units of the training data" in str(coding.check(CONDITIONS + 0.5))
    assert "standard deviation 0," in str(coding.check(CONDITIONS * 0 - 3))
    with pytest.raises(ValueError, match=message):
        coding.check(change(CONDITIONS))


def test_settings_that_do_not_fit_the_pairs_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"conditions are 2x2 and the images 4x4: say how .* --dataset.resample"
    ):
        make_coding(config_of(resample=None), pairs())
    flat = PairedDataset(ArrayDataset(TARGETS), vectors=np.ones((COUNT, 1)))
    with pytest.raises(
        ValueError, match="entry 0 of the vectors of 'array' is 1 for all images: leave it out"
    ):
        make_coding(config_of(), flat)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [3, 2]},
        {"shape": [10**9, 2, 2]},
        {"size": [4, -1]},
        {"mean": [0.0]},
        {"std": [0.0, 1.0, 1.0]},
        {"kind": "words"},
        {"resample": "lanczos"},
        {"missing": 1},
    ],
    ids=str,
)
def test_conditions_of_a_damaged_model_file_are_refused(change: dict[str, Any]) -> None:
    content = make_coding(config_of(), pairs()).to_json()
    with pytest.raises(ValueError, match="a coding of images that edm2 does not write"):
        Coding.from_json({**content, "condition": {**content["condition"], **change}})


def test_the_cost_of_a_run_on_pairs_is_measured() -> None:
    """As training without a preset does."""
    cost = dry_run(config_of(), steps=1, dataset=pairs())
    assert cost.flops > 0
    assert cost.images_per_second > 0
