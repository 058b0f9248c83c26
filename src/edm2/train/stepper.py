"""One optimiser step: the network's inputs, loss, gradients and update.

Ref: EDM2 Sec. 2-3, App. B.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from edm2.data import Augmentation, Batch, Batches, ImageDataset, mirror
from edm2.diffusion import Denoiser
from edm2.ema.tracking.sharding import is_sharded
from edm2.nn import ForcedWeightNorm, faster_channels_last, use_channels_last
from edm2.train.build import checkpoint_activations, compile_blocks
from edm2.train.coding import Coding
from edm2.train.config import TrainConfig
from edm2.train.gradients import clean_gradients, clip_gradients
from edm2.train.inputs import code_batch
from edm2.train.label_dropout import drop_labels
from edm2.train.norms import UpdateNorm
from edm2.train.objectives import DROPOUT_SEED_OFFSET, Objective, TrainingBatch
from edm2.train.optimizer import make_optimizer
from edm2.train.parallel import average_whole_gradients, blocks_of, exchange_gradients, replicate, shard
from edm2.train.residual import Residual
from edm2.train.schedule import learning_rate
from edm2.train.world import World


class Stepper:
    """Takes optimiser steps on this process's share of each batch.

    Args:
        config: All settings.
        dataset: Training images.
        coding: Conversion of stored images to network inputs.
        denoiser: The network; it is moved and wrapped as the settings ask.
        world: The processes that share the work.
        objective: Computes the loss.

    Attributes:
        denoiser: The network in training mode.
        optimizer: Its optimiser.
        objective: What it is trained for.
        residual: Regression whose residuals are modelled; None for images.
        norms: Norms of all weights and of their change in the last measured step, `[2]`; None before the first.
    """

    norms: Tensor | None = None
    residual: Residual | None = None

    def __init__(
        self,
        config: TrainConfig,
        dataset: ImageDataset,
        coding: Coding,
        denoiser: Denoiser,
        world: World,
        objective: Objective,
    ) -> None:
        self._config, self._coding, self._world = config, coding, world
        self._share = world.share(config.batch_size, config.microbatch)
        self._size = min(config.microbatch or self._share, self._share)
        self._dataset = dataset
        self.objective = objective
        augment = config.dataset.augment
        self._augment = Augmentation(probability=augment) if augment else None
        self._batches: Batches | None = None
        self._next_step = -1
        self.denoiser = denoiser.train().to(world.device)
        if config.compile:
            compile_blocks(blocks_of(self.denoiser) or [self.denoiser.unet])
        if config.checkpoint_activations:
            checkpoint_activations(blocks_of(self.denoiser), keyed_dropout=self.denoiser.has_keyed_dropout)
        sharded = config.sharding == "full" and world.size > 1
        last = faster_channels_last(self.denoiser) if config.channels_last is None else config.channels_last
        self._layout = torch.channels_last if last else torch.contiguous_format
        if last and not sharded:  # FSDP2 takes contiguous weights only
            use_channels_last(self.denoiser)
        if sharded:
            shard(self.denoiser, world)
        self._force_norm = ForcedWeightNorm(self.denoiser)
        self.optimizer = make_optimizer(self.denoiser, config.optimizer)
        copies = world.size > 1 and not sharded
        self._forward: Any = replicate(self.denoiser, world) if copies else self.denoiser

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def is_sharded(self) -> bool:
        """Whether weights are spread over processes."""
        return any(is_sharded(p) for p in self.denoiser.parameters())

    def prepare(self, num_images: int) -> None:
        """Set the learning rate and normalise the weights for the step that starts at `num_images`."""
        config = self._config
        lr = learning_rate(
            num_images,
            batch_size=config.batch_size,
            ref_lr=config.optimizer.ref_lr,
            ref_batches=config.optimizer.ref_batches,
            rampup_mimg=config.optimizer.rampup_mimg,
            cosine_images=config.num_images if config.optimizer.decay == "cosine" else None,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._force_norm()

    def update(self, num_images: int, *, measure: bool = False) -> tuple[Tensor, Tensor]:
        """Compute gradients on the batch that starts at `num_images`, and update the weights.

        Args:
            num_images: Images seen before.
            measure: Whether to record the norms of weights and update.

        Returns:
            Mean loss of the whole batch, float64, and the norm of the gradients before non-finite ones were zeroed.
        """
        config, world = self._config, self._world
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
        batches = self._batches_from(num_images)
        for start in range(0, self._share, self._size):
            with exchange_gradients(self._forward, wanted=start + self._size == self._share):
                batch = next(batches)
                with self._seeded(batch.position):
                    inputs = self._inputs(batch, num_images)
                    loss = self.objective(self._forward, inputs)
                if inputs.mask is not None:
                    loss = torch.where(inputs.mask, loss, 0.0)
                # Processes average their gradients, but the loss is a sum over the batch.
                (loss.sum() * (config.loss_scaling * world.size) / config.batch_size).backward()
            loss_sum += loss.detach().mean(dtype=torch.float64) * (self._size / config.batch_size)
        gradients = [p.grad for p in self.denoiser.parameters() if p.grad is not None]
        average_whole_gradients(gradients, world)
        norm = clean_gradients(gradients, scale=1 / config.loss_scaling)
        if config.optimizer.clip:
            clip_gradients(gradients, norm, config.optimizer.clip)
        # Copied after activations are freed, so that the peak of memory does not rise.
        update = UpdateNorm(list(self.denoiser.parameters())) if measure else None
        self.optimizer.step()
        if update is not None:
            self.norms = update.measure()
        return world.sum(loss_sum), norm

    def close(self) -> None:
        """Stop reading images in advance."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None

    def _batches_from(self, num_images: int) -> Batches:
        config = self._config
        if self._batches is None or num_images != self._next_step:
            self.close()
            self._batches = Batches(
                self._dataset,
                config.batch_size,
                seed=config.seed,
                start=num_images,
                stop=max(config.num_steps * config.batch_size, num_images + config.batch_size),
                microbatch=self._size,
                rank=self._world.rank,
                world_size=self._world.size,
                workers=config.workers,
                pin_memory=self._world.device.type == "cuda",
            )
        self._next_step = num_images + config.batch_size
        return self._batches

    @contextmanager
    def _seeded(self, position: int) -> Iterator[None]:
        """Make what a network of the user's own draws from torch's generator a function of the image's position."""
        if self.denoiser.has_keyed_dropout:
            yield
            return
        device = self._world.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self._config.seed + DROPOUT_SEED_OFFSET + position)
            yield

    def _inputs(self, batch: Batch, num_images: int) -> TrainingBatch:
        config = self._config
        span = (batch.position, batch.position + len(batch.images))

        def transform(images: Tensor) -> tuple[Tensor, Tensor | None]:
            if config.dataset.mirror:
                images = mirror(images, torch.arange(*span, device=images.device), seed=config.seed)
            if self._augment is None:
                return images, None
            # Drawn on the CPU, so that the values are known without waiting for the device.
            return self._augment(images, torch.arange(*span), seed=config.seed)

        inputs = code_batch(
            batch,
            self._coding,
            seed=config.seed,
            num_images=num_images,
            device=self._world.device,
            transform=transform,
        )
        if self.residual is not None:
            inputs = self.residual.subtract(inputs)
        labels = inputs.labels
        if config.label_dropout and labels is not None:
            labels = drop_labels(
                labels,
                inputs.index,
                num_classes=self.denoiser.label_dim or 0,
                probability=config.label_dropout,
                seed=config.seed,
            )
        return replace(inputs, images=inputs.images.to(memory_format=self._layout), labels=labels)
