"""Saving and opening shared models, and their card: needs nothing but edm2."""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import latent_coding, small_denoiser, small_generator, small_model

import edm2
from edm2.cli import main
from edm2.data import ArrayDataset
from edm2.diffusion import save_model
from edm2.evaluation.images import open_images
from edm2.evaluation.results import provenance_of, write_result
from edm2.extras import MissingExtra
from edm2.files import write_json
from edm2.generate import ImageGenerator, read_images, write_samples
from edm2.hub import Pretrained, Result, Sampling, open_pretrained, read_results, save_pretrained
from edm2.hub.model_card import model_card
from edm2.interop.licence import LICENCE, NOTICE, NOTICE_LINE
from edm2.metrics.measure import Scores
from edm2.train import NetworkConfig, OptimizerConfig, TrainConfig, train
from edm2.tuning.result import Knobs, Tuned, save_tuned

SEEDS = [0, 1, 2, 3]


def released_model(path: Path, **options: Any) -> Path:
    """As `edm2 import` writes it: numbers in float16, and a licence."""
    generator = small_generator(**options)
    tensors = {
        k: v.half() if v.dtype == torch.float32 else v for k, v in generator.denoiser.state_dict().items()
    }
    info = {"coding": generator.coding.to_json(), "license": LICENCE, "license_notice": NOTICE_LINE}
    return save_model(path, generator.denoiser.options, tensors, info)


@pytest.fixture(scope="module")
def tuned_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), dtype=np.uint8)
    config = TrainConfig(
        num_images=160,
        batch_size=8,
        snapshot_images=40,
        checkpoint_images=160,
        device="cpu",
        network=NetworkConfig(
            model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8
        ),
        optimizer=OptimizerConfig(ref_lr=0.02, ref_batches=10, rampup_mimg=0.00003),
    )
    run = tmp_path_factory.mktemp("run") / "run"
    train(config, run, dataset=ArrayDataset(images, np.arange(40) % 3, name="tiny"), quiet=True)
    best = Knobs(sigma_rel=0.08, guide_images=80, guide_sigma_rel=0.1, guidance=1.5, interval=(0.1, math.inf))
    found = Tuned(
        best=best, num_steps=3, sampler="dpmpp-2m", tried=[], held_out=[1.0, 1.5], baseline=[2.0, 3.0]
    )
    save_tuned(run, found)
    return run


def test_equal_seeds_give_equal_images(tmp_path: Path) -> None:
    model = small_model(tmp_path / "m.safetensors")
    folder = save_pretrained(model, tmp_path / "shared")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    opened = open_pretrained(folder)
    assert opened.generator.identity() == ImageGenerator.load(model).identity()
    assert np.array_equal(
        opened.images(SEEDS, num_steps=2), ImageGenerator.load(model).images(SEEDS, num_steps=2)
    )
    assert np.array_equal(
        ImageGenerator.load(folder).images([5], num_steps=2), opened.images([5], num_steps=2)
    )


def test_a_tuned_run_keeps_its_guide_and_settings(tuned_run: Path, tmp_path: Path) -> None:
    folder = save_pretrained(tuned_run, tmp_path / "shared")
    opened = open_pretrained(folder)
    assert opened.sampling == Sampling(
        sampler="dpmpp-2m", num_steps=3, guidance=1.5, interval=(0.1, math.inf)
    )
    model, guide = (
        ImageGenerator.load(tuned_run / "tuning" / f"{name}.safetensors") for name in ("model", "guide")
    )
    expected = model.images(
        SEEDS, sampler="dpmpp-2m", num_steps=3, guide=guide, guidance=1.5, interval=(0.1, math.inf)
    )
    assert np.array_equal(opened.images(SEEDS), expected)
    unguided = model.images(SEEDS, sampler="heun", num_steps=2)
    assert np.array_equal(opened.images(SEEDS, guidance=1.0, sampler="heun", num_steps=2), unguided)
    card = (folder / "README.md").read_text()
    assert "| Guidance weight | 1.5 |" in card
    assert "`guide.safetensors`, 80 training images seen, EMA length 0.1" in card
    assert "| Guidance acts for sigma in | (0.1, inf] |" in card
    assert "| EMA length (sigma_rel) | 0.08 |" in card
    assert "| Frechet distance | 1.25 | (1) |" in card
    assert "| Frechet distance, untuned (EMA 0.1, no guidance) | 2.5 | (2) |" in card
    assert "2 sets with seeds held out from the search: 1 to 1.5" in card
    assert opened.results == open_pretrained(tuned_run).results


