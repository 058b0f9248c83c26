"""`edm2 import`: official files become ours, with their licence; nothing is overwritten."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edm2.cli import main
from edm2.diffusion import load_model
from edm2.ema import reconstruct
from edm2.ema.storage.manifest import read_manifest
from edm2.generate import ImageGenerator, reconstruct_models
from edm2.interop.convert import import_named, import_path, import_preset
from edm2.interop.nvlabs import load_network, open_snapshots, read_reference_statistics
from edm2.interop.released import sampling_preset


@pytest.fixture
def release(official: Any, tiny_state: dict[str, Tensor], tmp_path: Path) -> Path:
    """A folder that holds the networks of two published settings, in miniature."""
    folder = tmp_path / "release"
    folder.mkdir()
    for name in ("edm2-img64-s-autog-fid", "edm2-img64-s-fid"):
        preset = sampling_preset(name)
        for network in filter(None, (preset.network, preset.guide)):
            state = {n: x if x.ndim else x + network.sigma_rel * 10 for n, x in tiny_state.items()}
            official.write(folder / str(network), official.network(state, official.tiny))
    return folder


def test_network_becomes_a_model_file(golden_network: Path, tmp_path: Path) -> None:
    imported = import_path(golden_network, tmp_path)
    assert imported.path == tmp_path / "network-snapshot-0000008-0.050.safetensors"
    assert imported.found.startswith(
        "network of 45,763 parameters for 3 x 8 x 8, 4 classes, after 8,192 images, EMA"
    )
    model, info = load_model(imported.path)
    expected = load_network(golden_network).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
    assert (info["sigma_rel"], info["num_images"], info["license"]) == (0.05, 8192, "CC BY-NC-SA 4.0")
    sha256 = hashlib.sha256(golden_network.read_bytes()).hexdigest()
    assert info["source"] == {"file": golden_network.name, "sha256": sha256}
    assert "NonCommercial" in (tmp_path / "LICENSE-NOTICE").read_text()
    assert b"never be executed" not in imported.path.read_bytes()


def test_imported_pixels_are_sampled_in_bytes(golden_network: Path, tmp_path: Path) -> None:
    generator = ImageGenerator.load(import_path(golden_network, tmp_path).path)
    images = generator.images([0, 1], num_steps=2)
    assert (images.shape, images.dtype) == ((2, 3, 8, 8), np.uint8)


def test_latents_are_coded_as_the_released_models_expect(official: Any, tmp_path: Path) -> None:
    from edm2.diffusion import build_denoiser

    kwargs = {**official.tiny, "img_channels": 4}
    state = build_denoiser(**kwargs).state_dict()
    path = official.write(tmp_path / "net.pkl", official.network(state, kwargs), encoder="SomeVAEEncoder")
    generator = ImageGenerator.load(import_path(path, tmp_path / "out").path)
    assert generator.coding.kind == "latents"
    decoded = generator.coding.decode(torch.full((1, 4, 1, 1), 0.5))
    assert decoded.flatten().tolist() == pytest.approx([5.81 + 4.17, 3.25 + 4.62, 0.12 + 3.71, -2.15 + 3.28])


def test_unknown_encoders_are_not_guessed(
    official: Any, tiny_state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = official.write(tmp_path / "net.pkl", official.network(tiny_state, official.tiny), encoder="Own")
    model = import_path(path, tmp_path / "out").path
    with pytest.raises(ValueError, match="does not say how its images are coded"):
        ImageGenerator.load(model)


def test_snapshots_become_a_folder_that_gives_the_same_averages(
    official: Any, tiny_state: dict[str, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for i, (t, s) in enumerate((t, s) for t in (8, 16) for s in (0.05, 0.1)):
        state = {
            n: x if n.endswith(("freqs", "phases")) else x * (1 + 0.01 * i) for n, x in tiny_state.items()
        }
        official.write(tmp_path / "in" / f"run-{t:07d}-{s:.3f}.pkl", official.network(state, official.tiny))
    (tmp_path / "out").mkdir()
    imported = import_path(tmp_path / "in", tmp_path / "out")
    assert imported.found == "4 snapshots of 2 times, EMA lengths 0.05, 0.1"
    assert (tmp_path / "out" / "LICENSE-NOTICE").exists()
    ours, theirs = read_manifest(tmp_path / "out"), open_snapshots(tmp_path / "in")
    assert [s.rounding for s in ours.snapshots] == [s.rounding for s in theirs.manifest.snapshots]
    assert ours.snapshots[0].norm == pytest.approx(theirs.manifest.snapshots[0].norm, rel=1e-5)
    a = reconstruct(tmp_path / "out", 0.08, warn_above=1)
    b = reconstruct(theirs, 0.08, warn_above=1)
    for name, tensor in a.tensors.items():
        assert torch.allclose(tensor, b.tensors[name], atol=1e-6), name
    ((path, _),) = reconstruct_models(tmp_path / "out", [0.05], tmp_path / "models")
    assert load_model(path)[1]["license"] == "CC BY-NC-SA 4.0"


def test_statistics_survive_the_round_trip(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((50, 3))
    moments = {"mu": features.mean(0), "sigma": np.cov(features.T)}
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps({"fid": moments, "fd_dinov2": moments, "num_images": 50}))
    imported = import_path(tmp_path / "ref.pkl", tmp_path / "out")
    assert imported.found == "reference statistics of 50 images: fid of 3 features, fd_dinov2 of 3 features"
    found = read_reference_statistics(imported.path)
    assert list(found) == ["fid", "fd_dinov2"] or list(found) == ["fd_dinov2", "fid"]
    assert np.array_equal(found["fid"].cov, moments["sigma"])
    assert found["fid"].num_images == 50
    np.savez(tmp_path / "ref.npz", **moments)
    assert "an unknown number of images" in import_path(tmp_path / "ref.npz", tmp_path / "npz").found


def test_imported_statistics_that_are_damaged_are_refused(golden_network: Path, tmp_path: Path) -> None:
    model = import_path(golden_network, tmp_path).path
    with pytest.raises(
        ValueError, match=r"no reference statistics of edm2 .its format is .* not .edm2\.reference/1"
    ):
        read_reference_statistics(model)
    model.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="it holds no reference statistics of edm2"):
        read_reference_statistics(model)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_again_is_kept(
    official: Any, golden_network: Path, release: Path, tiny_state: dict[str, Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    preset = sampling_preset("edm2-img64-s-autog-fid")

    def everything() -> list[bool]:
        made = [import_path(golden_network, out), import_path(golden_network.parent, tmp_path / "snapshots")]
        made += import_named("edm2-img64-s-1073741-0.075.pkl", out, source=str(release))
        made += import_preset(preset, out, source=str(release))
        return [one.is_new for one in made]

    assert everything() == [True] * 6
    before = tree(tmp_path)
    assert everything() == [False] * 6
    assert tree(tmp_path) == before


def test_nothing_is_overwritten(golden_network: Path, release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_path(golden_network, out)
    other = tmp_path / golden_network.name
    shutil.copy(next(release.iterdir()), other)
    with pytest.raises(
        FileExistsError, match=r"0\.050\.safetensors exists already and was not made from network-"
    ):
        import_path(other, out)
    with pytest.raises(FileExistsError, match=r"out exists already and was not made from .*release: choose"):
        import_path(release, out, prefix="edm2-img64-s")
    (out / "LICENSE-NOTICE").write_text("mine")
    with pytest.raises(FileExistsError, match="LICENSE-NOTICE exists already and says something else"):
        import_named("edm2-img64-s-1073741-0.075.pkl", out, source=str(release))
    assert [p.name for p in out.glob("edm2*")] == []
    preset = sampling_preset("edm2-img64-s-autog-fid")
    import_preset(preset, tmp_path / "p", source=str(release))
    (tmp_path / "p" / f"{preset.name}.json").write_text("{}")
    with pytest.raises(
        FileExistsError, match=r"autog-fid\.json exists already and was not made from the setting"
    ):
        import_preset(preset, tmp_path / "p", source=str(release))


def test_other_files_are_refused(tmp_path: Path, golden_network: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="neither a network under 'ema' nor statistics under 'fid'"):
        import_path(path, tmp_path / "out")
    with pytest.raises(
        ValueError, match="is one file: a prefix chooses one of the training runs in a folder"
    ):
        import_path(golden_network, tmp_path, prefix="run")
    assert not (tmp_path / "out").exists()


def test_an_imported_preset_is_sampled_with_its_guide_and_weight(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, name = tmp_path / "out", "edm2-img64-s-autog-fid"
    main(["import", name, "--from", str(release), "--out", str(out)])
    settings = out / f"{name}.json"
    assert f"next   edm2 sample {settings} --out samples" in capsys.readouterr().out
    sizes = ["--seeds", "0-2", "--num-steps", "3", "--grid", "0"]
    main(["sample", str(settings), "--out", str(tmp_path / "by-file.npz"), *sizes])
    told = "saved settings: guidance 1.7 by edm2-img64-xs-0134217-0.110.safetensors"
    assert told in capsys.readouterr().err
    main(["sample", str(out), "--out", str(tmp_path / "by-folder.npz"), *sizes])
    model, guide = (
        ImageGenerator.load(out / f"{file}.safetensors")
        for file in ("edm2-img64-s-1073741-0.045", "edm2-img64-xs-0134217-0.110")
    )
    expected = model.images([0, 1, 2], sampler="heun", num_steps=3, guide=guide, guidance=1.7)
    assert not np.array_equal(expected, model.images([0, 1, 2], sampler="heun", num_steps=3))
    for file in ("by-file.npz", "by-folder.npz"):
        made = next(value for value in np.load(tmp_path / file).values() if value.ndim == 4)
        assert np.array_equal(made.transpose(0, 3, 1, 2), expected), file

    main(["import", "edm2-img64-s-fid", "--from", str(release), "--out", str(out)])
    with pytest.raises(SystemExit):
        main(["sample", str(out), "--out", str(tmp_path / "which.npz"), *sizes])
    told = rf"holds the settings of 2 released models: choose {out}/edm2-img64-s-fid.json or {settings}"
    assert told in capsys.readouterr().err
    main(["sample", str(out / "edm2-img64-s-fid.json"), "--out", str(tmp_path / "alone.npz"), *sizes])
    assert "saved settings: no guidance" in capsys.readouterr().err


def test_preset_brings_network_guide_and_settings(release: Path, tmp_path: Path) -> None:
    preset = sampling_preset("edm2-img64-s-autog-fid")
    written = import_preset(preset, tmp_path / "out", source=str(release))
    assert [w.path.name for w in written] == [
        "edm2-img64-s-1073741-0.045.safetensors",
        "edm2-img64-xs-0134217-0.110.safetensors",
        "edm2-img64-s-autog-fid.json",
    ]
    settings = json.loads(written[-1].path.read_text())
    assert settings["model"] == written[0].path.name
    assert (settings["guide"], settings["guidance"]) == (written[1].path.name, 1.7)
    assert settings["reported"] == {"metric": "FID", "value": 1.01}
    assert written[-1].found == f"settings of FID 1.01, guided with weight 1.7 by {written[1].path.name}"
    alone = import_preset(sampling_preset("edm2-img64-s-fid"), tmp_path / "out", source=str(release))
    assert alone[-1].found == "settings of FID 1.58, without a guide"


def test_models_that_are_there_are_used_again(release: Path, tmp_path: Path) -> None:
    preset, out = sampling_preset("edm2-img64-s-autog-fid"), tmp_path / "out"
    import_named(str(preset.guide), out, source=str(release))
    (release / str(preset.guide)).unlink()
    assert [w.is_new for w in import_preset(preset, out, source=str(release))] == [True, False, True]
    (out / f"{preset.name}.json").unlink()
    assert [w.is_new for w in import_preset(preset, out)] == [False, False, True]
    shutil.rmtree(out)
    other = import_named(str(preset.network), tmp_path / "other", source=str(release))[0].path
    out.mkdir()
    shutil.copy(other, out / "edm2-img64-xs-0134217-0.110.safetensors")
    with pytest.raises(FileExistsError, match=r"was not made from edm2-img64-xs-0134217-0\.110\.pkl"):
        import_preset(preset, out, source=str(release))


def test_hashes_are_one_a_file(release: Path, tmp_path: Path) -> None:
    preset = sampling_preset("edm2-img64-s-autog-fid")
    known = [
        hashlib.sha256((release / str(n)).read_bytes()).hexdigest() for n in (preset.network, preset.guide)
    ]
    with pytest.raises(ValueError, match=r"1 hashes for 2 files \(edm2-img64-s-1073741-0.045.pkl, "):
        import_preset(preset, tmp_path / "out", source=str(release), sha256=known[:1])
    import_preset(preset, tmp_path / "out", source=str(release), sha256=known)
    (tmp_path / "out" / f"{preset.name}.json").unlink()
    with pytest.raises(FileExistsError, match=r"0\.110\.safetensors exists already and was not made from"):
        import_preset(preset, tmp_path / "out", source=str(release), sha256=[known[0], known[0]])
    import_preset(preset, tmp_path / "out", source=str(release), sha256=known)


def test_a_missing_guide_is_noticed_before_the_network_is_fetched(release: Path, tmp_path: Path) -> None:
    preset, out = sampling_preset("edm2-img64-s-autog-fid"), tmp_path / "out"
    (release / str(preset.guide)).unlink()
    with pytest.raises(ValueError, match=r"release does not contain edm2-img64-xs-0134217-0\.110\.pkl"):
        import_preset(preset, out, source=str(release))
    assert not out.exists()


@pytest.mark.parametrize(
    ("error", "kept"), [(ValueError("the guide is damaged"), False), (OSError("the line broke"), True)]
)
def test_what_is_downloaded_stays_when_the_next_fails(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kept: bool
) -> None:
    preset, out = sampling_preset("edm2-img64-s-autog-fid"), tmp_path / "out"
    asked = []

    def download(name: str, source: str, folder: Path, **_: Any) -> Path:
        asked.append(name)
        folder.mkdir(parents=True, exist_ok=True)
        if name == str(preset.guide) and len(asked) == 2:
            if kept:
                (folder / ".a.part").touch()
            raise error
        return Path(shutil.copy(release / name, folder))

    monkeypatch.setattr("edm2.interop.convert.fetch", download)
    monkeypatch.setattr("edm2.interop.convert.check_there", lambda *_: None)
    model = out / "edm2-img64-s-1073741-0.045.safetensors"
    with pytest.raises(type(error), match=f"{error}. Kept for the next time: {model}"):
        import_preset(preset, out, source="http://somewhere")
    assert model.exists()
    assert (out / ".downloads" / ".a.part").exists() == kept
    import_preset(preset, out, source="http://somewhere")
    assert asked == [str(preset.network), str(preset.guide), str(preset.guide)]
    assert (out / ".downloads").exists() == kept


def refused(words: list[str], capsys: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    return str(capsys.readouterr().err)


def test_command(
    release: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, golden_network: Path
) -> None:
    monkeypatch.delenv("EDM2_RELEASED_FROM", raising=False)
    out = str(tmp_path / "out")
    main(["import"])
    assert len(capsys.readouterr().out.splitlines()) == 36
    main(["import", "edm2-img64-s-autog-fid", "--out", out, "--from", str(release)])
    text = capsys.readouterr().out
    assert text.count("found  ") == text.count("wrote  ") == 3
    assert "CC BY-NC-SA 4.0: not for commercial use" in text
    main(["import", "edm2-img64-s-1073741-0.075.pkl", "--out", out, "--from", str(release)])
    main(["import", str(golden_network), "--out", out])
    capsys.readouterr()
    for words, message in (
        (["edm2-img64-s-fid"], "where should edm2-img64-s-fid go? give --out"),
        (["edm2-img64-s-fid", "--out", out + "2"], "where is edm2-img64-s-1073741-0.075.pkl? give --from"),
        (
            ["edm2-img64-s-fidd", "--out", out],
            "no released model is called 'edm2-img64-s-fidd': did you mean",
        ),
        (["nowhere/x.pkl", "--out", out], "nowhere/x.pkl does not exist: give a file that does"),
        (["edm2-img64-s-fid", "--out", out, "--prefix", "a"], "--prefix chooses one of the training runs"),
        (
            [str(golden_network), "--out", out, "--from", "x"],
            "--from and --sha256 are for files that are fetched",
        ),
    ):
        assert message in refused(["import", *words], capsys)
    main(["import", str(golden_network), "--out", out])
    assert f"kept   {out}/{golden_network.stem}.safetensors\n" in capsys.readouterr().out


def test_refused_download_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watching: Callable[[], Any]
) -> None:
    def download(name: str, source: Any, folder: Path, **_: Any) -> Path:
        folder.mkdir(parents=True)
        (folder / name).write_bytes(b"cposix\nsystem\n.")
        return folder / name

    monkeypatch.setattr("edm2.interop.convert.fetch", download)
    monkeypatch.setattr("edm2.interop.convert.check_there", lambda *_: None)
    with watching() as executed, pytest.raises(ValueError, match=r"posix\.system.*Nothing in it was run"):
        import_named("x.pkl", tmp_path, source="http://somewhere")
    assert executed == []
    assert list(tmp_path.iterdir()) == []
