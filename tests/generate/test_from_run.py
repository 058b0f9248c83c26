"""`edm2 sample` on a run: any EMA length, and the run's own past as a guide."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import small_model

from edm2.cli import main
from edm2.data import ArrayDataset
from edm2.ema.storage.manifest import read_manifest, write_manifest
from edm2.generate import ImageGenerator, reconstruct_models
from edm2.generate.lengths import generators
from edm2.train import NetworkConfig, OptimizerConfig, TrainConfig, train

QUICK = ["--num-steps", "2", "--seeds", "0-2", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), dtype=np.uint8)
    config = TrainConfig(
        num_images=160,
        batch_size=8,
        snapshot_images=40,
        checkpoint_images=160,
        log_images=80,
        device="cpu",
        network=NetworkConfig(
            model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8
        ),
        optimizer=OptimizerConfig(ref_lr=0.02, ref_batches=10, rampup_mimg=0.00003),
    )
    out = tmp_path_factory.mktemp("run") / "run"
    train(config, out, dataset=ArrayDataset(images, np.arange(40) % 3, name="tiny"), quiet=True)
    return out


def test_a_length_on_the_fly_is_the_model_that_would_be_written(run: Path, tmp_path: Path) -> None:
    [(path, _)] = reconstruct_models(run, [0.08], tmp_path)
    written, made = ImageGenerator.load(path), ImageGenerator.load(run, 0.08)
    assert written.identity() == made.identity()
    assert torch.equal(written.latents([1], num_steps=2), made.latents([1], num_steps=2))
    with pytest.raises(
        FileExistsError, match=r"ema-0\.08\.safetensors exists already and holds another average"
    ):
        reconstruct_models(run, [0.06, 0.08], tmp_path, t=120)
    assert not (tmp_path / "ema-0.06.safetensors").exists()
    before = path.stat().st_mtime_ns
    assert [p.name for p, _ in reconstruct_models(run, [0.06, 0.08], tmp_path)] == [
        "ema-0.06.safetensors",
        "ema-0.08.safetensors",
    ]
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"EMA lengths \[0\.07, 0\.07\] must be different"):
        reconstruct_models(run, [0.07, 0.07], tmp_path)
    near = [path.name for path, _ in reconstruct_models(run, [0.08123, 0.08124], tmp_path)]
    assert near == ["ema-0.08123.safetensors", "ema-0.08124.safetensors"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.pop("network"), "holds snapshots of a model that edm2 did not train"),
        (lambda m: m["network"].update(channel_mult=[]), "not those of the network that they describe"),
        (lambda m: m["network"].update(model_channels=16), "not those of the network that they describe"),
        (lambda m: m["info"].pop("coding"), "does not say how its images are coded"),
        (lambda m: m["info"].update(coding={"kind": []}), "describes a coding of images that edm2 does not"),
    ],
)
def test_snapshots_that_describe_another_network(run: Path, tmp_path: Path, change: Any, told: str) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run")) / "snapshots"
    manifest = read_manifest(folder)
    metadata = json.loads(json.dumps(manifest.run.metadata))
    change(metadata)
    write_manifest(
        folder, dataclasses.replace(manifest, run=dataclasses.replace(manifest.run, metadata=metadata))
    )
    with pytest.raises(ValueError, match=told):
        next(generators(folder, [0.08]))
    with pytest.raises(ValueError, match=told):
        ImageGenerator.load(tmp_path / "run", 0.08)


@pytest.mark.filterwarnings("ignore:.*expect a relative error")
def test_the_run_guides_itself(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", str(run), "--ema", "0.08", "--guide-ema", "0.05", "--guide-images", "80"]
    main([*words, "--guidance", "2", *QUICK, "--out", str(tmp_path / "s")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "s" / "grid.png")
    record = json.loads((tmp_path / "s" / "samples.json").read_text())
    assert (record["model"]["sigma_rel"], record["model"]["num_images"]) == (0.08, 160)
    assert (record["guide"]["sigma_rel"], record["guide"]["num_images"]) == (0.05, 80)
    assert record["model"]["run_id"] == record["guide"]["run_id"]


@pytest.mark.parametrize("words", [["{run}"], ["--model", "{run}"]])
def test_the_final_model(run: Path, tmp_path: Path, words: list[str]) -> None:
    main(["sample", *(w.format(run=run) for w in words), *QUICK, "--out", str(tmp_path / "s")])
    assert (tmp_path / "s" / "000002.png").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which model? Give one run or model file"),
        (["{run}", "--model", "{run}"], "which model? Give one run or model file"),
        (["nowhere"], "nowhere does not exist: give a model file"),
        (["{run}", "--ema", "0.5"], "0.5"),
        (["{run}", "--ema-images", "80"], "80 images of which average? Give its EMA length, too"),
        (["{run}", "--guide-images", "80"], "--guide-images 80 needs --guide-ema"),
        (["{run}", "--guide-ema", "0.05"], "a guide has no effect with --guidance 1"),
        (["{run}", "--interval", "1", "2"], "--interval has no effect with --guidance 1"),
        (["{run}", "--guidance", "2"], "--guidance 2 needs a guide: give a model as --guide, or use an earlier point"),
        (["{run}", "--guide", "{other}", "--guidance", "2"], "the guide has images (1, 8, 8), the model (1, 4, 4)"),
        (["{run}", "--guide-ema", "0.05", "--guidance", "2", "--interval", "90", "99"], "holds none of the schedule"),
        (["{run}", "--label", "3"], "there is no class '3': give a number from 0 to 2"),
        (["{run}", "--label", "1", "--labels", "x.npy"], "--label and --labels exclude each other"),
        (["{run}", "--labels", "nothing.npy"], "nothing.npy cannot be read as a .npy file"),
        (["{run}", "--seeds", "1,1"], "seed 1 is given twice"),
        (["{run}", "--num-steps", "0"], "num_steps 0 must be at least 1"),
        (["{run}", "--batch", "0"], " 0 must be at least 1"),
        (["{run}", "--sampler", "euler", "--s-churn", "1"], "the sampler euler has no s_churn"),
        (["{run}", "--device", "tpu9"], "device 'tpu9' cannot be used here"),
    ],
)  # fmt: skip
def test_bad_words(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    other = tmp_path / "other.safetensors"
    small_model(other)
    options: list[Any] = [word.format(run=run, other=other) for word in words]
    with pytest.raises(SystemExit) as ended:
        main(["sample", *options, "--out", str(tmp_path / "s")])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("every", "first"), [(40, 40), (None, 80), (1000, 160)], ids=["set", "default", "beyond the end"]
)
def test_a_run_before_its_first_snapshot_says_when_it_comes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], every: int | None, first: int
) -> None:
    young = tmp_path / "young"
    (young / "checkpoints").mkdir(parents=True)
    content = json.loads((run / "config.json").read_text())
    del content["sha256"]
    content["settings"]["snapshot_images"] = every
    (young / "config.json").write_text(json.dumps(content))
    told = (
        f"{young} has no snapshot yet: the first comes after {first:,} training images, and the log reaches 0"
    )
    for words in (
        ["sample", "--out", str(tmp_path / "out"), "--ema", "0.1", str(young)],
        ["sample", "--out", str(tmp_path / "out"), str(young)],
        ["tune", str(young)],
        ["ema", "list", str(young)],
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert told in capsys.readouterr().err
    shutil.copy(run / "log.jsonl", young)
    with pytest.raises(ValueError, match="and the log reaches 160; train on until then"):
        ImageGenerator.load(young, 0.1)
    (young / "config.json").write_text((run / "config.json").read_text())
    (young / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"snapshots does not exist: give a snapshot folder"):
        ImageGenerator.load(young, 0.1)