def test_another_length_of_a_run(tuned_run: Path, tmp_path: Path) -> None:
    opened = open_pretrained(save_pretrained(tuned_run, tmp_path / "shared", sigma_rel=0.06))
    assert opened.guide is None
    assert opened.generator.identity() == ImageGenerator.load(tuned_run, 0.06).identity()
    assert "| EMA length (sigma_rel) | 0.06 |" in (tmp_path / "shared" / "README.md").read_text()


def test_released_weights_keep_licence_and_precision(tmp_path: Path) -> None:
    model, guide = (released_model(tmp_path / f"{n}.safetensors", seed=n) for n in (1, 2))
    setting = tmp_path / "edm2-x-autog-fid.json"
    content = {
        "format": "edm2.sampling/1",
        "preset": "edm2-x-autog-fid",
        "model": model.name,
        "guide": guide.name,
    }
    write_json(setting, {**content, "guidance": 2.0, "reported": {"metric": "FID", "value": 1.5}})
    folder = save_pretrained(setting, tmp_path / "shared")
    assert (folder / "LICENSE-NOTICE").read_text() == NOTICE
    card = (folder / "README.md").read_text()
    assert 'license: "cc-by-nc-sa-4.0"' in card
    assert '"non-commercial"' in card
    assert f"**Not for commercial use.** {NOTICE_LINE[0].upper()}{NOTICE_LINE[1:]}" in card
    assert "| FID | 1.5 | (1) |" in card
    assert "reported: by the authors, as edm2-x-autog-fid; not measured with these files" in card
    assert (folder / "model.safetensors").stat().st_size < 1.05 * model.stat().st_size
    opened = open_pretrained(folder)
    assert (opened.license, opened.sampling.guidance) == (LICENCE, 2.0)
    assert opened.generator.identity() == ImageGenerator.load(model).identity()
    save_pretrained(opened, tmp_path / "again")
    assert (tmp_path / "again" / "LICENSE-NOTICE").exists()
    with pytest.raises(
        ValueError, match=r"under CC BY-NC-SA 4\.0, which cannot be changed to mit: leave it out"
    ):
        save_pretrained(model, tmp_path / "other", license="mit")
    assert not (tmp_path / "other").exists()


def test_a_licence_of_your_own(tmp_path: Path) -> None:
    model = small_model(tmp_path / "m.safetensors")
    folder = save_pretrained(model, tmp_path / "shared", license="apache-2.0")
    assert 'license: "apache-2.0"' in (folder / "README.md").read_text()
    assert open_pretrained(folder).license == "apache-2.0"
    assert "not stated by their author" in model_card(open_pretrained(model), "x")


def measured(folder: Path, model: Path, out: Path) -> Path:
    """A result of `edm2 metrics score` about samples of a model."""
    write_samples(ImageGenerator.load(model), folder, list(range(8)), num_steps=2, quiet=True)
    extractor = {"name": "classifier", "sha256": "ab" * 32, "num_features": 4}
    provenance = provenance_of(open_images(str(folder)).provenance, extractor, keep=0, seed=0)
    provenance["reference"] = {
        "images": {"source": "digits (train)", "num_images": 1797},
        "sha256": "cd" * 32,
    }
    write_result(out, provenance, Scores(frechet=3.25), ["there are 8 images"])
    return out


def test_numbers_come_with_their_provenance(tmp_path: Path) -> None:
    model = small_model(tmp_path / "m.safetensors")
    result = measured(tmp_path / "s", model, tmp_path / "r.json")
    card = (save_pretrained(model, tmp_path / "shared", results=[result]) / "README.md").read_text()
    assert "| Frechet distance | 3.25 | (1) |" in card
    for told in (
        "extractor: classifier (abababababababab), 4 features",
        "images: 8, seeds 0-7",
        "reference: digits (train), 1,797 images",
        "reference's hash: cdcdcdcdcdcdcdcd",
        "sampled with: dpmpp-3m, 2 steps",
        f"edm2 {edm2.__version__}",
        "to be read with care: there are 8 images",
    ):
        assert told in card
    assert open_pretrained(tmp_path / "shared").results[0].value == 3.25


