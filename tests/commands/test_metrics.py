import contextlib
import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from crashes import check_every_interruption
from PIL import Image

from edm2.cli import main
from edm2.commands import metrics
from edm2.evaluation import find_cautions
from edm2.evaluation.images import open_images, seed_text
from edm2.hub.results import read_results
from edm2.metrics import FeatureStatistics, InceptionFeatures, Reference, fit_classifier, frechet_distance

SHAPE = (1, 8, 8)
SAMPLING = {"labels": "seed modulo classes", "model": {"run_id": "r"}, "sampler": {"num_steps": 4}}


def run(*words):
    """Run a command; gives its warnings, which go to standard error."""
    errors = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(errors):
        warnings.simplefilter("always", UserWarning)
        main([str(word) for word in words])
    mark = "edm2: warning: "
    return [line.removeprefix(mark) for line in errors.getvalue().splitlines() if line.startswith(mark)]


def fails(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 2
    return capsys.readouterr().err


def write_images(folder, count, *, shape=SHAPE, seed=0, first=0):
    folder.mkdir()
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    for i, image in enumerate(images):
        array = image[0] if shape[0] == 1 else image.transpose(1, 2, 0)
        Image.fromarray(array).save(folder / f"{first + i:06d}.png")
    return images


@pytest.fixture(scope="module")
def digits_ref(tmp_path_factory):
    path = tmp_path_factory.mktemp("ref") / "digits.safetensors"
    run("metrics", "ref", "digits", "--out", path)
    return path


@pytest.fixture
def samples(tmp_path):
    write_images(tmp_path / "samples", 40, first=100)
    Image.new("L", (99, 70)).save(tmp_path / "samples" / "grid.png")
    (tmp_path / "samples" / "samples.json").write_text(json.dumps(SAMPLING))
    return tmp_path / "samples"


def test_real_digits_score_better_than_noise(digits_ref, samples, tmp_path, capsys):
    found = run(
        "metrics", "score", "digits", "--split", "test", "--ref", digits_ref, "--out", tmp_path / "real.json"
    )
    run("metrics", "score", samples, "--ref", digits_ref)
    real, noise = (
        json.loads(path.read_text()) for path in (tmp_path / "real.json", tmp_path / "samples.metrics.json")
    )
    assert real["scores"]["frechet_distance"] < 3 < 20 < noise["scores"]["frechet_distance"]
    assert real["scores"]["precision"] > 0.7 > 0.3 > noise["scores"]["precision"]
    assert real["scores"]["kernel_distance"] < noise["scores"]["kernel_distance"]
    assert real["scores"]["coverage"] > noise["scores"]["coverage"]
    assert any("359 images, fewer than 640" in text for text in found)
    assert found == real["warnings"]
    out = capsys.readouterr().out
    assert f"{noise['scores']['frechet_distance']:.6g}" in out
    assert "extractor  classifier" in out


def test_provenance_is_whole(digits_ref, samples):
    run("metrics", "score", samples, "--ref", digits_ref)
    result = json.loads((samples.parent / "samples.metrics.json").read_text())
    assert result["images"]["num_images"] == 40
    assert result["images"]["seeds"] == "100-139"
    assert result["images"]["sampling"] == SAMPLING
    assert result["images"]["class_counts"] == [4] * 10
    assert result["images"]["shape"] == [1, 8, 8]
    reference = Reference.load(digits_ref)
    assert result["reference"]["sha256"] == reference.sha256
    assert result["reference"]["images"]["num_images"] == 1438
    assert result["extractor"] == reference.provenance["extractor"]
    assert "scaled to [-1, 1]" in result["extractor"]["resize"]
    assert result["versions"]["torch"] == torch.__version__
    few, small_subsets = result["warnings"]
    assert "there are 40 images for 64 features" in few
    assert "subsets of the kernel distance have 40 images" in small_subsets


def test_the_same_again_is_kept_and_anything_else_refused(digits_ref, samples, tmp_path, capsys):
    run("metrics", "score", samples, "--ref", digits_ref)
    out = tmp_path / "samples.metrics.json"
    before = out.read_bytes()
    capsys.readouterr()
    run("metrics", "score", samples, "--ref", digits_ref)
    assert "already" in capsys.readouterr().out
    error = fails(capsys, "metrics", "score", samples, "--ref", digits_ref, "--seed", 1)
    assert "holds numbers of other settings (settings.seed differ): choose another --out" in error
    out.with_name("other.json").write_text("[" * 200_000)
    error = fails(capsys, "metrics", "score", samples, "--ref", digits_ref, "--out", tmp_path / "other.json")
    assert "is not a result of `edm2 metrics` (JSON nested deeper than 100 levels)" in error
    out.with_name("other.json").write_text("{}")
    error = fails(capsys, "metrics", "score", samples, "--ref", digits_ref, "--out", tmp_path / "other.json")
    assert "is not a result of `edm2 metrics`" in error
    assert out.read_bytes() == before
    assert (tmp_path / "other.json").read_text() == "{}"


def test_a_reference_is_kept_and_never_overwritten(digits_ref, capsys):
    before = digits_ref.read_bytes()
    capsys.readouterr()
    run("metrics", "ref", "digits", "--out", digits_ref)
    assert "holds this reference already" in capsys.readouterr().out
    error = fails(capsys, "metrics", "ref", "digits", "--out", digits_ref, "--split", "test")
    assert "holds a reference of other settings (images." in error
    assert digits_ref.read_bytes() == before


def test_a_reference_is_not_put_beside_a_stranger(tmp_path, capsys):
    (tmp_path / "r-classifier.safetensors").write_bytes(b"mine")
    error = fails(capsys, "metrics", "ref", "digits", "--out", tmp_path / "r.safetensors")
    assert "r-classifier.safetensors exists and is another classifier: use it with --weights" in error
    for name in ("r", "r.npz", "r.pkl"):
        error = fails(capsys, "metrics", "ref", "digits", "--out", tmp_path / name)
        assert f"{name} must end in .safetensors" in error
    assert [path.name for path in tmp_path.iterdir()] == ["r-classifier.safetensors"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ref_and_score_go_on_after_any_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr("edm2.evaluation.comparison.fit_classifier", partial(fit_classifier, num_steps=1))
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    write_images(tmp_path / "samples", 40)

    def work(root):
        out, numbers = str(root / "r.safetensors"), str(root / "r.json")
        metrics.ref("ref", ["digits", "--out", out])
        metrics.score("score", [str(tmp_path / "samples"), "--ref", out, "--out", numbers])

    (tmp_path / "warm").mkdir()
    work(tmp_path / "warm")  # what loads late is loaded here, not in every child
    assert check_every_interruption(tmp_path, work, kinds=("kill", "names lost", "no space")) > 10


def test_small_sets_have_no_spread(digits_ref, samples, tmp_path, capsys):
    classifier = digits_ref.with_name("digits-classifier.safetensors")
    write_images(tmp_path / "real", 40, seed=1)
    out = tmp_path / "c.json"
    run("metrics", "compare", tmp_path / "real", samples, "--weights", classifier, "--out", out)
    assert json.loads(out.read_text())["scores"]["kernel_distance_spread"] is None
    assert "no spread: both sets are so small" in capsys.readouterr().out


def test_the_same_reference_is_the_same_file(digits_ref, tmp_path):
    again = tmp_path / digits_ref.name
    run("metrics", "ref", "digits", "--out", again)
    assert again.read_bytes() == digits_ref.read_bytes()
    name = "digits-classifier.safetensors"
    assert (tmp_path / name).read_bytes() == digits_ref.with_name(name).read_bytes()


def test_compare_images_references_and_results(digits_ref, samples, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    classifier = digits_ref.with_name("digits-classifier.safetensors")
    run("metrics", "score", samples, "--ref", digits_ref)
    run("metrics", "compare", digits_ref, samples)
    run("metrics", "compare", "digits", samples, "--weights", classifier, "--out", "c.json")
    paths = (tmp_path / name for name in ("samples.metrics.json", "digits-vs-samples.metrics.json", "c.json"))
    scored, by_reference, by_images = (json.loads(path.read_text()) for path in paths)
    assert scored["scores"] == by_reference["scores"]
    assert scored["scores"] == pytest.approx(by_images["scores"], rel=1e-9)
    capsys.readouterr()
    assert run("metrics", "compare", "samples.metrics.json", "digits-vs-samples.metrics.json") == []
    assert "other settings" not in capsys.readouterr().out
    run("metrics", "score", "digits", "--split", "test", "--ref", digits_ref, "--out", "real.json")
    found = run("metrics", "compare", "samples.metrics.json", "real.json")
    assert found == ["these numbers cannot be compared: images.num_images differ between them"]
    error = fails(capsys, "metrics", "compare", "c.json", "digits")
    assert "compare a result (.json) with another result" in error


def test_two_references_need_no_extractor(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, mean in (("a", 0.0), ("b", 3.0)):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(4, mean), sigma=np.eye(4))
    run("metrics", "compare", "a.npz", "b.npz")
    result = json.loads((tmp_path / "a-vs-b.metrics.json").read_text())
    assert result["scores"]["frechet_distance"] == pytest.approx(36)
    assert "extractor  inception (weights not known), 4 features" in capsys.readouterr().out
    np.savez(tmp_path / "c.npz", mu=np.zeros(3), sigma=np.eye(3))
    error = fails(capsys, "metrics", "compare", "a.npz", "c.npz")
    assert "a.npz was measured by an extractor of num_features 4, and this one's is 3" in error


def test_an_official_reference_is_read_and_not_run(samples, tmp_path, capsys):
    path, sha256 = scripted(tmp_path / "inception.pt")
    features = (
        InceptionFeatures(path, sha256=sha256)
        .features(np.random.default_rng(5).integers(0, 256, (500, 1, 8, 8), dtype=np.uint8))
        .double()
        .numpy()
    )
    moments = {"mu": features.mean(0), "sigma": np.cov(features.T)}
    official = tmp_path / "ref.pkl"
    official.write_bytes(pickle.dumps({"fid": moments, "num_images": 500}))
    np.savez(tmp_path / "ref.npz", **moments)
    options = ("--weights", path, "--weights-sha256", sha256)
    found = run("metrics", "score", samples, "--ref", official, *options)
    result = json.loads((tmp_path / "samples.metrics.json").read_text())
    images = InceptionFeatures(path, sha256=sha256).features(
        open_images(str(samples)).dataset.images(np.arange(40))
    )
    made = FeatureStatistics()
    made.update(images)
    expected = frechet_distance(
        made, FeatureStatistics.from_moments(moments["mu"], moments["sigma"], num_images=500)
    )
    assert result["scores"]["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert result["scores"]["kernel_distance"] is None
    assert any("gray and inception was trained on photos" in text for text in found)
    assert "needs the features of single images" in capsys.readouterr().out
    run("metrics", "score", samples, "--ref", tmp_path / "ref.npz", "--out", tmp_path / "n.json", *options)
    by_npz = json.loads((tmp_path / "n.json").read_text())
    assert by_npz["scores"]["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert by_npz["reference"]["images"]["num_images"] is None
    assert "number not known" in capsys.readouterr().out
    words = ("metrics", "score", samples, "--ref", official)
    assert "does not hold fd_dinov2, only fid" in fails(capsys, *words, "--metric", "fd_dinov2")
    error = fails(capsys, *words, "--out", tmp_path / "new.json")
    assert "inception needs its weights: get the TorchScript file" in error
    assert "as --weights and --weights-sha256" in error
    error = fails(capsys, *words, "--weights", path)
    assert "TorchScript, which contains code that runs: give the sha256" in error
    official.write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    assert "error" in fails(capsys, *words, "--weights", path)
    assert not (tmp_path / "ran").exists()


def test_an_imported_reference_gives_the_numbers_of_the_official_file(samples, tmp_path, capsys):
    path, sha256 = scripted(tmp_path / "inception.pt")
    features = InceptionFeatures(path, sha256=sha256).features(
        np.random.default_rng(5).integers(0, 256, (500, 1, 8, 8), dtype=np.uint8)
    )
    features = features.double().numpy()
    moments = {"mu": features.mean(0), "sigma": np.cov(features.T)}
    other = {"mu": np.zeros(7), "sigma": np.eye(7)}
    official, imported = tmp_path / "ref.pkl", tmp_path / "made" / "ref.safetensors"
    official.write_bytes(pickle.dumps({"fid": moments, "fd_dinov2": other, "num_images": 500}))
    run("import", official, "--out", imported.parent)
    options = ("--weights", path, "--weights-sha256", sha256)
    results = []
    for ref in (official, imported):
        out = tmp_path / f"{ref.suffix[1:]}.json"
        run("metrics", "score", samples, "--ref", ref, "--out", out, *options)
        results.append(json.loads(out.read_text()))
    assert results[0]["scores"] == results[1]["scores"]
    assert results[1]["reference"]["images"] == {"num_images": 500, "source": "ref.safetensors (fid)"}
    assert results[1]["reference"]["sha256"] == hashlib.sha256(imported.read_bytes()).hexdigest()
    out = tmp_path / "compared.json"
    run("metrics", "compare", official, imported, "--out", out)
    assert json.loads(out.read_text())["scores"]["frechet_distance"] == pytest.approx(0, abs=1e-6)
    words = ("metrics", "score", samples, "--ref", imported, "--out", tmp_path / "new.json")
    error = fails(capsys, *words, "--metric", "kid")
    assert "does not hold kid, only fd_dinov2, fid" in error
    error = fails(capsys, *words, "--metric", "fd_dinov2", "--extractor", "inception", *options)
    assert "was measured by dinov2: leave --extractor inception out" in error
    np.savez(tmp_path / "only.npz", **moments)
    run("import", tmp_path / "only.npz", "--out", tmp_path / "npz")
    run("metrics", "compare", tmp_path / "npz" / "only.safetensors", imported, "--out", tmp_path / "npz.json")
    imported.write_bytes(imported.read_bytes()[:-9])
    assert "ref.safetensors is not a reference file of edm2" in fails(capsys, *words)


def test_weights_from_an_address_need_their_hash(samples, tmp_path, capsys, monkeypatch):
    path, sha256 = scripted(tmp_path / "inception.pt")
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2), sigma=np.eye(2))
    asked = []

    def fetch(name, source, folder, *, sha256):
        asked.append((name, source, sha256))
        return path

    monkeypatch.setattr("edm2.evaluation.extractors.fetch", fetch)
    words = (
        "metrics",
        "score",
        samples,
        "--ref",
        tmp_path / "ref.npz",
        "--weights",
        "https://host/a/inception.pt",
    )
    assert "is downloaded only if its hash is known" in fails(capsys, *words)
    assert asked == []
    run(*words, "--weights-sha256", sha256)
    assert asked == [("inception.pt", "https://host/a", sha256)]
    assert (tmp_path / "samples.metrics.json").exists()


def scripted(path):
    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.to(torch.float32)
            return torch.cat([x.mean(dim=(2, 3)), x[:, :, 0, 0]], dim=1)[:, 2:4]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        torch.jit.save(torch.jit.script(Network()), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_bad_input_ends_before_any_work(digits_ref, samples, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("edm2.evaluation.comparison.measure_images", lambda *_, **__: pytest.fail("worked"))
    few = tmp_path / "few"
    write_images(few, 5)
    assert "few holds 5 images: at least 6 are needed" in fails(
        capsys, "metrics", "score", few, "--ref", digits_ref
    )
    wide = tmp_path / "wide"
    write_images(wide, 8, shape=(1, 8, 9))
    error = fails(capsys, "metrics", "score", wide, "--ref", digits_ref)
    assert "the classifier was trained on [1, 8, 8]" in error
    latents = tmp_path / "latents.npy"
    np.save(latents, np.zeros((8, 4, 8, 8), np.float32))
    error = fails(capsys, "metrics", "score", latents, "--ref", digits_ref)
    assert "are float32, not uint8: extractors see pictures, so decode latents first" in error
    error = fails(capsys, "metrics", "ref", wide, "--out", tmp_path / "r.safetensors")
    assert "has no classes to train a classifier on: give --extractor inception" in error
    error = fails(capsys, "metrics", "score", samples, "--ref", tmp_path / "none.safetensors")
    assert "there is no reference file" in error
    error = fails(capsys, "metrics", "score", samples, "--ref", digits_ref, "--extractor", "dinov2")
    assert "was measured by classifier: leave --extractor dinov2 out" in error
    error = fails(capsys, "metrics", "score", samples, "--ref", digits_ref, "--metric", "fid")
    assert "is of one extractor: leave --metric fid out" in error
    error = fails(capsys, "metrics", "score", samples, "--ref", digits_ref, "--weights", tmp_path / "no")
    assert "there is no classifier at" in error
    error = fails(capsys, "metrics", "score", "hf://name", "--ref", digits_ref)
    assert "the numbers cannot be written next to hf://name: give --out with a file" in error
    assert "which extractor? give --extractor" in fails(capsys, "metrics", "compare", wide, samples)
    assert "--batch 0 must be at least 1" in fails(capsys, "metrics", "compare", wide, samples, "--batch", 0)
    error = fails(capsys, "metrics", "compare", wide, samples, "--keep", 3)
    assert "--keep 3 must be 0 or at least 6" in error
    (samples / "samples.json").write_text("{")
    assert "samples.json is damaged" in fails(capsys, "metrics", "score", samples, "--ref", digits_ref)
    assert not list(tmp_path.glob("*.metrics.json"))


def test_a_classifier_of_another_training_is_refused(digits_ref, samples, tmp_path, capsys):
    images = np.zeros((4, *SHAPE), np.uint8)
    other = tmp_path / "b-classifier.safetensors"
    fit_classifier(images, np.arange(4) % 2, num_classes=2, num_steps=1).save(other)
    error = fails(capsys, "metrics", "score", samples, "--ref", digits_ref, "--weights", other)
    assert "was measured by an extractor of sha256" in error
    assert "features of two extractors cannot be compared" in error
    error = fails(
        capsys, "metrics", "score", samples, "--ref", digits_ref, "--weights", other, "--weights-sha256", "00"
    )
    assert "not 00: it is damaged or another file" in error
    reference = Reference.load(digits_ref)
    mine = Reference(
        statistics=reference.statistics,
        features=reference.features,
        provenance={"extractor": {"name": "mine"}, "images": {"source": "x"}},
    )
    mine.save(tmp_path / "mine.safetensors")
    error = fails(capsys, "metrics", "score", samples, "--ref", tmp_path / "mine.safetensors")
    assert "was measured by 'mine', which only its owner's code can load: use edm2.metrics.score" in error
    Reference(statistics=reference.statistics, features=reference.features).save(
        tmp_path / "nameless.safetensors"
    )
    error = fails(capsys, "metrics", "score", samples, "--ref", tmp_path / "nameless.safetensors")
    assert "does not say what was measured, and how: make it with `edm2 metrics ref`" in error


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(digits_ref, samples, tmp_path):
    run("metrics", "score", samples, "--ref", digits_ref, "--keep", 30)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "edm2"]
    words = ["metrics", "score", samples, "--ref", digits_ref, "--keep", "30", "--out", tmp_path / "two.json"]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("samples.metrics.json", "two.json"))
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-9)
    assert two["warnings"] == one["warnings"]
    assert done.stdout.count("frechet distance") == 1


def test_cautions():
    extractor = {"name": "dinov2", "num_features": 1024}
    images = {"num_images": 1000, "shape": [1, 32, 32], "fingerprint": "a", "class_counts": [500, 500]}
    reference = {"num_images": 60_000, "shape": [3, 64, 64], "fingerprint": "a", "class_counts": [75, 25]}
    found = find_cautions(images, reference, extractor)
    for text, part in zip(
        found,
        [
            "there are 1,000 images for 1,024 features: covariances are singular",
            "gray and dinov2 was trained on photos",
            "the images are 32x32x1 and the reference's 64x64x3",
            "the images are the reference's own",
            "25% of the images would need another class",
        ],
        strict=True,
    ):
        assert part in text
    enough = {"num_images": 50_000, "shape": [3, 64, 64], "fingerprint": "b", "class_counts": [750, 251]}
    assert find_cautions(enough, reference, extractor) == []
    few = find_cautions(enough, {"num_images": 49_999}, extractor)
    assert few == [
        "the reference is of 49,999 images, fewer than 50,000: the Frechet distance is too large; compare it only with "
        "one of as many images"
    ]


def test_seed_text():
    assert seed_text([3, 1, 2, 7, 9, 10]) == "1-3,7,9-10"


def test_copies_are_found_and_told(digits_ref, tmp_path, capsys):
    copied = write_images(tmp_path / "made", 12, seed=3)
    np.save(tmp_path / "training.npy", np.concatenate([copied, copied[::-1, :, ::-1]]))
    score = ("metrics", "score", tmp_path / "made", "--ref", digits_ref, "--out", tmp_path / "numbers.json")
    told = run(*score, "--training", tmp_path / "training.npy", "--held-out", "digits")
    assert any(text.startswith("the model copies its training images: 100% of the samples") for text in told)
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert (found["scores"]["nearer_than_held_out"], found["scores"]["authentic"]) == (1.0, 0.0)
    assert found["copies"]["held_out"]["num_images"] == 359  # the split test
    assert any("copies its training images" in text for text in found["warnings"])
    assert "nearer than held out                    1" in capsys.readouterr().out
    with Image.open(tmp_path / "numbers.copies.png") as picture:
        assert picture.size[0] > 12 * 64
    assert run(*score, "--training", tmp_path / "training.npy", "--held-out", "digits") == []  # from the file
    assert "nearer than held out                    1" in capsys.readouterr().out
    err = fails(capsys, *score, "--held-out", "digits")
    assert "--held-out digits is for the check for copies: give --training, too" in err


def test_a_random_subset(digits_ref, samples, tmp_path, capsys):
    words = ("metrics", "score", samples, "--ref", digits_ref, "--num", 20)
    results = {}
    for name, more in {"a": (), "same": (), "other": ("--seed", 5)}.items():
        run(*words, *more, "--out", tmp_path / f"{name}.json")
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
    images = results["a"]["images"]
    assert (images["num_images"], images["chosen_from"], images["choice_seed"]) == (20, 40, 0)
    assert sum(images["class_counts"]) == 20
    assert results["a"]["scores"] == results["same"]["scores"]
    assert results["a"]["scores"]["frechet_distance"] != results["other"]["scores"]["frechet_distance"]
    chosen = open_images(str(samples), count=20, seed=0)
    picked = write_images(tmp_path / "again", 40)[chosen.dataset.rows]
    assert np.array_equal(chosen.dataset.images(np.arange(20)), picked)
    for count in (5, 41):
        assert f"--num {count} must be from 6 to 40, the number of images of" in fails(
            capsys, *words[:-1], count
        )


def test_a_model_is_measured_without_saving_its_images(digits_run, digits_ref, tmp_path, capsys):
    """The numbers are those of the images that `edm2 sample` writes."""
    run_folder = shutil.copytree(digits_run, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    run("metrics", "score", run_folder, "--ref", digits_ref, "--num", 12)
    assert before == {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    run("sample", run_folder, "--seeds", "0-11", "--out", tmp_path / "saved")
    run("metrics", "score", tmp_path / "saved", "--ref", digits_ref)
    straight, saved = (
        json.loads((tmp_path / f"{name}.metrics.json").read_text()) for name in ("run", "saved")
    )
    assert straight["scores"] == saved["scores"]
    for key in ("seeds", "class_counts", "shape", "num_images"):
        assert straight["images"][key] == saved["images"][key]
    made_with = {"made_with": saved["images"]["sampling"]["made_with"]}
    assert straight["images"]["sampling"] | made_with == saved["images"]["sampling"]
    assert read_results(tmp_path / "run.metrics.json")[0].digest is not None
    (run_folder / "model.safetensors").unlink()
    words = ("metrics", "score", run_folder, "--ref", digits_ref, "--num", 12, "--out", tmp_path / "ema.json")
    assert "is an unfinished run" in fails(capsys, *words)
    run(*words, "--ema", 0.07)
    assert json.loads((tmp_path / "ema.json").read_text())["images"]["sampling"]["model"]["sigma_rel"] == 0.07
    assert "--num 3 must be at least 6" in fails(capsys, *words[:6], 3, "--ema", 0.07)
    assert "--ema 0.07 is for a run, and" in fails(
        capsys, "metrics", "score", tmp_path / "saved", "--ref", digits_ref, "--ema", 0.07
    )
