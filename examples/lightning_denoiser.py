"""A diffusion model trained by Lightning, with edm2's network, loss, averages and sampler.

    python examples/lightning_denoiser.py

All noise is a function of the image's position, so a resumed run draws what an undisturbed one would have drawn.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from edm2.data import Batch, Batches, PixelCoding, measure_coding, open_dataset
from edm2.diffusion import build_denoiser, draw_sigma, edm2_loss, sample_heun, time_steps
from edm2.ema import reconstruct
from edm2.ema.callbacks.lightning import PowerEMACallback
from edm2.nn import ForcedWeightNorm, keyed_normal
from edm2.report import image_grid, save_png
from edm2.train import learning_rate

BATCH = 32
SIZE = dict(model_channels=32, channel_mult=(1, 2), num_blocks=2, attn_resolutions=(4,), channels_per_head=32)


class Digits(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.images, self.held_out = open_dataset("digits"), open_dataset("digits", split="test")

    def train_dataloader(self) -> Batches:
        start = 0 if self.trainer is None else self.trainer.global_step * BATCH
        return Batches(self.images, BATCH, seed=0, start=start, workers=0)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(
            list(Batches(self.held_out, BATCH, seed=0, stop=len(self.held_out))), batch_size=None
        )


class DenoiserModule(LightningModule):
    def __init__(self, coding: PixelCoding) -> None:
        super().__init__()
        self.coding, self.denoiser = coding, build_denoiser(8, 1, 10, **SIZE)
        self.force_weight_norm = ForcedWeightNorm(self.denoiser)  # all weights to unit RMS, before each step

    def loss(self, batch: Batch) -> Tensor:
        index = torch.arange(batch.position, batch.position + len(batch.images), device=self.device)
        clean = self.coding.encode(batch.images)
        sigma = draw_sigma(index, p_mean=-0.4, p_std=1.0)
        noise = keyed_normal(index, clean.shape[1:], stream=1)
        return edm2_loss(self.denoiser, clean, batch.labels, sigma, noise).sum() / len(clean)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        self.force_weight_norm()
        return self.loss(batch)

    def validation_step(self, batch: Batch, _: int) -> None:
        self.log("validation", self.loss(batch), batch_size=len(batch.images), prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), lr=1.0, betas=(0.9, 0.99))
        rate = partial(learning_rate, batch_size=BATCH, ref_lr=0.03, ref_batches=150, rampup_mimg=0.002)
        schedule = LambdaLR(optimizer, lambda step: rate(step * BATCH))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def sample(self, seeds: Tensor) -> Tensor:
        made = sample_heun(self.denoiser.eval(), keyed_normal(seeds, (1, 8, 8)), time_steps(16), seeds % 10)
        return self.coding.decode(made)


def main(out: Path, steps: int, **options: Any) -> None:
    data, callback = Digits(), PowerEMACallback(out / "snapshots")
    module = DenoiserModule(measure_coding(data.images))
    Trainer(max_steps=steps, callbacks=[callback], default_root_dir=out, **options).fit(module, data)
    module.load_state_dict(reconstruct(out / "snapshots", sigma_rel=0.1).tensors)
    save_png(image_grid(module.sample(torch.arange(40)).numpy(), columns=10, scale=8), out / "digits.png")


if __name__ == "__main__":
    main(Path("runs/lightning"), 600, val_check_interval=100)
