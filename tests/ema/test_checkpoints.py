"""Averages of plain checkpoints: sums done by hand, what is read, and what is refused."""

import itertools
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file, save_file

from edm2.cli import main
from edm2.ema import AccuracyWarning, Target, average_checkpoints, sigma_rel_to_gamma
from edm2.ema.checkpoints import merge_checkpoints
from edm2.ema.storage.checkpoint_files import Checkpoint


def weights(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 30, 4, generator=generator)
    return {"layer.weight": a + b * (step / 1000) ** 0.5, "count": torch.tensor(step)}


def write(folder: Path, steps: list[int], *, kind: str = "safetensors") -> None:
    for step in reversed(steps):  # so that file times tell the wrong order
        if kind == "safetensors":
            save_file(weights(step), folder / f"model-step-{step}.safetensors")
        elif kind == "torch":
            torch.save(
                {"model": {f"module.{k}": v for k, v in weights(step).items()}, "epoch": 3},
                folder / f"{step}.pt",
            )
        else:
            (folder / f"checkpoint-{step}").mkdir()
            torch.save(weights(step), folder / f"checkpoint-{step}" / "pytorch_model.bin")


STEPS = [200, 400, 600, 700, 1000]


@pytest.mark.parametrize("kind", ["safetensors", "torch", "folders"])
def test_each_checkpoint_counts_for_the_time_before_it(tmp_path: Path, kind: str) -> None:
    write(tmp_path, STEPS, kind=kind)
    edges = np.array([0, *STEPS]) / 1000
    targets = [0.1, Target.uniform(600), Target.power_gamma(0.0)]
    masses = [
        np.diff(edges ** (sigma_rel_to_gamma(0.1) + 1)),
        np.diff(np.clip((edges - 0.4) / 0.6, 0, 1)),
        np.diff(edges),
    ]
    results = average_checkpoints(tmp_path, targets, warn_above=9)
    for result, mass in zip(results, masses, strict=True):
        by_hand = sum(m * weights(s)["layer.weight"].double() for m, s in zip(mass, STEPS, strict=True))
        torch.testing.assert_close(result.tensors["layer.weight"].double(), by_hand, rtol=1e-6, atol=1e-6)
        assert result.tensors["count"] == 1000
        assert sum(result.coefficients.values()) == pytest.approx(1.0, abs=1e-6)


def test_a_window_over_even_checkpoints_is_their_plain_mean_and_reads_no_others(tmp_path: Path) -> None:
    write(tmp_path, [100, 200, 300, 400, 500])
    (tmp_path / "model-step-100.safetensors").write_bytes(b"damaged")
    (result,) = average_checkpoints(tmp_path, [Target.uniform(300)], warn_above=9)
    mean = sum(weights(s)["layer.weight"] for s in (300, 400, 500)) / 3
    torch.testing.assert_close(result.tensors["layer.weight"], mean)


def test_time_between_checkpoints_and_start(tmp_path: Path) -> None:
    write(tmp_path, STEPS)
    (result,) = average_checkpoints(tmp_path, [Target.uniform(300)], t=500, start=200, warn_above=9)
    mean = (2 * weights(400)["layer.weight"] + weights(600)["layer.weight"]) / 3
    torch.testing.assert_close(result.tensors["layer.weight"], mean)


def test_steps_can_be_given(tmp_path: Path) -> None:
    save_file(weights(1), tmp_path / "a.safetensors")
    save_file(weights(2), tmp_path / "b.safetensors")
    files = {tmp_path / "b.safetensors": 10, tmp_path / "a.safetensors": 20}
    (result,) = average_checkpoints(files, [Target.uniform(20)], warn_above=9)
    torch.testing.assert_close(
        result.tensors["layer.weight"], (weights(1)["layer.weight"] + weights(2)["layer.weight"]) / 2
    )


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    write(tmp_path, STEPS)
    alive: list[Any] = []
    read = Checkpoint.read

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        assert sum(ref() is not None for ref in alive) <= 2
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    average_checkpoints(tmp_path, [0.1, 0.2], warn_above=9)
    assert len(alive) == len(STEPS) + 1


