"""What the studio shows: the images of `edm2 sample`, from memory, and paths and curves of any setting."""

import json
import math
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from edm2.cli import main
from edm2.generate import read_images
from edm2.hub import open_pretrained
from edm2.report import image_grid
from edm2.report.grids import png_bytes
from edm2.studio import pictures, workbench
from edm2.studio.choices import Choice, number
from edm2.studio.workbench import Workbench
from edm2.tuning.result import Knobs

# The tiny run was trained with all labels.
pytestmark = pytest.mark.filterwarnings("ignore:the model was not trained with missing labels")


@pytest.fixture(scope="module")
def bench(digits_run, tmp_path_factory):
    """A copy of the tiny run, and one of its models as another guide."""
    run = tmp_path_factory.mktemp("studio") / "a run"
    shutil.copytree(digits_run, run)
    return Workbench(run, run / "model.safetensors")


def choice(bench, **changes):
    return Choice(**{"sigma_rel": 0.1, "num_images": bench.times[-1], "num_steps": 4, "count": 3, **changes})


CHOICES = {
    "plain": {},
    "another length, moment and class": {"sigma_rel": 0.075, "num_images": 48.0, "label": 7, "sampler": "heun"},
    "an earlier moment": {
        "guide": "earlier", "guide_sigma_rel": 0.05, "guide_images": 32.0, "guidance": 1.75, "interval": (0.1, 5.0),
    },
    "itself without labels": {"guide": "without labels", "guidance": 0.5, "first_seed": 5, "count": 1},
    "another model": {"guide": "other", "guidance": 2.0, "interval": (0.05, math.inf), "sampler": "dpmpp-2m-sde"},
    "a guide of weight 1": {"guide": "earlier", "guidance": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_the_command_makes_the_same_bits(bench, name, tmp_path):
    chosen = choice(bench, **CHOICES[name])
    shown = bench.images(chosen)
    words = shlex.split(chosen.command(bench.run, bench.other_path, out=str(tmp_path / "made")))
    main(words[1:])
    made = read_images([tmp_path / "made" / f"{seed:06d}.png" for seed in chosen.seeds])
    assert np.array_equal(made, shown)


def test_settings_change_the_images(bench):
    images = [bench.images(choice(bench, **changes)).tobytes() for changes in CHOICES.values()]
    assert len(set(images)) == len(images) - 1  # weight 1 is no guidance
    assert images[0] == images[-1]


def test_numbers_as_text_are_exact():
    assert [number(x) for x in (3.0, 0.1 + 0.2, math.inf)] == ["3", "0.30000000000000004", "inf"]
    assert [float(number(x)) for x in (0.1 + 0.2, 44000.0, 1 / 3)] == [0.1 + 0.2, 44000.0, 1 / 3]


def test_path_ends_in_the_image(bench):
    chosen = choice(bench, num_steps=5)
    path = bench.path(chosen)
    assert [round(sigma, 3) for sigma, _ in path][::4] == [80.0, 0.002]
    assert len(path) == 5
    assert np.abs(path[-1][1].astype(int) - bench.images(chosen)[0]).max() <= 1


def test_models_are_kept_but_not_all_of_them(bench):
    assert bench.model(0.1, 64.0) is bench.model(0.1, 64.0)
    for length in np.linspace(0.05, 0.1, 13):
        bench.model(float(length), 64.0)
    assert len(bench._models) <= 12


def test_curves_mark_the_setting(bench, monkeypatch):
    chosen = choice(bench, guide="earlier", guide_images=32.0, guidance=2.0, interval=(0.1, 5.0))
    assert bench.profile(chosen).axes
    plain, shaded = (bench.noise(c).axes[0] for c in (choice(bench), chosen))
    assert len(shaded.patches) == len(plain.patches) + 1
    assert bench.tuning(chosen) == []  # not tuned


def test_without_the_data_there_is_no_loss_by_noise_level(bench, monkeypatch):
    def gone(run):
        raise FileNotFoundError(run)

    monkeypatch.setattr(workbench, "open_run_data", gone)
    assert Workbench(bench.run).noise(choice(bench)) is None


def test_saved_settings_are_used_again(bench, tmp_path):
    chosen = choice(
        bench, guide="earlier", guide_sigma_rel=0.05, guide_images=32.0, guidance=1.5, interval=(0.1, 9.0)
    )
    folder = bench.save(chosen, "best_one")
    assert folder == bench.run / "studio" / "best_one"
    assert np.array_equal(open_pretrained(folder).images(list(chosen.seeds)), bench.images(chosen))
    with pytest.raises(FileExistsError):
        bench.save(chosen, "best_one")
    for name in ("", "../x", "a/b", "a" * 65, ".hidden", "a\n"):
        with pytest.raises(ValueError, match="use 1 to 64 letters, digits, - and _"):
            bench.save(chosen, name)
    with pytest.raises(ValueError, match="a guide without labels has no file of its own"):
        bench.save(choice(bench, guide="without labels", guidance=2.0), "other")


def test_the_page_starts_with_what_tuning_found(bench, monkeypatch):
    plain = bench.first_choice()
    assert (plain.sigma_rel, plain.num_images, plain.guide, plain.guide_images) == (0.1, 64.0, "none", 32.0)
    knobs = Knobs(sigma_rel=0.085, guide_images=16.0, guide_sigma_rel=0.05, guidance=1.4, interval=(0.1, 3.0))
    tuned = SimpleNamespace(best=knobs, is_better=True, sampler="heun", num_steps=7)
    monkeypatch.setattr(workbench, "read_tuned", lambda run: tuned)
    found = bench.first_choice()
    assert found.command(bench.run).endswith(
        "--ema 0.085 --ema-images 64 --guide-ema 0.05 --guide-images 16 --guidance 1.4 --interval 0.1 3 "
        "--sampler heun --num-steps 7 --seeds 0-15 --out samples"
    )
    tuned.best = Knobs(sigma_rel=0.085)
    assert (bench.first_choice().sigma_rel, bench.first_choice().guide) == (0.085, "none")
    tuned.is_better = False
    assert bench.first_choice() == plain


def test_a_run_under_way(digits_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(digits_run, run)
    manifest = json.loads((run / "snapshots" / "manifest.json").read_text())
    bench = Workbench(run)
    assert bench.status == "finished after 64 training images"
    assert bench.times == sorted({s["t"] for s in manifest["snapshots"]})
    bench.settings["num_images"] = 128
    assert bench.status == "finished after 64 training images"  # stopped early, with a model of its end
    (run / "model.safetensors").unlink()
    assert bench.status == "still training: the newest snapshot is of 64 of 128 images"


def test_what_is_no_run_is_refused(digits_run, bench, tmp_path):
    with pytest.raises(ValueError, match=r"is not a training run: config\.json is missing"):
        Workbench(tmp_path)
    with pytest.raises(ValueError, match="no other model was given: start the studio with --guide"):
        Workbench(bench.run).images(choice(bench, guide="other", guidance=2.0))


def test_command_without_a_run_or_a_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["studio"])
    assert (
        "there is no demo in runs/demo/run: name a run's folder, or run `edm2 demo` first"
        in capsys.readouterr().err
    )


def test_a_port_that_cannot_be_listened_on(digits_run, monkeypatch, capsys):
    def serve(*_, **__):
        raise OSError("in use")

    pytest.importorskip("gradio")
    monkeypatch.setattr("edm2.studio.page.build", lambda *_, **__: None)
    monkeypatch.setattr("edm2.studio.page.serve", serve)
    for port, told in (
        (99999, "must be from 1 to 65535"),
        (80, "cannot be listened on (in use): choose another"),
    ):
        with pytest.raises(SystemExit):
            main(["studio", str(digits_run), "--port", str(port)])
        assert f"--port {port} {told}" in capsys.readouterr().err


def test_pictures_are_inside_the_page(bench):
    images = bench.images(choice(bench))
    text = pictures.tiles(images, ["a", "<b>", "c"])
    assert text.count("data:image/png;base64,") == 3
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert 'class="tiles images crisp"' in text
    assert png_bytes(image_grid(images[:1], columns=1))[:4] == b"\x89PNG"
    assert pictures.problem(ValueError("<x>")) == '<p class="problem" role="alert">&lt;x&gt;</p>'


def test_a_model_too_large_for_the_memory_is_refused_before_it_is_read(digits_run, monkeypatch, capsys):
    bench = Workbench(digits_run)
    bench.images(choice(bench))
    monkeypatch.setattr(workbench, "free_memory", lambda: 1000)
    with pytest.raises(
        ValueError, match=r"the model needs 0\.0 GB of memory, and 0\.0 GB are free: close other"
    ):
        bench.images(choice(bench, sigma_rel=0.08))
    with pytest.raises(SystemExit):
        main(["studio", str(digits_run)])
    assert "error: the model needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "told"), [("can't allocate memory", ValueError), ("another", RuntimeError)]
)
def test_images_too_large_for_the_memory(bench, monkeypatch, message, told):
    def images(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr("edm2.generate.ImageGenerator.images", images)
    with pytest.raises(told, match=r"another|do not fit into memory: choose fewer of them"):
        bench.images(choice(bench))
