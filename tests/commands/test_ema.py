"""`edm2 ema` on folders of snapshots."""

import importlib
import io
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from edm2.cli import main
from edm2.ema import AccuracyWarning, PowerEMA, reconstruct, reconstruct_many
from edm2.ema.reconstruct import free_memory, reconstruct_each
from edm2.ema.storage.manifest import read_manifest
from edm2.generate import reconstructed
from edm2.report.ema_figures import Profiles, profile_figure
from edm2.report.style import figure_png

pytestmark = pytest.mark.filterwarnings("ignore::edm2.ema.AccuracyWarning")


@pytest.fixture
def snapshots(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "snapshots"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Linear(20, 20))
    model[2].weight = model[0].weight
    ema = PowerEMA(model, run_id="a-run", start=100)
    for step in range(1, 81):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        ema.update(100 + step)
        if step % 10 == 0:
            ema.snapshot(folder)
    return folder


def failing(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(["ema", *words])
    assert isinstance(caught.value.code, int)
    return caught.value.code, capsys.readouterr().err


def test_a_profile_is_drawn_whole_while_a_trainer_writes(
    snapshots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = importlib.import_module("edm2.commands.ema")
    before = read_manifest(snapshots)
    seen = []

    def beside_a_writer(source: Path, *arguments: object, **options: object) -> object:
        model = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Linear(20, 20))
        model[2].weight = model[0].weight
        ema = PowerEMA(model, run_id="a-run", start=100)
        ema.load_snapshot(source)
        ema.update(190)
        ema.snapshot(source, keep=8)
        return seen.append(reconstruct_many(source, *arguments, **options)) or seen[-1]  # type: ignore[arg-type, func-returns-value]

    monkeypatch.setattr(command, "reconstruct_many", beside_a_writer)
    main(["ema", "profile", str(snapshots), "--sigma-rel", "0.07", "--out", str(tmp_path / "p.png")])
    assert seen[0][0].t == 180
    assert seen[0][0].coefficients.keys() <= {s.file for s in before.snapshots}


def test_list_tells_what_a_folder_holds(snapshots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["ema", "list", str(snapshots.parent)])  # the run's folder will do
    lines = capsys.readouterr().out.splitlines()
    assert "run a-run, time in steps from 100; 16 files" in lines[0]
    assert "8 times, tracks 0.05, 0.1" in lines[0]
    assert len(lines) == 2 + 16
    assert lines[2].split()[:3] == ["110", "0.05", "fp32"]
    code, error = failing(["list", str(snapshots.parent.parent)], capsys)
    assert code == 2
    assert "is not a snapshot folder" in error


def test_verify_names_every_damaged_file(snapshots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["ema", "verify", str(snapshots)])
    assert "all files are as they were written" in capsys.readouterr().out
    flipped, cut, gone = sorted(snapshots.glob("*.safetensors"))[3:6]
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    code, error = failing(["verify", str(snapshots)], capsys)
    assert code == 1
    assert "3 of 16 files" in error
    assert f"{flipped} is damaged: its sha256 is not the one written" in error
    assert f"{cut} is damaged: it has" in error
    assert f"{gone} is named by the manifest but missing" in error


def test_reconstruct_writes_plain_files_that_load(
    snapshots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = snapshots.parent / "out"
    main(["ema", "reconstruct", str(snapshots), "--sigma-rel", "0.04,0.10,0.2", "--out", str(out)])
    assert capsys.readouterr().out.count("expected relative error") == 3
    for sigma_rel in (0.04, 0.10, 0.2):
        written = load_file(out / f"ema-{sigma_rel:g}.safetensors")
        wanted = reconstruct(snapshots, sigma_rel=sigma_rel).tensors
        assert written.keys() == wanted.keys()  # tied tensors under both names
        torch.testing.assert_close(written, wanted, rtol=1e-5, atol=1e-6)
        nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Linear(20, 20)).load_state_dict(written)
    assert sorted(p.name for p in out.iterdir()) == [f"ema-{s}.safetensors" for s in ("0.04", "0.1", "0.2")]


def test_reconstruct_continues_after_a_kill_at_any_file(
    snapshots: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["ema", "reconstruct", str(snapshots), "--sigma-rel", "0.05,0.08,...,0.20", "--out"]
    main([*command, str(snapshots.parent / "whole")])
    whole = {p.name: p.read_bytes() for p in (snapshots.parent / "whole").iterdir()}
    assert len(whole) == 6
    original, out = reconstructed.save_tensors, snapshots.parent / "out"
    for killed_at in range(6):
        left = [killed_at]

        def killed(*args: object, left: list[int] = left) -> object:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return original(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(reconstructed, "save_tensors", killed)
        with pytest.raises(SystemExit):
            main([*command, str(out)])
        monkeypatch.undo()
        assert len(list(out.iterdir())) == killed_at if out.exists() else killed_at == 0
        for _ in range(2):
            main([*command, str(out)])
            assert {p.name: p.read_bytes() for p in out.iterdir()} == whole
        shutil.rmtree(out)


def test_two_processes_may_write_the_same_lengths(snapshots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [
        "ema",
        "reconstruct",
        str(snapshots),
        "--sigma-rel",
        "0.05,0.08",
        "--out",
        str(snapshots.parent / "out"),
    ]
    original = reconstructed.save_tensors

    def another_was_faster(*args: object) -> None:
        original(*args)  # type: ignore[arg-type]
        original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(reconstructed, "save_tensors", another_was_faster)
    main(command)
    assert sorted(p.name for p in (snapshots.parent / "out").iterdir()) == [
        "ema-0.05.safetensors",
        "ema-0.08.safetensors",
    ]


def test_reconstruct_keeps_what_is_there_and_takes_a_choice_of_tracks(
    snapshots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = snapshots.parent / "out"
    out.mkdir()
    (out / "ema-0.1.safetensors").write_bytes(b"mine")
    command = ["reconstruct", str(snapshots), "--out", str(out), "--sigma-rel", "0.06,0.1"]
    code, error = failing(command, capsys)
    assert (code, "keep it with --skip-existing" in error) == (2, True)
    main(["ema", *command, "--skip-existing", "--tracks", "0.05"])
    assert (out / "ema-0.1.safetensors").read_bytes() == b"mine"
    alone = reconstruct(snapshots, sigma_rel=0.06, tracks=[0.05]).tensors
    torch.testing.assert_close(load_file(out / "ema-0.06.safetensors"), alone)
    code, error = failing([*command, "--tracks", "0.3", "--skip-existing"], capsys)
    assert (code, "track 0.3 is not stored in" in error) == (2, True)
    for words in ("0.01,0.02,...,0.025", "0.02,0.02,...,0.1", "...,0.1", "0.1,...,0.2"):
        code, error = failing([*command[:-1], words], capsys)
        assert (code, "in equal steps, 0.01,0.02,...,0.1" in error) == (2, True)


def test_many_targets_come_in_groups_that_fit(snapshots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("edm2.ema.reconstruct")
    asked: list[int] = []
    original = module._chosen

    def counted(folder: Path, targets: list[float], chosen: list[int], *args: object) -> object:
        asked.append(len(chosen))
        return original(folder, targets, chosen, *args)

    monkeypatch.setattr(module, "_chosen", counted)
    targets = [0.05 + 0.01 * i for i in range(7)]
    size = max(s.num_bytes for s in read_manifest(snapshots).snapshots)
    made = [r.sigma_rel for r in reconstruct_each(snapshots, targets, memory_bytes=3.5 * size)]
    assert made == targets
    assert asked == [3, 3, 1]
    assert free_memory() > 1 << 20
    assert [*reconstruct_each(snapshots, [])] == []


def test_reconstruct_refuses_to_overwrite_and_bad_lengths(
    snapshots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = snapshots.parent / "out"
    command = ["reconstruct", str(snapshots), "--out", str(out), "--sigma-rel"]
    main(["ema", *command, "0.1", "--t", "140"])
    before = (out / "ema-0.1.safetensors").read_bytes()
    code, error = failing([*command, "0.05,0.1"], capsys)
    assert code == 2
    assert "ema-0.1.safetensors exists already and holds another average" in error
    assert [p.name for p in out.iterdir()] == ["ema-0.1.safetensors"]
    assert (out / "ema-0.1.safetensors").read_bytes() == before
    for words, message in (
        (["short"], "write lengths separated by commas"),
        (["0.5"], "is outside"),
        (["0.07", "--t", "999"], "beyond the last snapshot"),
    ):
        code, error = failing([*command, *words], capsys)
        assert code == 2
        assert message in error


def test_profile_draws_what_reconstruct_makes(snapshots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = snapshots.parent / "profile.png"
    main(["ema", "profile", str(snapshots), "--sigma-rel", "0.05,0.15", "--out", str(picture)])
    first, second = capsys.readouterr().out.splitlines()[1:3]
    assert first.split()[:5] == ["sigma_rel", "0.05", "1", "1", "1.00"]
    result = reconstruct(snapshots, sigma_rel=0.15)
    assert second.split()[4:] == [f"{result.amplification:.2f}", f"{result.expected_error:.1e}"]
    assert PIL.Image.open(io.BytesIO(picture.read_bytes())).size == (800, 648)
    (early,) = reconstruct_many(snapshots, [0.15], read=False)
    assert early.tensors == {}
    assert early.coefficients == result.coefficients
    assert early.expected_error == result.expected_error


def test_profile_draws_lengths_that_can_be_had(snapshots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = snapshots.parent / "profile.png"
    main(["ema", "profile", str(snapshots), "--out", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:-1]] == ["0.05", "0.063", "0.0794", "0.1"]
    code, error = failing(["profile", str(snapshots), "--out", "picture.jpg"], capsys)
    assert code == 2
    assert "--out picture.jpg: pictures are PNG files" in error


def test_profile_picture_shows_a_few_at_most() -> None:
    times = np.linspace(0, 1, 50)
    one = Profiles(label="a", wanted=times, made=times**2)
    assert figure_png(profile_figure(times, [one], clock="steps"))[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="8 EMA lengths: a figure shows 1 to 7"):
        profile_figure(times, [one] * 8, clock="steps")


def test_plan_says_what_to_track_and_what_it_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["ema", "plan", "--params", "280M", "--out", str(tmp_path / "plan.png")])
    out = capsys.readouterr().out
    assert "280,000,000 parameters" in out
    assert "the end alone, as fp32: 8 files" in out
    assert "paper: 512 files, 573 GB, worst error 0.0027" in out
    assert "released (every 32 Mi): 128 files" in out
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    main(["ema", "plan", "--name", "paper"])
    assert "512 files, 205 GB, worst" not in capsys.readouterr().out  # not beside itself
    main(["ema", "plan", "--tracks", "2", "--times", "3", "--storage", "3GB"])
    assert "6 files" in capsys.readouterr().out
    main(["ema", "plan", "--name", "compact", "--dtype", "fp16"])
    out = capsys.readouterr().out
    assert "as fp16: 8 files" in out
    assert 'PowerEMA(model, plan="compact")' in out
    assert "in edm2 train   --ema.sigma-rels 0.0312 0.0407 " in out


def test_plan_for_mid_run_gives_the_error_there(capsys: pytest.CaptureFixture[str]) -> None:
    errors = []
    for words in ([], ["--mid-run"]):
        main(["ema", "plan", "--tracks", "3", "--times", "2", *words])
        errors.append(float(capsys.readouterr().out.split("worst error")[1].split()[0]))
    # Nothing is stored before the first time, so that it is no better than three averages at one time.
    main(["ema", "plan", "--tracks", "3"])
    assert errors[1] == float(capsys.readouterr().out.split("worst error")[1].split()[0])
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--params", "many"], "--params 'many' is not understood"),
        (["--storage", "-1GB"], "--storage '-1GB' is not understood"),
        (["--sigma-range", "0.1"], "write the shortest and the longest"),
        (["--name", "best"], "plan 'best' is not known"),
        (["--tracks", "3", "--memory", "1GB"], "3 tracks need more than --memory allows"),
        (["--storage", "3"], "--storage of 3 does not hold one average of 100,000,000 parameters"),
        (["--name", "lean", "--tracks", "3"], "--name lean fixes tracks and times: leave out --tracks"),
        (["--out", "plan.txt"], "--out plan.txt: pictures are PNG files"),
    ],
)
def test_plan_refuses_what_it_cannot_do(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = failing(["plan", *words], capsys)
    assert code == 2
    assert message in error


def test_warnings_reach_the_reader(snapshots: Path) -> None:
    with pytest.warns(AccuracyWarning, match=r"sigma_rel 0\.02 .*what would help"):
        reconstruct_many(snapshots, [0.02], warn_above=1e-9, read=False)