@pytest.mark.parametrize("kind", ["walk", "drift"])
@pytest.mark.parametrize("count", [10, 40])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.15])
def test_expected_error_holds(tmp_path: Path, kind: str, count: int, sigma_rel: float) -> None:
    steps, size = 800, 2000
    rng = np.random.default_rng(3)
    moves = (
        rng.standard_normal((steps, size))
        if kind == "walk"
        else np.tile(rng.standard_normal(size), (steps, 1))
    )
    path = torch.from_numpy(rng.standard_normal(size) + np.cumsum(0.005 * moves, axis=0))
    for step in range(steps // count, steps + 1, steps // count):
        torch.save({"w": path[step - 1].float()}, tmp_path / f"{step}.pt")
    (result,) = average_checkpoints(tmp_path, [sigma_rel], warn_above=9)
    gamma = sigma_rel_to_gamma(sigma_rel)
    truth = torch.from_numpy(np.diff((np.arange(steps + 1) / steps) ** (gamma + 1))) @ path
    error = float((result.tensors["w"] - truth).norm() / truth.norm())
    assert error < result.expected_error < 5 * error


def test_a_large_error_warns_and_says_what_helps(tmp_path: Path) -> None:
    write(tmp_path, [500, 1000])
    with pytest.warns(AccuracyWarning, match="what would help: checkpoints closer together"):
        average_checkpoints(tmp_path, [0.1], warn_above=1e-4)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds no checkpoint: looked for models in files ending in \.safetensors"
    ):
        average_checkpoints(tmp_path, [0.1])
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        average_checkpoints(tmp_path / "nowhere", [0.1])
    with pytest.raises(ValueError, match=r"1\.pt does not exist"):
        average_checkpoints([tmp_path / "1.pt"], [0.1])
    for content, message in [
        (b"no checkpoint", "100.pt (is damaged or not a checkpoint|holds more than tensors)"),
        ({"a": 1, "b": {}}, "it is unclear where the weights are; give key, one of 'a', 'b'"),
        ({"model": {"layer.weight": torch.zeros(3)}}, "is of another model: 1 tensors .* 'layer.weight'"),
        ({"model": {"layer.weight": torch.full((30, 4), np.nan)}}, "not finite in 'layer.weight'"),
        ({"model": {"step": 3}}, "holds no tensor"),
    ]:
        if isinstance(content, bytes):
            (tmp_path / "100.pt").write_bytes(content)
        else:
            torch.save(content, tmp_path / "100.pt")
        torch.save({"model": weights(90)}, tmp_path / "90.pt")
        with pytest.raises(ValueError, match=message):
            average_checkpoints(tmp_path, [0.1])
    with pytest.raises(ValueError, match="has no tensors under 'ema': it has 'model'"):
        average_checkpoints([tmp_path / "90.pt"], [0.1], key="ema")


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"model": Hostile()}, tmp_path / "10.pt")
    with pytest.raises(ValueError, match="holds more than tensors, and loading it would run code"):
        average_checkpoints(tmp_path, [0.1])
    assert not (tmp_path / "executed").exists()


def test_buffers_are_copied_from_the_last_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        value = torch.full((2,), float(step))
        save_file({"a.running_var": value, "a.weight": value.clone()}, tmp_path / f"{step}.safetensors")
    (result,) = average_checkpoints(tmp_path, [Target.uniform(2)], warn_above=9)
    assert result.tensors["a.running_var"].tolist() == [2.0, 2.0]
    assert result.tensors["a.weight"].tolist() == [1.5, 1.5]
    (result,) = average_checkpoints(
        tmp_path, [Target.uniform(2)], copied=lambda name: "weight" in name, warn_above=9
    )
    assert result.tensors["a.running_var"].tolist() == [1.5, 1.5]
    assert result.tensors["a.weight"].tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match=r"[12]\.safetensors holds nothing to average"):
        average_checkpoints(tmp_path, [Target.uniform(2)], copied=lambda name: True)


def test_a_trainers_folder_is_read_for_its_models(tmp_path: Path) -> None:
    beside = (
        "optimizer.pt",
        "optimizer.bin",
        "scheduler.pt",
        "scaler.pt",
        "rng_state.pth",
        "rng_state_0.pth",
    )
    for step in (500, 1000):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file(weights(step), folder / "model.safetensors")
        save_file({"average.0.layer.weight": torch.zeros(1)}, folder / "power_ema.safetensors")
        for name in (
            *beside,
            "training_args.bin",
            "sampler.bin",
            "random_states_0.pkl",
            "trainer_state.json",
        ):
            (folder / name).write_bytes(b"not read")
    (tmp_path / "training_args.bin").write_bytes(b"not read")
    save_file(weights(0), tmp_path / "model.safetensors")
    (result,) = average_checkpoints(tmp_path, [Target.uniform(1000)], warn_above=9)
    mean = (weights(500)["layer.weight"] + weights(1000)["layer.weight"]) / 2
    torch.testing.assert_close(result.tensors["layer.weight"], mean)
    save_file(weights(500), tmp_path / "checkpoint-500" / "model-00001-of-00002.safetensors")
    with pytest.raises(
        ValueError, match=r"00001-of-00002.safetensors is one part of a model in several files, and its index"
    ):
        average_checkpoints(tmp_path, [0.1])


