"""The real Trainer: its averages are the exact ones, also after a stop and a resume."""

from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from edm2.ema import PowerEMA, Target, average_checkpoints, reconstruct  # noqa: E402
from edm2.ema.callbacks.transformers import STATE_FILE, PowerEMACallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layer(x) - labels).square().mean()}


class Watch(transformers.TrainerCallback):
    """Keeps the weights after every step, in float64."""

    def __init__(self) -> None:
        self.weights: dict[int, torch.Tensor] = {}

    def on_step_end(self, args, state, control, *, model, **_):
        self.weights[state.global_step] = model.layer.weight.detach().double().clone()


def trainer(folder: Path, callbacks: list[transformers.TrainerCallback], steps: int = 12, **options):
    generator = torch.Generator().manual_seed(0)
    data = [
        {"x": torch.randn(3, generator=generator), "labels": torch.randn(1, generator=generator)}
        for _ in range(48)
    ]
    arguments = transformers.TrainingArguments(
        str(folder / "out"), per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=0.1,
        max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=100,
        **{"save_steps": 6, **options},
    )  # fmt: skip
    return transformers.Trainer(
        Line(), arguments, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks
    )


def truth(weights: dict[int, torch.Tensor], sigma_rel: float) -> torch.Tensor:
    holder = nn.ParameterDict({"w": nn.Parameter(next(iter(weights.values())).clone())})
    ema = PowerEMA(holder, (sigma_rel,), dtype=torch.float64)
    for step, weight in weights.items():
        holder["w"].data.copy_(weight)
        ema.update(step)
    return ema.average(sigma_rel)["w"]


def test_average_counts_optimiser_steps_and_comes_with_every_checkpoint(tmp_path: Path) -> None:
    watch, callback = Watch(), PowerEMACallback(tmp_path / "ema", (0.05, 0.1))
    trainer(tmp_path, [watch, callback]).train()
    assert sorted(watch.weights) == list(range(1, 13))
    result = reconstruct(tmp_path / "ema", sigma_rel=0.1)
    exact = truth(watch.weights, 0.1)
    assert (result.tensors["layer.weight"] - exact).norm() < 1e-6 * exact.norm()
    assert result.clock == "steps"
    assert reconstruct(tmp_path / "ema", sigma_rel=0.05, t=6).t == 6


def test_checkpoints_of_the_trainer_are_averaged_without_a_callback(tmp_path: Path) -> None:
    watch = Watch()
    job = trainer(tmp_path, [watch])
    job.train()
    job.save_model()
    assert (tmp_path / "out" / "checkpoint-6" / "optimizer.pt").exists()
    (result,) = average_checkpoints(tmp_path / "out", [Target.uniform(12)], warn_above=9)
    mean = (watch.weights[6] + watch.weights[12]) / 2
    assert (result.tensors["layer.weight"] - mean).norm() < 1e-6 * mean.norm()


def test_resumed_training_goes_on_exactly(tmp_path: Path) -> None:
    through = PowerEMACallback(tmp_path / "ema_through")
    trainer(tmp_path / "through", [through]).train()
    checkpoint = tmp_path / "through" / "out" / "checkpoint-6"
    resumed = PowerEMACallback(tmp_path / "ema_resumed")
    trainer(tmp_path / "through", [resumed]).train(resume_from_checkpoint=str(checkpoint))
    assert through.ema is not None
    assert resumed.ema is not None
    assert resumed.ema.run_id == through.ema.run_id
    for sigma_rel in (0.05, 0.1):
        one, other = (c.ema.average(sigma_rel)["layer.weight"] for c in (through, resumed))
        assert torch.equal(one, other)
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=rf"resumes at step 6 but .*{STATE_FILE} is missing"):
        trainer(tmp_path / "through", [resumed]).train(resume_from_checkpoint=str(checkpoint))


def test_average_is_evaluated_and_the_last_step_counts(tmp_path: Path) -> None:
    callback = PowerEMACallback(tmp_path / "ema", (0.1,), every=5)
    job = trainer(tmp_path, [callback])
    job.train()
    assert callback.ema is not None
    assert callback.ema.t == 12
    before = job.model.layer.weight.clone()
    with callback.ema.applied(job.model, 0.1):
        averaged = job.evaluate(job.train_dataset)["eval_loss"]
    assert torch.equal(job.model.layer.weight, before)
    assert averaged != job.evaluate(job.train_dataset)["eval_loss"]
    with pytest.raises(ValueError, match="every 0 must be at least 1"):
        PowerEMACallback(tmp_path, every=0)


def test_best_weights_that_are_loaded_at_the_end_stay_out_of_the_average(tmp_path: Path) -> None:
    """`on_train_end` comes after the Trainer has put the best checkpoint's weights into the model."""
    watch, callback = Watch(), PowerEMACallback(tmp_path / "ema", (0.1,), every=5)
    job = trainer(
        tmp_path, [watch, callback], eval_strategy="steps", eval_steps=3, save_steps=3, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    job.train()
    assert not job.state.best_model_checkpoint.endswith("-12")
    assert not torch.equal(job.model.layer.weight.double(), watch.weights[12])
    assert callback.ema is not None
    exact = truth({step: watch.weights[step] for step in (5, 10, 12)}, 0.1)
    assert (callback.ema.average(0.1)["layer.weight"] - exact).norm() < 1e-6 * exact.norm()
    assert reconstruct(tmp_path / "ema", sigma_rel=0.1).t == 12


def test_a_run_without_averages_may_start_them_late(tmp_path: Path) -> None:
    trainer(tmp_path, []).train()
    callback = PowerEMACallback(tmp_path / "ema", (0.1,), start=6)
    trainer(tmp_path, [callback]).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert callback.ema is not None
    assert (callback.ema.start, callback.ema.t) == (6, 12)
