"""Averages of plain checkpoints: sums done by hand, what is read, and what is refused."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edm2.ema import AccuracyWarning, Target, average_checkpoints, sigma_rel_to_gamma
from edm2.ema import checkpoints as module


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


def test_one_checkpoint_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    write(tmp_path, STEPS)
    alive: list[Any] = []
    load = module.load_checkpoint

    def counted(path: Path, key: str | None) -> dict[str, torch.Tensor]:
        tensors = load(path, key)
        alive.append(weakref.ref(tensors["layer.weight"]))
        assert sum(ref() is not None for ref in alive) <= 2
        return tensors

    monkeypatch.setattr(module, "load_checkpoint", counted)
    average_checkpoints(tmp_path, [0.1, 0.2], warn_above=9)
    assert len(alive) == len(STEPS)


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
    with pytest.raises(ValueError, match="nowhere is no folder"):
        average_checkpoints(tmp_path / "nowhere", [0.1])
    with pytest.raises(ValueError, match=r"1\.pt does not exist"):
        average_checkpoints([tmp_path / "1.pt"], [0.1])
    for content, message in [
        (b"no checkpoint", "100.pt (is damaged or no checkpoint|holds more than tensors)"),
        ({"a": 1, "b": {}}, "where the weights are is unclear; give key, one of 'a', 'b'"),
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
        ValueError, match=r"00001-of-00002.safetensors is one part of a model in several files"
    ):
        average_checkpoints(tmp_path, [0.1])


def test_unclear_steps_are_refused(tmp_path: Path) -> None:
    for names, message in [
        (["final.pt"], "step of .*final.pt cannot be told"),
        (["a-1-2.pt"], "cannot be told from its name"),
        (["a1.pt", "b1.pt"], "both seem to be of step 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            average_checkpoints([Path("run") / n for n in names], [0.1])
    write(tmp_path, [100, 200])
    for t in (300, 0):
        with pytest.raises(ValueError, match=f"t {t} must be above start 0 and at most the last .* 200"):
            average_checkpoints(tmp_path, [0.1], t=t)
