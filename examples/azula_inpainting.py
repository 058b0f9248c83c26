"""Fill in hidden halves of images with azula's solvers of inverse problems and a network of edm2.

    pip install azula    # brings torchvision, which edm2 does not need
    edm2 train --preset digits --out runs/digits
    python examples/azula_inpainting.py runs/digits --out inpainted.png

The adapter is the class `Azula`: azula asks for the expected clean image at a time t of a schedule, and an edm2
denoiser answers at a noise level. With it, everything of azula works: its samplers, and its guidance for deblurring,
super-resolution and other linear measurements (DPS, PGDM, MMPS, ...).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.guidance.mmps import MMPSDenoiser
from azula.linalg.covariance import IsotropicCovariance
from azula.noise import VESchedule
from azula.sample import DDIMSampler

from edm2 import ImageGenerator
from edm2.data import open_dataset
from edm2.report import image_grid, save_png


class Azula(Denoiser):
    """An edm2 denoiser as one of azula's, in network units."""

    def __init__(self, denoiser, sigma_min=0.002, sigma_max=80.0):
        super().__init__()
        self.denoiser = denoiser
        self.schedule = VESchedule(sigma_min, sigma_max)  # x_t = x + sigma noise, as in EDM

    def forward(self, x_t, t, labels=None, **kwargs):
        sigma = self.schedule.sigma(t)
        return DiracPosterior(mean=self.denoiser(x_t, sigma, labels))


def inpaint(generator, images, labels, hidden, steps=64, seed=0):
    """Complete images `[B, C, H, W]` uint8 where the mask `hidden`, `[H, W]`, is True."""
    torch.manual_seed(seed)
    clean = generator.coding.encode(torch.from_numpy(images), torch.arange(len(images)), seed=0)
    labels = torch.from_numpy(labels) if generator.num_classes else None

    def observe(x):
        return x[:, :, ~hidden]

    prior = Azula(generator.denoiser)
    posterior = MMPSDenoiser(
        prior, observe(clean), observe, IsotropicCovariance(torch.tensor(1e-4)), iterations=3
    )
    sampler = DDIMSampler(posterior, steps=steps, silent=True)
    return generator.decode(sampler(sampler.init(clean.shape), labels=labels)).numpy()


def main(argv=None):
    """Inpaint the lower halves of test images; returns the error there, and that of unrelated samples."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="run or model file of edm2")
    parser.add_argument("--data", default="digits", help="data set with a test split")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("inpainted.png"))
    args = parser.parse_args(argv)
    generator = ImageGenerator.load(args.model)
    test = open_dataset(args.data, split="test")
    chosen = np.arange(args.count)
    images, labels = test.images(chosen), test.labels(chosen)
    hidden = torch.zeros(images.shape[2:], dtype=torch.bool)
    hidden[images.shape[2] // 2 :] = True
    made = inpaint(generator, images, labels, hidden, args.steps)
    masked = images.copy()
    masked[:, :, hidden] = 128
    save_png(image_grid(np.concatenate([masked, made, images]), columns=args.count, scale=6), args.out)
    others = generator.images(chosen.tolist(), labels if generator.num_classes else None)
    errors = [float((abs(x.astype(float) - images)[:, :, hidden]).mean()) for x in (made, others)]
    print(
        f"mean error of the hidden pixels: {errors[0]:.1f}; of other samples of the same class: {errors[1]:.1f}"
    )
    return errors


if __name__ == "__main__":
    main()
