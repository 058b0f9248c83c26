"""Training steps per second of each configuration, in both memory layouts, in turns.

    python benchmarks/ladder_speed.py                        # 1.7M parameters at 32x32x1
    python benchmarks/ladder_speed.py --dtype bfloat16

Ratios to config G are taken round by round, in the layout that training chooses by itself (marked with a
star).
"""

import statistics

import torch
from common import in_turns, machine, make_denoiser, options

from edm2.diffusion import edm2_loss
from edm2.nn import CONFIGS, ForcedWeightNorm, faster_channels_last, use_channels_last


class Step:
    """One training step of one configuration on fixed data."""

    def __init__(self, config, batch, arguments, *, last):
        denoiser = make_denoiser(arguments, config=config, dtype=arguments.dtype)
        self.denoiser = denoiser.to(arguments.device).train()
        self.chosen = faster_channels_last(self.denoiser) is last
        self.images, *self.others = batch
        if last:
            use_channels_last(self.denoiser)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.force = ForcedWeightNorm(self.denoiser)
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), lr=1e-5, fused=True)

    def __call__(self):
        self.force()
        self.optimizer.zero_grad(set_to_none=True)
        (edm2_loss(self.denoiser, self.images, *self.others).sum() / len(self.images)).backward()
        self.optimizer.step()


def main():
    arguments = options(
        __doc__,
        resolution=32, channels=1, model_channels=32, channel_mult=(1, 2, 2), num_blocks=2, attention=(8,),
        batch=32, rounds=7, dtype="float32", device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    device = torch.device(arguments.device)
    g = torch.Generator().manual_seed(1)
    shape = (arguments.batch, arguments.channels, arguments.resolution, arguments.resolution)
    sigma = torch.exp(torch.randn(arguments.batch, generator=g) - 0.4)
    images, noise = 0.5 * torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    batch = tuple(x.to(device) for x in (images, torch.arange(arguments.batch) % 10, sigma, noise))
    steps = {(c, last): Step(c, batch, arguments, last=last) for c in CONFIGS for last in (True, False)}
    times = in_turns(steps, device, arguments.rounds)
    chosen = {config: times[config, last] for (config, last), step in steps.items() if step.chosen}
    print(f"training step at {shape[2]}x{shape[3]}x{shape[1]}, batch {shape[0]}, {arguments.dtype}: images/s")
    print(machine(device))
    print("| config | channels last | contiguous | of G's speed |")
    print("|---|---:|---:|---:|")
    for config, own in chosen.items():
        cells = []
        for last in (True, False):
            rate = arguments.batch / statistics.median(times[config, last])
            cells.append(f"{rate:.1f}{' *' if steps[config, last].chosen else ''}")
        ratio = statistics.median(of_g / seconds for of_g, seconds in zip(chosen["G"], own, strict=True))
        print(f"| {config} | {' | '.join(cells)} | {ratio:.2f}x |")


if __name__ == "__main__":
    main()
