"""A run that is stopped and continued is the run that was never stopped, bit for bit."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from tiny_run import files_of, log_of, tiny_config, tiny_data, tiny_network

from edm2.data import ArrayDataset
from edm2.diffusion import Denoiser, read_model_header
from edm2.files import sha256_of
from edm2.nn import MPConv, rms
from edm2.train import DataConfig, Stopped, TrainConfig, Trainer, train


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "undisturbed"
    train(tiny_config(), out, dataset=tiny_data(), quiet=True)
    return out


class _Killed(Exception):
    pass


def kill_at(num_images: int) -> Any:
    def on_step(trainer: Trainer) -> None:
        if trainer.num_images == num_images:
            raise _Killed

    return on_step


def stop_at(num_images: int) -> Any:
    """A stop asked for while the step runs, as by a signal."""

    def on_step(trainer: Trainer) -> None:
        if trainer.num_images == num_images:
            trainer.request_stop()

    return on_step


def train_in_pieces(config: TrainConfig, out: Path, *pieces: Any) -> None:
    for on_step in pieces:
        with pytest.raises((_Killed, Stopped)):
            train(config, out, dataset=tiny_data(), quiet=True, on_step=on_step)
    train(config, out, dataset=tiny_data(), quiet=True)


def test_equal_runs_are_equal_bytes(undisturbed: Path, tmp_path: Path) -> None:
    train(tiny_config(), tmp_path / "run", dataset=tiny_data(), quiet=True)
    assert files_of(tmp_path / "run") == files_of(undisturbed)
    assert log_of(tmp_path / "run") == log_of(undisturbed)


def test_another_seed_is_another_run(undisturbed: Path, tmp_path: Path) -> None:
    train(tiny_config(seed=1), tmp_path / "run", dataset=tiny_data(), quiet=True)
    assert files_of(tmp_path / "run")["model.safetensors"] != files_of(undisturbed)["model.safetensors"]


@pytest.mark.parametrize(
    "pieces",
    [
        [stop_at(72)],
        [stop_at(80)],  # where a checkpoint and a snapshot are due anyway
        [stop_at(8), stop_at(16), stop_at(144)],
        [kill_at(72)],  # back to 40
        [kill_at(16)],  # back to the very start
        [kill_at(160)],  # after the last step, before anything of it is written
        [stop_at(88), kill_at(112), stop_at(96)],
    ],
    ids=["stop", "stop_at_checkpoint", "stops", "kill", "kill_early", "kill_last", "both"],
)
def test_pieces_equal_the_whole(undisturbed: Path, tmp_path: Path, pieces: list[Any]) -> None:
    out = tmp_path / "run"
    train_in_pieces(tiny_config(), out, *pieces)
    assert files_of(out) == files_of(undisturbed)
    assert log_of(out) == log_of(undisturbed)


@pytest.mark.parametrize("keep", [1, 3])
def test_stops_leave_the_checkpoints_that_are_to_be_kept(tmp_path: Path, keep: int) -> None:
    config = tiny_config(keep_checkpoints=keep)
    train(config, tmp_path / "whole", dataset=tiny_data(), quiet=True)
    train_in_pieces(config, tmp_path / "pieces", stop_at(48), stop_at(72), stop_at(80), stop_at(128))
    assert files_of(tmp_path / "pieces") == files_of(tmp_path / "whole")
    assert len(list((tmp_path / "whole" / "checkpoints").iterdir())) == keep


def test_the_state_that_is_restored(tmp_path: Path) -> None:
    trainers: list[Trainer] = []

    def look(trainer: Trainer) -> None:
        if trainer.num_images == 64:
            trainers.append(trainer)
            raise _Killed

    config = tiny_config(checkpoint_images=24)
    for name in ("whole", "pieces"):
        if name == "pieces":
            with pytest.raises(_Killed):
                train(config, tmp_path / name, dataset=tiny_data(), quiet=True, on_step=kill_at(56))
        with pytest.raises(_Killed):
            train(config, tmp_path / name, dataset=tiny_data(), quiet=True, on_step=look)
    one, other = trainers
    for name, value in one.denoiser.state_dict().items():
        assert torch.equal(value, other.denoiser.state_dict()[name]), name
    for p, q in zip(one.denoiser.parameters(), other.denoiser.parameters(), strict=True):
        for key, value in one.optimizer.state[p].items():
            assert torch.equal(value, other.optimizer.state[q][key]), key
    for sigma_rel in one.ema.sigma_rels:
        average = other.ema.average(sigma_rel)
        assert all(torch.equal(v, average[k]) for k, v in one.ema.average(sigma_rel).items())


def test_a_finished_run_stays_as_it_is(undisturbed: Path) -> None:
    before = files_of(undisturbed)
    train(tiny_config(), undisturbed, dataset=tiny_data(), quiet=True)
    assert files_of(undisturbed) == before


def test_a_run_can_be_made_longer(tmp_path: Path) -> None:
    train(tiny_config(num_images=80), tmp_path / "longer", dataset=tiny_data(), quiet=True)
    train(tiny_config(), tmp_path / "longer", dataset=tiny_data(), quiet=True)
    train(tiny_config(), tmp_path / "whole", dataset=tiny_data(), quiet=True)
    assert files_of(tmp_path / "longer") == files_of(tmp_path / "whole")


def test_data_and_preset_may_get_other_names(undisturbed: Path, tmp_path: Path) -> None:
    def named(name: str) -> ArrayDataset:
        data = tiny_data()
        data.name = name
        return data

    with pytest.raises(Stopped):
        train(tiny_config(data="old"), tmp_path / "run", dataset=tiny_data(), quiet=True, on_step=stop_at(96))
    model = train(
        tiny_config(data="new"), tmp_path / "run", dataset=named("moved"), quiet=True, preset="mine"
    )
    info = read_model_header(model)[1]["info"]
    assert (info["data"], info["preset"]) == ("moved", "mine")
    tensors = load_file(model)
    assert all(torch.equal(v, tensors[k]) for k, v in load_file(undisturbed / "model.safetensors").items())
    # Snapshots say what the run was when they began.
    found = files_of(tmp_path / "run")
    wanted = {name: digest for name, digest in files_of(undisturbed).items() if name.startswith("snapshots")}
    assert wanted == {name: found[name] for name in wanted}


@pytest.mark.parametrize("finished", [False, True])
def test_checkpoints_that_were_taken_away(tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "run"
    with contextlib.nullcontext() if finished else pytest.raises(_Killed):
        train(tiny_config(), out, dataset=tiny_data(), quiet=True, on_step=None if finished else kill_at(72))
    shutil.rmtree(out / "checkpoints")
    if finished:
        (out / "checkpoints").mkdir()
    before, lines = files_of(out), log_of(out)
    with pytest.raises(
        ValueError,
        match=r"holds a .*run whose checkpoints are missing: restore .*checkpoints from a copy, choose",
    ):
        train(tiny_config(), out, dataset=tiny_data(), quiet=True)
    assert files_of(out) == before
    assert log_of(out) == lines


def test_weights_are_normalised_before_every_step(tmp_path: Path) -> None:
    """Without it they would grow: the update of config G is orthogonal to them, and Adam's is not small."""
    trainer = Trainer(tiny_config(), tiny_data(), tmp_path / "run")
    seen: list[float] = []

    def look(module: Denoiser, inputs: object) -> None:
        layers = [m for m in module.modules() if isinstance(m, MPConv)]
        seen.extend(
            float(rms(m.weight.detach(), tuple(range(1, m.weight.ndim))).sub(1).abs().max()) for m in layers
        )

    trainer.denoiser.register_forward_pre_hook(look)
    for _ in range(4):
        trainer.step()
    assert len(seen) > 20
    assert max(seen) < 2e-3


