"""The training loop.

Everything random is a function of (seed, position of the image in the run), so a run that is stopped and
continued is the run that was never stopped, bit for bit.

Ref: EDM2 Sec. 2-3, App. B; SPEC sections 3-5.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edm2.data import ImageDataset, indices
from edm2.diffusion import draw_sigma, edm2_loss, save_model
from edm2.ema import PowerEMA
from edm2.nn import ForcedWeightNorm, keyed_normal, use_channels_last
from edm2.nn.magnitudes import MagnitudeRecorder
from edm2.progress import Progress
from edm2.train import run_folder
from edm2.train.build import build_denoiser, open_training_data, pick_device, versions
from edm2.train.checkpoint import Role, load_newest, prune, save_checkpoint
from edm2.train.coding import Coding, make_coding
from edm2.train.config import TrainConfig
from edm2.train.gradients import clean_gradients
from edm2.train.schedule import learning_rate
from edm2.train.signals import Stopped, stop_requests
from edm2.train.trackers import Tracker, numbers

# Streams of keyed random numbers; dropout blocks count up from 0 under a seed of their own.
_SIGMA, _NOISE = 0, 1
_DROPOUT_SEED_OFFSET = 1 << 62


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    dataset: ImageDataset | None = None,
    preset: str = "",
    quiet: bool = False,
    on_step: Callable[["Trainer"], None] | None = None,
    trackers: Sequence[Tracker] = (),
) -> Path:
    """Train, or continue the run that the folder holds.

    Args:
        config: all settings.
        out: folder of the run.
        dataset: training images; default: those that the configuration names.
        preset: name that the settings come from, noted in the files.
        quiet: show no progress.
        on_step: called after every step, for callers who want to look inside.
        trackers: told whatever is logged, see `edm2.train.trackers`.

    Returns:
        The final model's file: the longest tracked average at the end of the run.

    Raises:
        ValueError: for bad settings or data, a folder that holds another run, or damaged checkpoints.
        FloatingPointError: if losses or gradients stay non-finite.
        Stopped: after SIGINT, SIGTERM or `Trainer.request_stop`, once a checkpoint is written.
    """
    dataset = open_training_data(config) if dataset is None else dataset
    trainer = Trainer(config, dataset, Path(out), preset=preset)
    trainer.resume()
    trainer.trackers = trackers
    for tracker in trackers:
        tracker.start(trainer.out, trainer.ema.run_id, config.to_json(), trainer.num_images)
    try:
        trainer.run(quiet=quiet, on_step=on_step)
    finally:
        for tracker in trackers:
            tracker.finish()
    return trainer.finish()


class Trainer:
    """A run's state: network, optimiser, averages and position; `run` moves it forward.

    Args:
        config: all settings.
        dataset: training images.
        out: folder of the run; claimed at once.
        preset: name that the settings come from.

    Attributes:
        denoiser: the network in training mode.
        num_images: images seen.
        trackers: told whatever is logged.
    """

    trackers: Sequence[Tracker] = ()

    def __init__(self, config: TrainConfig, dataset: ImageDataset, out: Path, *, preset: str = "") -> None:
        self.config, self.dataset, self.out = config, dataset, out
        self.device = pick_device(config.device)
        self.coding: Coding = make_coding(config, dataset)
        run_id = config.run_id(dataset.fingerprint)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.denoiser = build_denoiser(config, dataset, self.coding)
        run_folder.claim(out, {"preset": preset, **config.to_json()}, config.identity(), run_id)

        self.denoiser = self.denoiser.train().to(self.device)
        if config.channels_last:
            use_channels_last(self.denoiser)
        self.force_norm = ForcedWeightNorm(self.denoiser)
        options = config.optimizer
        self.optimizer = torch.optim.Adam(
            self.denoiser.parameters(), lr=0.0, betas=options.betas, eps=options.eps, fused=True
        )
        self.ema = PowerEMA(self.denoiser, config.ema.sigma_rels, clock="images", run_id=run_id)
        self._forward: Any = torch.compile(self.denoiser) if config.compile else self.denoiser
        self._recorder = MagnitudeRecorder(self.denoiser) if config.record_magnitudes else None
        self.info = {
            "preset": preset,
            "coding": self.coding.to_json(),
            "class_names": list(dataset.class_names),
            "data": dataset.name,
        }
        self.num_images = 0
        self._stop = False
        # Sums since the last line of the log: loss, gradient norm, steps, steps that were not finite.
        self._sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self._bad_in_a_row = torch.zeros((), dtype=torch.float64, device=self.device)

    def resume(self) -> None:
        """Take up the newest whole checkpoint, if there is one."""
        folder = self.out / run_folder.CHECKPOINTS
        found = load_newest(folder, run_id=self.ema.run_id)
        prune(folder, keep=self.config.keep_checkpoints)
        if found is not None:
            self._restore(*found)
        for name in (run_folder.LOG_FILE, run_folder.MAGNITUDES_FILE):
            run_folder.rewind_log(self.out, self.num_images, name)

    def run(self, *, quiet: bool = False, on_step: Callable[["Trainer"], None] | None = None) -> None:
        """Train until `config.num_images`, saving on the way and at the end."""
        config = self.config
        end = config.num_steps * config.batch_size
        first, start = self.num_images, time.monotonic()
        with (
            Progress("training", end, "images", done=min(self.num_images, end), quiet=quiet) as progress,
            stop_requests() as stop_requested,
        ):
            while self.num_images < end:
                self.step(record=self.is_due(config.log_images, self.num_images + config.batch_size))
                if on_step is not None:
                    on_step(self)
                fields = {}
                if self.is_due(config.log_images, self.num_images):
                    now = time.monotonic()
                    fields = self._log(
                        seconds=round(now - start, 3),
                        images_per_second=round((self.num_images - first) / max(now - start, 1e-9), 2),
                    )
                progress.advance(config.batch_size, **fields)
                if self.is_due(config.snapshot_images, self.num_images):
                    self.snapshot()
                due = self.is_due(config.checkpoint_images, self.num_images)
                if due:
                    self.checkpoint()
                if (self._stop or stop_requested()) and not self._is_last(self.num_images):
                    if not due:
                        self.checkpoint(role="passing")
                    raise Stopped(
                        f"stopped at {self.num_images} of {end} images, checkpoint written; the same command continues"
                    )

    def step(self, *, record: bool = False) -> None:
        """One optimiser step on the next `batch_size` images.

        Args:
            record: write the step's magnitudes down, if the configuration wants them.
        """
        self._set_learning_rate()
        self.force_norm()
        if self._recorder is None or not record:
            return self._step(self._forward)
        with self._recorder.step():
            self._step(self.denoiser)
        found = dataclasses.asdict(self._recorder.read())
        run_folder.append_log(self.out, {"num_images": self.num_images, **found}, run_folder.MAGNITUDES_FILE)

    def _set_learning_rate(self) -> None:
        config = self.config
        lr = learning_rate(
            self.num_images,
            batch_size=config.batch_size,
            ref_lr=config.optimizer.ref_lr,
            ref_batches=config.optimizer.ref_batches,
            rampup_mimg=config.optimizer.rampup_mimg,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _step(self, forward: Any) -> None:
        config = self.config
        batch = config.batch_size
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        size = config.microbatch or batch
        for start in range(self.num_images, self.num_images + batch, size):
            loss = self._loss(forward, start, size)
            (loss.sum() / batch).backward()
            loss_sum += loss.detach().mean(dtype=torch.float64) * (size / batch)
        norm = clean_gradients([p.grad for p in self.denoiser.parameters() if p.grad is not None])
        self.optimizer.step()
        self.num_images += batch
        self.ema.update(self.num_images)
        self._account(loss_sum, norm)

    def _loss(self, forward: Any, position: int, count: int) -> Tensor:
        config = self.config
        chosen = indices(position, count, size=len(self.dataset), seed=config.seed)
        where = torch.arange(position, position + count, device=self.device)
        stored = torch.from_numpy(self.dataset.images(chosen)).to(self.device)
        images = self.coding.encode(stored, where, seed=config.seed)
        labels = None
        if self.dataset.num_classes:
            labels = torch.from_numpy(np.ascontiguousarray(self.dataset.labels(chosen))).to(self.device)
        sigma = draw_sigma(
            where, p_mean=config.loss.p_mean, p_std=config.loss.p_std, seed=config.seed, stream=_SIGMA
        )
        noise = keyed_normal(where, images.shape[1:], seed=config.seed, stream=_NOISE)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        return edm2_loss(
            forward,
            images.to(memory_format=layout),
            labels,
            sigma,
            noise,
            dropout_index=where,
            dropout_seed=config.seed + _DROPOUT_SEED_OFFSET,
        )

    def _account(self, loss: Tensor, norm: Tensor) -> None:
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        zero = torch.zeros_like(self._bad_in_a_row)
        self._sums += torch.stack(
            [
                torch.where(finite, loss, zero),
                torch.where(finite, norm.double(), zero),
                finite.double(),
                1 - finite.double(),
            ]
        )
        self._bad_in_a_row = torch.where(finite, zero, self._bad_in_a_row + 1)
        # Elsewhere than on the CPU this would wait for the device: there it is asked when a line is logged.
        if self.device.type == "cpu":
            self._check_finite()

    def _check_finite(self) -> None:
        bad, config = int(self._bad_in_a_row), self.config
        if bad >= config.stop_after_nonfinite:
            first = self.num_images // config.batch_size - bad + 1
            raise FloatingPointError(
                f"loss or gradients were NaN or infinite in {bad} steps in a row, from step {first} (image "
                f"{(first - 1) * config.batch_size}) on: lower --optimizer.ref-lr, use --dtype float32 or bfloat16, "
                f"and look for bad values in the data. The newest checkpoint in {self.out} is from before"
            )

    def _log(self, **timing: float) -> dict[str, Any]:
        self._check_finite()
        loss, norm, good, bad = self._sums.tolist()
        self._sums.zero_()
        record = {
            "num_images": self.num_images,
            "loss": loss / good if good else None,
            "grad_norm": norm / good if good else None,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "nonfinite_steps": int(bad),
        }
        run_folder.append_log(self.out, {**record, **timing})
        for tracker in self.trackers:
            tracker.log(self.num_images, numbers({**record, **timing}))
        shown = {"loss": record["loss"]} if good else {}
        return shown | ({"nonfinite_steps": int(bad)} if bad else {})

    def snapshot(self) -> None:
        """Add the averages to the run's snapshots."""
        self.ema.snapshot(
            self.out / run_folder.SNAPSHOTS,
            metadata={"network": self.denoiser.config, "info": self.info},
            dtype=self.config.ema.dtype,
        )

    def request_stop(self) -> None:
        """Stop after this step, as a signal would."""
        self._stop = True

    def checkpoint(self, *, role: Role = "regular") -> None:
        """Write everything that is needed to go on; see `save_checkpoint` for its role."""
        optimizer = {
            f"{key}.{name}": value
            for name, p in self.denoiser.named_parameters()
            for key, value in self.optimizer.state[p].items()
        }
        average = self.ema.state_dict()
        tensors = {key: value for key, value in average.items() if isinstance(value, Tensor)}
        state = {
            "num_images": self.num_images,
            "ema": {key: value for key, value in average.items() if key not in tensors},
            "sums": self._sums.tolist(),
            "bad_in_a_row": int(self._bad_in_a_row),
            "versions": versions(),
            "settings": self.config.identity(),
        }
        save_checkpoint(
            self.out / run_folder.CHECKPOINTS,
            self.num_images,
            {"model": self.denoiser.state_dict(), "optimizer": optimizer, "ema": tensors},
            state,
            keep=self.config.keep_checkpoints,
            role=role,
        )

    def _restore(self, groups: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        self.denoiser.load_state_dict(groups["model"])
        for name, p in self.denoiser.named_parameters():
            moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            for key, value in moments.items():
                value.copy_(groups["optimizer"][f"{key}.{name}"])
            step = groups["optimizer"][f"step.{name}"].to(self.device)
            self.optimizer.state[p] = {"step": step, **moments}
        self.ema.load_state_dict({**state["ema"], **groups["ema"]})
        self.num_images = state["num_images"]
        self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self._bad_in_a_row.fill_(state["bad_in_a_row"])

    def finish(self) -> Path:
        """Write the longest tracked average as the run's model, and return its file."""
        longest = max(self.ema.sigma_rels)
        tensors = {**self.denoiser.state_dict(), **self.ema.average(longest)}
        info = {**self.info, "sigma_rel": longest, "num_images": self.num_images, "run_id": self.ema.run_id}
        return save_model(self.out, self.denoiser.config, tensors, info, overwrite=True)

    def is_due(self, interval: int, num_images: int | None = None) -> bool:
        """Whether the step that ends at `num_images`, or the last one taken, passes a multiple of the interval or
        ends the run.
        """
        num_images = self.num_images if num_images is None else num_images
        batch = self.config.batch_size
        return num_images // interval != (num_images - batch) // interval or self._is_last(num_images)

    def _is_last(self, num_images: int) -> bool:
        return num_images >= self.config.num_images