def test_numbers_of_another_model_are_refused(tmp_path: Path) -> None:
    result = measured(tmp_path / "s", small_model(tmp_path / "m.safetensors"), tmp_path / "r.json")
    other = small_model(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(
        ValueError, match=r"about images of model \w+, and this is model \w+: measure this model"
    ):
        save_pretrained(other, tmp_path / "shared", results=[result])
    content = json.loads(result.read_text())
    content["images"]["sampling"] = None
    result.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"r\.json does not say which model made the images"):
        read_results(result)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = small_model(tmp_path / "m.safetensors")
    save_pretrained(model, tmp_path / "shared")
    with pytest.raises(
        FileExistsError, match=r"shared already holds model\.safetensors, config\.json, README\.md"
    ):
        save_pretrained(small_model(tmp_path / "n.safetensors", seed=1), tmp_path / "shared")
    assert ImageGenerator.load(tmp_path / "shared").identity() == ImageGenerator.load(model).identity()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sampling": {"sampler": "os.system"}}, "config.json is damaged .unknown sampler 'os.system'"),
        ({"sampling": {"num_steps": 10**9}}, "num_steps, which is 1000000000, out of range"),
        ({"sampling": {"guidance": math.inf}}, "cannot be read .the number Infinity is not finite"),
        ({"sampling": {"interval": [3, 1]}}, "0 <= low < high must hold"),
        ({"sampling": {"interval": "ab"}}, "config.json is damaged"),
        ({"sampling": {"seed": 1}}, "config.json is damaged .*unexpected keyword argument 'seed'"),
        ({"sampling": None}, "config.json is damaged"),
        (
            {"results": [{"metric": "FID", "value": "1", "provenance": {}}]},
            "is damaged .value, which is a str",
        ),
        ({"results": [{"metric": "FID", "value": 1, "provenance": None}]}, "provenance, which is a NoneType"),
        ({"results": [3]}, "a int where an object is expected"),
        ({"guide": True}, "guide.safetensors does not exist"),
        ({"sampling": {"guidance": 2.0}}, "guidance 2 without a guide: a guide goes with a weight"),
    ],
)
def test_settings_that_were_tampered_with(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    folder = save_pretrained(small_model(tmp_path / "m.safetensors"), tmp_path / "shared")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=told):
        open_pretrained(folder)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(
        ValueError, match="does not hold the settings of a released model: give a file that `edm2 import`"
    ):
        open_pretrained(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"format": "edm2.sampling/1", "model": "m.safetensors"}')
    with pytest.raises(ValueError, match=r"x\.json is damaged \('guide'\): restore it from a copy"):
        open_pretrained(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[" * 200_000)
    with pytest.raises(
        ValueError, match=r"x\.json cannot be read .JSON nested deeper than 100 levels.: restore"
    ):
        open_pretrained(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[")
    with pytest.raises(ValueError, match=r"x\.json cannot be read .*: restore it from a copy"):
        open_pretrained(tmp_path / "x.json")


def test_models_in_memory(tmp_path: Path) -> None:
    generator, guide = small_generator(), small_generator(1, label_dim=0)
    model = Pretrained(generator, guide=guide, sampling=Sampling(guidance=3.0, num_steps=2))
    opened = open_pretrained(save_pretrained(model, tmp_path / "a"))
    assert np.array_equal(opened.images([1]), model.images([1]))
    save_pretrained(generator, tmp_path / "b", license="mit")
    for given in ({"sigma_rel": 0.1}, {"results": ["r.json"]}):
        with pytest.raises(ValueError, match="are for models that are opened here: give a path, or build"):
            save_pretrained(model, tmp_path / "c", **given)
    with pytest.raises(ValueError, match="guidance 1 with a guide: a guide goes with a weight other than 1"):
        Pretrained(generator, guide=guide)
    with pytest.raises(ValueError, match="the guide has images"):
        Pretrained(generator, guide=small_generator(channels=2), sampling=Sampling(guidance=2.0))


def test_a_student_is_shared_with_its_noise_levels(tmp_path: Path) -> None:
    generator = small_generator()
    generator.info = {**generator.info, "consistency": {"teacher": "0123 with EMA 0.1", "sigma_max": 80.0}}
    default = Pretrained(generator)
    assert (default.sampling.sampler, default.sampling.num_steps) == ("consistency", 2)
    model = Pretrained(generator, sampling=Sampling(sampler="consistency", num_steps=2, levels=(1.5,)))
    folder = save_pretrained(model, tmp_path / "student")
    opened = open_pretrained(folder)
    assert opened.sampling == model.sampling
    assert np.array_equal(opened.images(SEEDS), generator.images(SEEDS, levels=(1.5,)))
    assert not np.array_equal(opened.images(SEEDS), default.images(SEEDS))
    # Levels of two steps are not those of three.
    assert np.array_equal(opened.images(SEEDS, num_steps=3), generator.images(SEEDS, num_steps=3))
    card = (folder / "README.md").read_text()
    assert "| Noise levels | 80 1.5 |" in card
    assert "| Distilled from | 0123 with EMA 0.1 |" in card
    main(["sample", str(folder), "--seeds", "0-3", "--out", str(tmp_path / "out.npz")])
    assert np.array_equal(np.load(tmp_path / "out.npz")["arr_0"].transpose(0, 3, 1, 2), opened.images(SEEDS))
    with pytest.raises(ValueError, match="2 noise levels"):
        Sampling(sampler="consistency", num_steps=2, levels=(1.5, 1.0))


def test_a_card_is_safe_from_the_names_in_a_file(tmp_path: Path) -> None:
    denoiser = small_denoiser()
    info = {
        **small_generator().info,
        "class_names": ["a|b", "<script>x</script>", "c\n# d"],
        "data": "x\n---\ny",
    }
    model = save_model(tmp_path / "m.safetensors", denoiser.options, denoiser.state_dict(), info)
    card = model_card(open_pretrained(model), 'a"b')
    assert "<script" not in card
    assert "3 classes: a/b, &lt;script>x&lt;/script>, c # d" in card
    assert "| Trained on | x --- y |" in card


def test_the_card_of_a_latent_model_names_its_autoencoder() -> None:
    card = model_card(Pretrained(small_generator(channels=2, coding=latent_coding())), "x")
    assert "pip install -e '.[cli,hub,latent]'" in card
    assert "Latents are decoded by `stabilityai/sd-vae-ft-mse`; for another autoencoder give `vae=`." in card


def test_settings_are_numbers() -> None:
    with pytest.raises(ValueError, match="guidance inf must be finite"):
        Sampling(guidance=math.inf)


def test_results_are_numbers() -> None:
    with pytest.raises(ValueError, match="result 'FID' has value nan, which must be a finite number"):
        Result(metric="FID", value=math.nan, provenance={})


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "edm2.hub.pipeline", raising=False)
    with pytest.raises(MissingExtra, match=r"needs the package 'huggingface_hub', .*\.\[hub\]"):
        importlib.import_module("edm2.hub.pipeline")


def test_edm2_sample_uses_the_saved_settings(
    tuned_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_pretrained(tuned_run, tmp_path / "shared")
    words = ["--device", "cpu", "--seeds", "0-3", "--grid", "0", "--out"]
    main(["sample", str(folder), *words, str(tmp_path / "s")])
    assert (
        f"guidance 1.5 by guide.safetensors; to choose your own, sample {folder / 'model.safetensors'}"
        in (capsys.readouterr().err)
    )
    made = read_images([tmp_path / "s" / f"{seed:06d}.png" for seed in SEEDS])
    assert np.array_equal(made, open_pretrained(folder).images(SEEDS))
    main(["sample", str(folder / "model.safetensors"), *words, str(tmp_path / "plain")])
    record = json.loads((tmp_path / "plain" / "samples.json").read_text())
    assert (record["guide"], record["sampler"]["name"]) == (None, "dpmpp-3m")
    main(["sample", str(folder), "--num-steps", "2", "--sampler", "euler", *words, str(tmp_path / "other")])
    record = json.loads((tmp_path / "other" / "samples.json").read_text())
    assert (record["sampler"]["guidance"], record["sampler"]["name"], record["sampler"]["num_steps"]) == (
        1.5,
        "euler",
        2,
    )


def test_edm2_sample_takes_the_settings_of_a_released_model(tmp_path: Path) -> None:
    model, guide = (released_model(tmp_path / f"{n}.safetensors", seed=n) for n in (1, 2))
    setting = tmp_path / "x.json"
    content = {"format": "edm2.sampling/1", "preset": "x", "model": model.name, "guide": guide.name}
    write_json(setting, {**content, "guidance": 2.0, "reported": {"metric": "FID", "value": 1.5}})
    words = ["--device", "cpu", "--seeds", "0", "--num-steps", "2", "--out", str(tmp_path / "s")]
    main(["sample", str(setting), *words])
    made = ImageGenerator.load(model).images(
        [0], sampler="heun", num_steps=2, guide=ImageGenerator.load(guide), guidance=2.0
    )
    assert np.array_equal(read_images([tmp_path / "s" / "000000.png"]), made)