def test_a_length_that_the_batch_does_not_divide(tmp_path: Path) -> None:
    config = tiny_config(num_images=61, checkpoint_images=1000, snapshot_images=1000)
    train_in_pieces(config, tmp_path / "run", stop_at(48))
    assert log_of(tmp_path / "run")[-1]["num_images"] == 64
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["000000000064"]


def test_log_is_rewound(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(_Killed):
        train(tiny_config(), out, dataset=tiny_data(), quiet=True, on_step=kill_at(72))
    assert [record["num_images"] for record in log_of(out)] == [16, 32, 48, 64]
    with open(out / "log.jsonl", "a") as file:
        file.write('{"num_images": 72, "lo')  # cut short by a kill
    with pytest.warns(UserWarning, match="line 5 is damaged"), pytest.raises(_Killed):
        train(tiny_config(), out, dataset=tiny_data(), quiet=True, on_step=kill_at(48))
    # Everything after the checkpoint at 40 was dropped, and what came again is there once.
    assert [record["num_images"] for record in log_of(out)] == [16, 32]
    assert all(json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())


def test_gradient_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    whole = Trainer(tiny_config(), tiny_data(), tmp_path / "whole")
    parts = Trainer(tiny_config(microbatch=2), tiny_data(), tmp_path / "parts")
    for _ in range(3):
        whole.step()
        parts.step()
    for p, q in zip(whole.denoiser.parameters(), parts.denoiser.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
    for p, q in zip(whole.denoiser.parameters(), parts.denoiser.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    logs = {}
    for dtype in ("float32", "bfloat16"):
        train(tiny_config(dtype=dtype), tmp_path / dtype, dataset=tiny_data(), quiet=True)
        logs[dtype] = [record["loss"] for record in log_of(tmp_path / dtype)]
    assert logs["bfloat16"] != logs["float32"]
    assert logs["bfloat16"] == pytest.approx(logs["float32"], rel=0.02)


def test_latents_are_drawn_anew_and_resume(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    moments = np.concatenate([rng.normal(3, 2, (40, 2, 4, 4)), np.full((40, 2, 4, 4), 0.5)], axis=1)
    data = ArrayDataset(moments.astype(np.float32), name="latents")
    coding = DataConfig(coding="latents", mean=(3.0, 3.0), std=(2.0, 2.0))
    config = tiny_config(dataset=coding, network=tiny_network(dropout=0.0))
    train(config, tmp_path / "whole", dataset=data, quiet=True)
    with pytest.raises(Stopped):
        train(config, tmp_path / "pieces", dataset=data, quiet=True, on_step=stop_at(72))
    train(config, tmp_path / "pieces", dataset=data, quiet=True)
    assert files_of(tmp_path / "pieces") == files_of(tmp_path / "whole")


def test_a_checkpoint_with_right_checksums_and_other_content_is_named(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(tiny_config(), tmp_path / "run", dataset=tiny_data(), quiet=True, on_step=stop_at(8))
    checkpoint = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    whole = {path: path.read_bytes() for path in checkpoint.iterdir()}
    state = json.loads(whole[checkpoint / "state.json"])
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(iter(tensors))
    for file, content, told in (
        (
            "state.json",
            json.dumps({**state, "tally": None}).encode(),
            "a NoneType where an object is expected",
        ),
        (
            "state.json",
            json.dumps({**state, "tally": {"sums": [0.0], "bad_in_a_row": 0}}).encode(),
            "1 sums in place",
        ),
        ("state.json", json.dumps({**state, "snapshots": 1}).encode(), "snapshots, which is a int"),
        ("state.json", json.dumps({**state, "ema": []}).encode(), ""),
        ("model.safetensors", b"\xff" * 50, "model.safetensors is damaged"),
        ("model.safetensors", save({**tensors, name: torch.zeros(1, 2, 3)}), r"has the shape \[1, 2, 3\]"),
        ("model.safetensors", save({k: v for k, v in tensors.items() if k != name}), re.escape(name)),
    ):
        (checkpoint / file).write_bytes(content)
        manifest = json.loads(whole[checkpoint / "manifest.json"])
        manifest["files"][file] = {"num_bytes": len(content), "sha256": sha256_of(checkpoint / file)}
        del manifest["sha256"]
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(
            ValueError, match=f"checkpoint {checkpoint.name} of .* is not one of this run .*{told}"
        ):
            train(tiny_config(), tmp_path / "run", dataset=tiny_data(), quiet=True)
        for path, data in whole.items():
            path.write_bytes(data)
