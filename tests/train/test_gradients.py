"""Values that are not finite are zeroed, counted, logged, and stop the run when they stay."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_run import files_of, log_of, tiny_config, tiny_data

from edm2.train import Stopped, TrainConfig, Trainer, train
from edm2.train.gradients import clean_gradients


def test_norm_and_zeroing() -> None:
    finite = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert float(clean_gradients(finite)) == pytest.approx(5.0)
    assert finite[0].tolist() == [3.0, 0.0]
    bad = [torch.tensor([1.0, math.nan, -2.0]), torch.tensor([math.inf, -math.inf, 5.0])]
    assert not math.isfinite(float(clean_gradients(bad)))
    assert [g.tolist() for g in bad] == [[1.0, 0.0, -2.0], [0.0, 0.0, 5.0]]


class Poisoned(Trainer):
    """Has gradients that are NaN in one weight in some steps."""

    steps: tuple[int, ...] = ()

    def step(self, *, record: bool = False) -> None:
        bad = self.num_images // self.config.batch_size + 1 in self.steps
        weight = self.denoiser.unet.out_gain
        hook = weight.register_hook(lambda g: g * math.nan) if bad else None
        super().step(record=record)
        if hook is not None:
            hook.remove()


def poisoned(out: Path, steps: tuple[int, ...], config: TrainConfig | None = None) -> Poisoned:
    trainer = Poisoned(config or tiny_config(), tiny_data(), out)
    trainer.steps = steps
    trainer.resume()
    return trainer


def test_bad_steps_are_counted_and_leave_the_weight_alone(tmp_path: Path) -> None:
    trainer = poisoned(tmp_path / "run", (3, 4, 6, 13))
    seen = []

    def watch(trainer: Trainer) -> None:
        seen.append(trainer.denoiser.unet.out_gain.item())

    trainer.run(quiet=True, on_step=watch)
    # Adam's momentum moves a weight whose gradient is 0, but with no gradient so far it stays.
    assert all(math.isfinite(value) for value in seen)
    log = log_of(tmp_path / "run")
    assert [record["nonfinite_steps"] for record in log] == [0, 2, 1, 0, 0, 0, 1, 0, 0, 0]
    assert log[1]["loss"] is None  # both steps of that line were bad
    assert all(math.isfinite(record["loss"]) for record in log if record["loss"] is not None)


def test_a_weight_with_only_bad_gradients_does_not_move(tmp_path: Path) -> None:
    trainer = poisoned(tmp_path / "run", (1, 2))
    trainer.step()
    trainer.step()
    assert trainer.denoiser.unet.out_gain.item() == 0.0


def test_too_many_in_a_row_stop_the_run(tmp_path: Path) -> None:
    config = tiny_config(stop_after_nonfinite=3)
    trainer = poisoned(tmp_path / "run", (3, 4, 7, 8, 9, 10), config)
    told = (
        r"in 3 steps in a row, from step 7 \(image 48\) on. The newest checkpoint is .*/checkpoints/000000000040, from "
        r"before; the same command would end here again. .*: these changes need a new --out. Only --loss-scaling"
    )
    with pytest.raises(FloatingPointError, match=told):
        trainer.run(quiet=True)
    assert trainer.num_images == 72
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["000000000040"]


def test_nothing_saved_yet(tmp_path: Path) -> None:
    trainer = poisoned(tmp_path / "run", (1, 2), tiny_config(stop_after_nonfinite=2))
    with pytest.raises(FloatingPointError, match="The newest checkpoint is none yet; the same command"):
        trainer.run(quiet=True)


def saved(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir())


def test_bad_steps_take_no_checkpoint_away(tmp_path: Path) -> None:
    """Steps 10 to 14 are bad; 5, 10, 15 and 20 end where a checkpoint is due."""

    def stop(trainer: Trainer) -> None:
        if trainer.num_images == 96:
            trainer.request_stop()

    config, bad = tiny_config(keep_checkpoints=1), (10, 11, 12, 13, 14)
    with pytest.raises(Stopped, match=r"not saved, because .* infinite in the last 3 steps"):
        poisoned(tmp_path / "run", bad, config).run(quiet=True, on_step=stop)
    assert saved(tmp_path / "run") == [40]
    poisoned(tmp_path / "run", bad, config).run(quiet=True)
    assert saved(tmp_path / "run") == [160]


def test_a_checkpoint_that_was_due_comes_when_steps_are_good_again(tmp_path: Path) -> None:
    config, bad = tiny_config(keep_checkpoints=9, keep_every=2), (10, 11, 20)

    def stop(trainer: Trainer) -> None:
        if trainer.num_images == 96:  # where the late one is written
            trainer.request_stop()

    poisoned(tmp_path / "whole", bad, config).run(quiet=True)
    assert saved(tmp_path / "whole") == [40, 96, 120, 160]
    state = json.loads((tmp_path / "whole/checkpoints/000000000096/manifest.json").read_text())
    assert state["role"] == "milestone"
    with pytest.raises(Stopped, match="checkpoint written"):
        poisoned(tmp_path / "pieces", bad, config).run(quiet=True, on_step=stop)
    poisoned(tmp_path / "pieces", bad, config).run(quiet=True)
    assert files_of(tmp_path / "pieces") == files_of(tmp_path / "whole")


def test_the_count_survives_a_stop(tmp_path: Path) -> None:
    def stop(trainer: Trainer) -> None:
        if trainer.num_images == 72:
            trainer.request_stop()

    config = tiny_config(stop_after_nonfinite=3)
    with pytest.raises(Stopped, match="not saved"):
        poisoned(tmp_path / "run", (8, 9, 10), config).run(quiet=True, on_step=stop)
    with pytest.raises(FloatingPointError, match=r"from step 8 \(image 56\)"):
        poisoned(tmp_path / "run", (8, 9, 10), config).run(quiet=True)


def test_bad_steps_are_the_same_run_too(tmp_path: Path) -> None:
    whole = poisoned(tmp_path / "whole", (6, 12))
    whole.run(quiet=True)
    whole.finish()
    train(tiny_config(), tmp_path / "clean", dataset=tiny_data(), quiet=True)
    name = "model.safetensors"
    assert files_of(tmp_path / "whole")[name] != files_of(tmp_path / "clean")[name]
