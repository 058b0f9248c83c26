"""Images a second of the Heun sampler: the plain float32 path against the fast ones, in turns, at equal results.

python benchmarks/sampling.py
"""

import copy

import torch
from common import convolution_peak, in_turns, machine, make_denoiser, options, table, timed

from edm2.diffusion import sample_heun
from edm2.nn import count_flops, keyed_normal, use_channels_last


class Sample:
    """One batch through the sampler, from fixed noise."""

    def __init__(self, denoiser, noise, num_steps, *, fast, dtype=torch.float32, compiled=False):
        self.denoiser = copy.deepcopy(denoiser)
        self.denoiser.dtype = dtype
        self.noise, self.num_steps = noise, num_steps
        if fast:
            use_channels_last(self.denoiser)
            self.noise = noise.contiguous(memory_format=torch.channels_last)
        self.forward = torch.compile(self.denoiser) if compiled else self.denoiser
        self.labels = torch.arange(len(noise), device=noise.device) % 10
        self.out = None

    def __call__(self):
        self.out = sample_heun(self.forward, self.noise, self.labels, num_steps=self.num_steps)


def main():
    arguments = options(
        __doc__,
        resolution=32, channels=1, model_channels=32, channel_mult=(1, 2, 2), num_blocks=2, attention=(8,),
        batch=64, num_steps=8, rounds=5, compile=True, bf16=True,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    device = torch.device(arguments.device)
    denoiser = make_denoiser(arguments).to(device).eval().requires_grad_(False)
    shape = (arguments.channels, arguments.resolution, arguments.resolution)
    noise = keyed_normal(torch.arange(arguments.batch, device=device), shape)
    with torch.device("meta"):
        flops = count_flops(make_denoiser(arguments).eval(), torch.zeros(1, *shape), torch.ones(1))

    kinds = {"plain": dict(fast=False), "channels last": dict(fast=True)}
    if arguments.bf16:
        kinds["... bf16"] = dict(fast=True, dtype=torch.bfloat16)
    if arguments.compile:
        kinds["... compile"] = dict(fast=True, compiled=True)
    samples = {name: Sample(denoiser, noise, arguments.num_steps, **kind) for name, kind in kinds.items()}
    if arguments.compile:
        print(f"compile: first batch took {timed(samples['... compile'], device):.0f} s")
    times = in_turns({**samples, "peak": convolution_peak(device)}, device, arguments.rounds)
    reference = samples["plain"].out
    scale = reference.std()
    notes = {
        name: f"images {float((sample.out - reference).square().mean().sqrt() / scale):.1e}"
        for name, sample in samples.items()
        if name != "plain"
    }
    evaluations = 2 * arguments.num_steps - 1
    print(f"sampling: {evaluations} evaluations an image, batch {arguments.batch}")
    print(machine(device))
    print(
        table({n: times[n] for n in samples}, arguments.batch, 2 * flops * evaluations, times["peak"], notes)
    )


if __name__ == "__main__":
    main()
