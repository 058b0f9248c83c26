"""Folders of official snapshots, read in place by edm2.ema."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edm2.cli import main
from edm2.diffusion import build_denoiser, load_model
from edm2.ema import AccuracyWarning, reconstruct, reconstruct_many
from edm2.generate import ImageGenerator
from edm2.interop.nvlabs import open_snapshots
from edm2.interop.snapshot_folder import parse_name

States = dict[str, dict[str, Tensor]]


@pytest.fixture
def folder(official: Any, tiny_state: dict[str, Tensor], tmp_path: Path) -> tuple[Path, States]:
    """Six snapshots whose weights differ a little, and their states by file name."""
    states: States = {}
    for i, (t, sigma_rel) in enumerate((t, s) for t in (8, 16, 24) for s in (0.05, 0.1)):
        name = f"run-{t:07d}-{sigma_rel:.3f}.pkl"
        rng = np.random.default_rng(i + 1)
        states[name] = {
            n: x
            if n.endswith(("freqs", "phases"))
            else x + 0.01 * torch.from_numpy(rng.standard_normal(x.shape)).half()
            for n, x in tiny_state.items()
        }
        official.write(tmp_path / name, official.network(states[name], official.tiny))
    return tmp_path, states


def test_names_say_images_and_length() -> None:
    for text, num_images, sigma_rel in (
        ("network-snapshot-0000008-0.050.pkl", 8192, 0.05),
        ("edm2-img512-s-2147483-0.130.pkl", 1 << 31, 0.13),
        ("edm2-img512-xl-1342177-0.155.pkl", 1280 << 20, 0.155),
        ("edm2-img512-xs-0134217-0.125.pkl", 128 << 20, 0.125),
        ("edm2-img64-xl-0671088-0.040.pkl", 640 << 20, 0.04),
    ):
        name = parse_name(text)
        assert name is not None
        assert (name.num_images, name.sigma_rel, str(name)) == (num_images, sigma_rel, text)
    for text in (
        "x.pkl",
        "run-0000042-0.050.pkl",
        "run-0000000-0.050.pkl",
        "run-0000008-0.300.pkl",
        "run-8-0.05.pkl",
    ):
        assert parse_name(text) is None


def test_stored_averages_come_back_exactly(folder: tuple[Path, States]) -> None:
    snapshots = open_snapshots(folder[0])
    for name, state in folder[1].items():
        parsed = parse_name(name)
        assert parsed is not None
        result = reconstruct(snapshots, parsed.sigma_rel, parsed.num_images)
        assert result.clock == "images"
        for tensor_name, tensor in state.items():
            assert torch.equal(result.tensors[tensor_name].float(), tensor.float()), tensor_name


def test_other_lengths_are_the_weighted_sum_of_the_files(folder: tuple[Path, States]) -> None:
    snapshots = open_snapshots(folder[0])
    with pytest.warns(AccuracyWarning):
        (result,) = reconstruct_many(snapshots, [0.08], warn_above=1e-9)
    assert len(result.coefficients) > 1
    for name, tensor in result.tensors.items():
        if name.endswith(("freqs", "phases")):
            assert torch.equal(tensor, folder[1]["run-0000024-0.100.pkl"][name])
        else:
            expected = sum(x * folder[1][file][name].double() for file, x in result.coefficients.items())
            assert (tensor - expected).abs().max() < 1e-5
    assert result.metadata is not None
    assert result.metadata["info"]["license"] == "CC BY-NC-SA 4.0"
    build_denoiser(**result.metadata["network"]).load_state_dict(result.tensors)


def test_golden_snapshot_is_read_in_place(golden_network: Path, fill_by_rule: Callable[..., Any]) -> None:
    snapshots = open_snapshots(golden_network.parent)
    assert snapshots.manifest.run.run_id == "network-snapshot"
    result = reconstruct(snapshots, 0.05)
    assert result.t == 8192
    assert result.metadata is not None
    expected = fill_by_rule(build_denoiser(**result.metadata["network"]), prefix="8-0.050.")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(result.tensors[name], tensor.half().to(result.tensors[name].dtype)), name
    norm = sum(float(p.detach().half().double().square().sum()) for p in expected.parameters()) ** 0.5
    assert snapshots.manifest.snapshots[0].norm == pytest.approx(norm, rel=1e-6)


def test_folders_that_hold_none_or_several_are_refused(
    folder: tuple[Path, States], official: Any, tiny_state: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is not a folder: give the folder of network-snapshot"):
        open_snapshots(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no snapshots named like network-snapshot-0000008"):
        open_snapshots(tmp_path / "empty")
    (tmp_path / "stray.pkl").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 files without an image count .* left out \(stray.pkl\)"):
        open_snapshots(tmp_path)
    (tmp_path / "stray.pkl").unlink()
    official.write(tmp_path / "other-0000008-0.050.pkl", official.network(tiny_state, official.tiny))
    with pytest.raises(
        ValueError, match=r"holds snapshots of 2 training runs \(other, run\): choose one by prefix"
    ):
        open_snapshots(tmp_path)
    assert len(open_snapshots(tmp_path, prefix="run").manifest.snapshots) == 6
    with pytest.raises(ValueError, match="holds no snapshots of 'none'; there are other, run"):
        open_snapshots(tmp_path, prefix="none")


def test_files_that_cannot_be_averaged_are_refused(
    folder: tuple[Path, States], official: Any, tiny_state: dict[str, Tensor], tmp_path: Path
) -> None:
    path, name = tmp_path / "run-0000032-0.050.pkl", "unet.enc.2x2_conv.weight"
    for state, kwargs, what in (
        (
            tiny_state,
            {**official.tiny, "sigma_data": 0.4},
            "are of different networks: move one training's files",
        ),
        (
            {**tiny_state, name: tiny_state[name].to(memory_format=torch.channels_last)},
            official.tiny,
            f"a {name} whose numbers are not in row-major order",
        ),
        (
            {**tiny_state, name: tiny_state[name].float()},
            official.tiny,
            "parameters of several types, or of float64",
        ),
        (
            {n: x.double() for n, x in tiny_state.items()},
            official.tiny,
            "parameters of several types, or of float64",
        ),
    ):
        official.write(path, official.network(state, kwargs))
        with pytest.raises(ValueError, match=what):
            open_snapshots(tmp_path)


def test_commands_read_a_folder_of_official_snapshots(
    folder: tuple[Path, States], capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, out = folder[0], tmp_path_factory.mktemp("out")
    main(["ema", "list", str(path)])
    told = capsys.readouterr().out
    assert "run run, time in images from 0; 6 files" in told
    assert told.count("unknown  run-00000") == 6
    main(["ema", "reconstruct", str(path), "--sigma-rel", "0.05,0.08", "--out", str(out)])
    told = capsys.readouterr().out
    assert told.count("expected relative error") == 2
    assert (
        f"credit the authors, share what you make of them under the same licence; see {out}/LICENSE-NOTICE"
        in told
    )
    assert "NonCommercial" in (out / "LICENSE-NOTICE").read_text()
    model, info = load_model(out / "ema-0.08.safetensors")
    expected = reconstruct(open_snapshots(path), 0.08, warn_above=1).tensors
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert (info["license"], info["sigma_rel"], info["num_images"]) == ("CC BY-NC-SA 4.0", 0.08, 24576)
    assert ImageGenerator.load(out / "ema-0.05.safetensors").images([0], num_steps=2).shape == (1, 1, 2, 2)
    picture = out / "profile.png"
    main(["ema", "profile", str(path), "--sigma-rel", "0.05", "--out", str(picture)])
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_commands_say_which_training_and_what_is_wrong(
    folder: tuple[Path, States], official: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder[0]
    command = ["ema", "reconstruct", str(path), "--sigma-rel", "0.05", "--out", str(path / "out")]
    first = next(iter(folder[1]))
    (path / f"other-{first.removeprefix('run-')}").write_bytes((path / first).read_bytes())

    def fails(words: list[str]) -> str:
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        return capsys.readouterr().err

    assert "holds snapshots of 2 training runs (other, run): choose one by prefix" in fails(command)
    assert "holds no snapshots of 'third'; there are other, run" in fails([*command, "--prefix", "third"])
    (path / first).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert f"{path / first} was not read: it holds" in fails([*command, "--prefix", "run"])
    assert not (path / "out").exists()
    main([*command, "--prefix", "other"])
    (path / "empty").mkdir()
    told = fails(["ema", "list", str(path / "empty"), "--prefix", "run"])
    assert "--prefix run is for folders of other libraries, and" in told
