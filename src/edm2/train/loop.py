"""The training loop.

Everything random is a function of (seed, position of the image in the run), so a run that is stopped and
continued gives the same bits as one that was never stopped.

Ref: EDM2 Sec. 2-3, App. B.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from edm2.data import ImageDataset
from edm2.diffusion import MODEL_FILE, NetworkFunction, register_network
from edm2.ema import PowerEMA
from edm2.nn.magnitudes import MagnitudeRecorder
from edm2.progress import Progress, tell
from edm2.train import run_folder
from edm2.train.assembly import assemble
from edm2.train.build import ema_device, pick_device
from edm2.train.checkpoint import Role, newest
from edm2.train.config import TrainConfig
from edm2.train.loggers import Logger
from edm2.train.memory import gpu_sensors, size_text, used_bytes
from edm2.train.outputs import Outputs
from edm2.train.records import Records
from edm2.train.residual import Residual, keep_residual
from edm2.train.signals import Stopped, stop_requests
from edm2.train.state import gather, scatter
from edm2.train.stepper import Stepper
from edm2.train.tally import Tally, nonfinite_error
from edm2.train.validation import Validation, best_moments, has_ended, store_split
from edm2.train.world import World


class Trainer:
    """State of a run: network, optimiser, averages and position. `run` trains.

    Args:
        config: All settings.
        dataset: Training images.
        out: Folder of the run, visible to all processes; the constructor claims it.
        network: As in `train`.
        preset: Name of the preset behind the settings.
        world: Processes that share the work. Default: this one alone.

    Attributes:
        denoiser: The network in training mode.
        optimizer: Its optimiser.
        ema: The averages; None on all processes but the first, unless the network is sharded.
        dataset: Images that it is trained on.
        held_out: Images that it is validated on; None without any.
        num_images: Images seen.
        run_id: Name of the run.

    Raises:
        ValueError: As in `train`.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: ImageDataset,
        out: Path,
        *,
        network: NetworkFunction | None = None,
        preset: str = "",
        world: World | None = None,
    ) -> None:
        if network is not None:
            config = dataclasses.replace(config, network_from=register_network(network))
        self._start = time.monotonic()
        self.world = World(rank=0, size=1, device=pick_device(config.device)) if world is None else world
        self.device = self.world.device
        parts = assemble(config, dataset, out, preset=preset, device=self.device)
        self.config, self.dataset, self.held_out, self.out = config, parts.dataset, parts.held_out, out
        self.coding, self.info = parts.coding, parts.info
        self.run_id = config.run_id(self.dataset.fingerprint, parts.models)
        settings = {"preset": preset, **config.to_json()}
        identity = config.identity(parts.models)
        self._stepper = Stepper(
            config, self.dataset, self.coding, parts.denoiser, self.world, parts.objective
        )
        self.world.on_first(lambda: run_folder.claim(out, settings, identity, self.run_id))
        self.residual: Residual | None = None
        if config.residual is not None:
            self.residual = keep_residual(config.residual, out, self.dataset, self.coding, self.world)
            self._stepper.residual = self.residual
            self.info["residual"] = self.residual.to_json()
        self._validation: Validation | None = None
        if self.held_out is not None:
            self._validation = Validation(config, self.held_out, self.coding, parts.objective, self.residual)
            store_split(out, self.held_out, self.world)
        self.denoiser, self.optimizer = self._stepper.denoiser, self._stepper.optimizer
        self.ema: PowerEMA | None = None
        if self.world.is_first or self._stepper.is_sharded:
            self.ema = PowerEMA(
                self.denoiser,
                config.ema.sigma_rels,
                clock="images",
                run_id=self.run_id,
                device=ema_device(config, self.denoiser),
            )
        recording = config.record_magnitudes and self.world.is_first and not self._stepper.is_sharded
        self._recorder = MagnitudeRecorder(self.denoiser) if recording else None
        self._records = Records(out, is_first=self.world.is_first)
        self._outputs = Outputs(
            config, out, settings=settings, run_id=self.run_id, info=self.info, records=self._records
        )
        self.num_images = 0
        self._saved: int | None = None
        self._due: Role | None = None
        self._stop = False
        self._is_flat = False
        self._tally = Tally(self.device)

    def resume(self) -> None:
        """Load the newest intact checkpoint, if there is one.

        Raises:
            ValueError: If the run had checkpoints and none is usable.
        """
        number = self.world.on_first(self._outputs.find_checkpoint)
        if number is not None:
            try:
                tensors, state = self._outputs.read_checkpoint(number)
                scatter(tensors, state["ema"], self.denoiser, self.optimizer, self.ema)
                self._tally.load_json(state["tally"])
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                raise ValueError(
                    f"checkpoint {number:012d} of {self.out} is not one of this run ({error}): restore it from a copy, "
                    "or move it away to continue from an older one"
                ) from error
            self.num_images = number
        self._records.rewind(self.num_images)
        self._is_flat = self.world.any(has_ended(self._records.validations(), self.config))
        under_way = self.world.is_first and not self._is_last(self.num_images)
        if under_way and (problems := self._outputs.lost_snapshots()):
            warnings.warn(f"{'; '.join(problems)}; the run continues without them", stacklevel=2)

    def logging_to(self, loggers: Sequence[Logger]) -> AbstractContextManager[None]:
        """Send everything that is logged to loggers, on the first process."""
        return self._records.logging_to(loggers, self.run_id, self.config.to_json(), self.num_images)

    def run(self, *, quiet: bool = False, on_step: Callable[["Trainer"], None] | None = None) -> None:
        """Train until `config.num_images`; save during the run and at the end.

        Args:
            quiet: Do not show progress.
            on_step: Called with the trainer after every step.

        Raises:
            FloatingPointError: If losses or gradients stay non-finite.
            OSError: If a file cannot be written; older checkpoints are untouched. If snapshots were lost.
            Stopped: When asked to stop, once a checkpoint is written.
        """
        config = self.config
        end = config.num_steps * config.batch_size
        first, start = self.num_images, time.monotonic()
        quiet = quiet or not self.world.is_first
        with (
            Progress("training", end, "images", done=min(self.num_images, end), quiet=quiet) as progress,
            stop_requests() as stop_requested,
            self._outputs.saver as saver,
        ):
            while not self._is_last(self.num_images):
                self.step(record=self.is_due(config.log_images, self.num_images + config.batch_size))
                if on_step is not None:
                    on_step(self)
                fields = {}
                if self.is_due(config.log_images):
                    now = time.monotonic()
                    fields = self._log(
                        seconds=round(now - start, 3),
                        images_per_second=round((self.num_images - first) / max(now - start, 1e-9), 2),
                    )
                progress.advance(config.batch_size, **fields)
                if self.is_due(config.validation_interval):
                    self.validate(quiet=quiet)
                if self.is_due(config.snapshot_interval):
                    self.snapshot()
                saver.check()
                self._checkpoint_if_due()
                self._stop_if_asked(stop_requested())

    def _checkpoint_if_due(self) -> None:
        if self.is_due(self.config.checkpoint_images):
            self._due = self._role()
        # While steps are non-finite, no checkpoint replaces an older one; the end of the run is saved in any case.
        if self._due is not None and (self._is_last(self.num_images) or not self._tally.bad_in_a_row):
            self.checkpoint(role=self._due)

    def _stop_if_asked(self, signalled: bool) -> None:
        config = self.config
        # Without torchrun nothing would restart or end these processes; the same command continues.
        late = config.max_hours is not None and time.monotonic() - self._start > config.max_hours * 3600
        if not self.world.any(self._stop or signalled or late or self.world.is_orphan) or self._is_last(
            self.num_images
        ):
            return
        saved = "checkpoint written"
        if bad := self._tally.bad_in_a_row:
            saved = f"not saved, because loss or gradients were NaN or infinite in the last {bad} steps"
        elif self._saved != self.num_images:
            self.checkpoint(role="passing")
        self._outputs.saver.wait()
        raise Stopped(
            f"stopped at {self.num_images} of {config.num_steps * config.batch_size} images, {saved}; the same "
            "command continues"
        )

    def step(self, *, record: bool = False) -> None:
        """Take one optimiser step on the next `batch_size` images.

        Args:
            record: Measure the norms of weights and update, and record the magnitudes of this step if the
                configuration says so.
        """
        self._stepper.prepare(self.num_images)
        recorder = self._recorder if record else None
        with nullcontext() if recorder is None else recorder.step():
            loss, norm = self._stepper.update(self.num_images, measure=record)
        self.num_images += self.config.batch_size
        if self.ema is not None:
            self.ema.update(self.num_images)
        self._tally.add(loss, norm)
        # On other devices this would synchronise; there the check runs when a line is logged.
        if self.device.type == "cpu":
            self._check_finite()
        if recorder is not None:
            self._records.magnitudes(self.num_images, recorder.read())

    def _check_finite(self) -> None:
        bad = self._tally.bad_in_a_row
        if bad >= self.config.stop_after_nonfinite:
            self._outputs.saver.wait()
            raise nonfinite_error(
                bad, self.num_images, self.config.batch_size, newest(self._outputs.checkpoints)
            )

    def _log(self, **timing: float) -> dict[str, Any]:
        self._check_finite()
        sums = self._tally.take()
        assert self._stepper.norms is not None
        weight_norm, update_norm = self._stepper.norms.tolist()
        norms = {"weight_norm": weight_norm, "update_norm": update_norm}
        rate = {"learning_rate": self._stepper.learning_rate}
        record = {**sums, **norms, **rate, **timing, **gpu_sensors(self.device)}
        self._records.progress(self.num_images, record)
        shown = {"loss": sums["loss"], "nonfinite_steps": sums["nonfinite_steps"]}
        memory = size_text(used_bytes(self.device))
        return {name: value for name, value in shown.items() if value} | {"memory": memory}

    def validate(self, *, quiet: bool = True) -> None:
        """Measure and log the loss on held-out images, if there are any.

        Args:
            quiet: Do not say when the run ends because of it.
        """
        if self._validation is None:
            return
        if self.ema is not None:
            longest = max(self.config.ema.sigma_rels)
            found = self._validation.measure(self.denoiser, self.ema, longest)
            self._records.validation(self.num_images, found)
        # The first process alone has read all lines.
        measured = self._records.validations()
        self._is_flat = self.world.any(has_ended(measured, self.config))
        if self._is_flat and not quiet:
            tell("edm2: the loss on held-out images has stopped falling: the run ends here")
        if self.world.any(self.num_images in best_moments(measured, self.config.keep_best)):
            self._due = "best"

    def log_image(self, name: str, picture: np.ndarray) -> None:
        """Send a picture, `[H, W, 3]` uint8, to the loggers that take pictures."""
        self._records.image(self.num_images, name, picture)

    def snapshot(self) -> None:
        """Store the averages in the run's snapshot folder; loggers get histograms of the weights."""
        if self.ema is not None:
            self._outputs.snapshot(self.ema, self.denoiser, self.num_images)
        if not self._stepper.is_sharded:
            self._records.histograms(self.num_images, self.denoiser)

    def close(self) -> None:
        """Stop the background readers; a later step starts them again."""
        self._stepper.close()

    def request_stop(self) -> None:
        """Stop after this step, as after a signal."""
        self._stop = True

    def checkpoint(self, *, role: Role = "regular") -> None:
        """Copy the whole state and start writing it; a sharded run writes it at once, each process its part.

        Any number of processes can resume from it.

        Args:
            role: See `save_checkpoint`.

        Raises:
            OSError: If this checkpoint, or the previous one, could not be written.
        """
        self._saved, self._due = self.num_images, None
        is_first, in_parts = self.world.is_first, self._stepper.is_sharded
        tensors, average = gather(
            self.denoiser, self.optimizer, self.ema, is_first=is_first, copy=not in_parts
        )
        if is_first or in_parts:
            values = {"ema": average, "tally": self._tally.to_json()}
            parts_of = self.world if in_parts else None
            self._outputs.save_checkpoint(self.num_images, tensors, values, role, parts_of)

    def _role(self) -> Role:
        every, interval = self.config.keep_every, self.config.checkpoint_images
        number = self.num_images // interval
        crossed = number != (self.num_images - self.config.batch_size) // interval
        return "milestone" if every and crossed and number % every == 0 else "regular"

    def finish(self) -> Path:
        """Write the longest tracked average as the run's model.

        Returns:
            The model's file.

        Raises:
            OSError: If snapshots were lost while the run went on; the model is written anyway.
        """
        self._outputs.write_model(self.denoiser, self.ema, self.num_images, self.world)
        return self.out / MODEL_FILE

    def is_due(self, interval: int, num_images: int | None = None) -> bool:
        """Return whether a step passes a multiple of the interval or ends the run.

        Args:
            interval: In images.
            num_images: Images seen at the end of the step. Default: of the last one.
        """
        num_images = self.num_images if num_images is None else num_images
        batch = self.config.batch_size
        return num_images // interval != (num_images - batch) // interval or self._is_last(num_images)

    def _is_last(self, num_images: int) -> bool:
        return num_images >= self.config.num_images or self._is_flat