def test_unclear_steps_are_refused(tmp_path: Path) -> None:
    for names, message in [
        (
            ["final.pt"],
            "step of .*final.pt cannot be read from its name: give a mapping .*, without the files to leave",
        ),
        (["step-3-iter-4.pt"], "cannot be read"),
        (["checkpoint-500/step-20.pt"], "cannot be read"),
        (["a-1-2.pt"], "cannot be read from its name"),
        (["a1.pt", "b1.pt"], "both seem to be of step 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            average_checkpoints([Path("run") / n for n in names], [0.1])
    write(tmp_path, [100, 200])
    for t in (300, 0):
        with pytest.raises(ValueError, match=f"t {t} must be above start 0 and at most the last .* 200"):
            average_checkpoints(tmp_path, [0.1], t=t)


@pytest.mark.parametrize(
    ("names", "last"),
    [
        ([f"epoch={i}-step={100 * i}.ckpt" for i in (1, 2, 3)], 300),
        (["checkpoint-500/sd15.pt", "checkpoint-1000/sd21.pt"], 1000),
        ([f"STEP_{i}.PT" for i in (1, 2, 3)], 3),
        ([f"epoch-{i}/model.bin" for i in (1, 2)], 2),
        (["global_step50/weights_v2.pt", "global_step70/weights_v2.pt"], 70),
        (["model-1.pt", "model-2.pt"], 2),
    ],
)
def test_steps_from_names(tmp_path: Path, names: list[str], last: int) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({"state_dict": {"w": torch.ones(4)}}, tmp_path / name)
    assert average_checkpoints(tmp_path, [0.1], warn_above=9)[0].t == last


def write_sharded(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """A model in two files with an index, as Hugging Face's libraries write it, and what lies beside it."""
    tensors = {
        "a": weights(step)["layer.weight"].bfloat16(),
        "b": torch.full((7,), step / 100),
        "n": torch.tensor(step),
    }
    folder.mkdir(parents=True)
    files = {"model-00001-of-00002.safetensors": ["a"], "model-00002-of-00002.safetensors": ["b", "n"]}
    for file, names in files.items():
        save_file({n: tensors[n] for n in names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, names in files.items() for n in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"not read")
    return tensors


def write_distributed(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """A folder of torch.distributed.checkpoint with an optimiser's state in it."""
    tensors = {
        "a": weights(step)["layer.weight"],
        "b": torch.full((7,), step / 100).bfloat16(),
        "n": torch.tensor(step),
    }
    optimizer = {"state": {"m": torch.zeros(3)}, "lr": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.save(
            {"model": tensors, "optimizer": optimizer}, checkpoint_id=folder, no_dist=True
        )
    return tensors


def read_distributed(folder: Path) -> dict[str, torch.Tensor]:
    state = {"model": {"a": torch.zeros(30, 4), "b": torch.zeros(7).bfloat16(), "n": torch.tensor(0)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    return state["model"]


WRITERS = {"sharded": write_sharded, "distributed": write_distributed}


@pytest.mark.filterwarnings("ignore::edm2.ema.AccuracyWarning")
@pytest.mark.parametrize("kind", WRITERS)
def test_models_in_pieces_are_averaged_and_written_back_alike(tmp_path: Path, kind: str) -> None:
    stored = {step: WRITERS[kind](tmp_path / "run" / f"checkpoint-{step}", step) for step in (100, 200, 300)}
    mean = {n: sum(x[n].double() for x in stored.values()) / 3 for n in ("a", "b")}
    (result,) = average_checkpoints(tmp_path / "run", [Target.uniform(300)], warn_above=9)
    for name, x in mean.items():
        torch.testing.assert_close(result.tensors[name].double(), x, rtol=1e-6, atol=1e-6)
    assert result.tensors["n"] == 300
    out, last = tmp_path / "out", tmp_path / "run" / "checkpoint-300"
    command = ["ema", "merge", str(tmp_path / "run"), "--target", "uniform:300", "--out", str(out)]
    main(command)
    left_out = {"optimizer.pt", "trainer_state.json"}
    assert {p.name for p in out.iterdir()} == {p.name for p in last.iterdir()} - left_out | {"merged.json"}
    if kind == "sharded":
        found = {n: x for p in sorted(out.glob("*.safetensors")) for n, x in load_file(p).items()}
    else:
        found = read_distributed(out)
    assert found.keys() == stored[300].keys()
    for name, x in found.items():
        expected = mean[name].to(x.dtype) if name in mean else stored[300][name]
        torch.testing.assert_close(x, expected)
        assert x.dtype == stored[300][name].dtype
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir()}
    main(command)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir()} == before
    record = json.loads((out / "merged.json").read_text())
    (out / "merged.json").write_text(json.dumps({**record, "expected_error": []}))
    with pytest.raises(SystemExit):
        main(command)


@pytest.mark.filterwarnings("ignore::edm2.ema.AccuracyWarning")
def test_several_targets_and_plain_files_are_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    write(run, STEPS, kind="torch")
    main(["ema", "merge", str(run), "--target", "0.1", "minus_sqrt:400", "--out", str(out)])
    assert capsys.readouterr().out.count("expected relative error") == 2
    (expected,) = average_checkpoints(run, [Target.minus_sqrt(400)])
    found = load_file(out / "minus_sqrt-400" / "1000.safetensors")
    torch.testing.assert_close(found["module.layer.weight"], expected.tensors["layer.weight"])
    assert sorted(p.name for p in out.iterdir()) == ["0.1", "minus_sqrt-400"]
    for words, told in (
        (
            ["--target", "cosine:5", "--out", "x"],
            "--target 'cosine:5' is not understood: write a length, 0.1",
        ),
        (["--target", "uniform:much", "--out", "x"], "--target 'uniform:much' is not understood"),
        (["--target", "uniform:3000", "--out", "x"], "window 3000 is longer than the training up to 1000"),
        (["--target", "0.1", "--out", str(run)], "exists already and holds something else"),
    ):
        with pytest.raises(SystemExit):
            main(["ema", "merge", str(run), *words])
        assert told in capsys.readouterr().err


def test_a_kill_while_merging_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (100, 200):
        write_sharded(tmp_path / "run" / f"checkpoint-{step}", step)
    read = Checkpoint.read
    for killed_at in range(1, 5):
        calls = itertools.count(1)

        def killed(
            self: Checkpoint, name: str, calls: Any = calls, killed_at: int = killed_at
        ) -> torch.Tensor:
            if next(calls) == killed_at:
                raise KeyboardInterrupt
            return read(self, name)

        monkeypatch.setattr(Checkpoint, "read", killed)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(tmp_path / "run", [Target.uniform(200)], [tmp_path / "out"], warn_above=9)
        assert [p.name for p in tmp_path.iterdir()] == ["run"]
    monkeypatch.undo()
    merge_checkpoints(tmp_path / "run", [Target.uniform(200)], [tmp_path / "out"], warn_above=9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def _lost_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def _escaping(folder: Path) -> None:
    index = {"weight_map": {"a": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _misplaced(folder: Path) -> None:
    index = {"weight_map": {"b": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _two(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors.index.json", folder / "model.fp16.safetensors.index.json")


def _nested(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)


def _lost_part(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def _cut_part(folder: Path) -> None:
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[: len(data) // 2])


def _broken_part(folder: Path) -> None:
    (folder / "__0_0.distcp").write_bytes(bytes((folder / "__0_0.distcp").stat().st_size))


def _cut_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:200])


def _hostile_metadata(folder: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder / "executed"),)

    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))


@pytest.mark.parametrize(
    ("kind", "damage", "told"),
    [
        ("sharded", _lost_shard, "names model-00002-of-00002.safetensors, which is missing: copy all parts"),
        ("sharded", _escaping, "its weight_map does not name files of its folder"),
        ("sharded", _misplaced, "places 'b' in model-00001-of-00002.safetensors, which does not hold it"),
        ("sharded", _two, "holds 2 indices .* give the one that you mean"),
        ("sharded", _nested, "index.json is damaged .JSON nested deeper"),
        ("distributed", _lost_part, "lacks the part '__0_0.distcp': copy all parts"),
        ("distributed", _cut_part, "does not hold all of"),
        ("distributed", _broken_part, "__0_0.distcp is damaged at 'model.a'"),
        ("distributed", _cut_metadata, "metadata is damaged"),
        ("distributed", _hostile_metadata, "which no metadata of torch.distributed.checkpoint needs"),
    ],
)
def test_damaged_pieces_are_named(
    tmp_path: Path, kind: str, damage: Callable[[Path], None], told: str
) -> None:
    for step in (100, 200):
        WRITERS[kind](tmp_path / f"checkpoint-{step}", step)
    damage(tmp_path / "checkpoint-200")
    with pytest.raises(ValueError, match=told):
        average_checkpoints(tmp_path, [0.1], warn_above=9)
    assert not (tmp_path / "checkpoint-200" / "executed").exists()
