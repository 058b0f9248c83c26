"""Training speed: the plain float32 path against the faster ones, in turns, with equal results.

    python benchmarks/train_step.py                                          # 1.7M parameters at 32x32x1
    python benchmarks/train_step.py --model-channels 64 --channels 3 --batch 16 --channel-mult 1 2 3 4 \
        --num-blocks 2 --attention 16 8                                      # larger

    python benchmarks/train_step.py --resolution 8 --channel-mult 1 2 --attention 4 --batch 32 --rounds 21  # digits

The plain path: weights normalised layer by layer, contiguous memory, PyTorch's default Adam. The plain form of the
blocks is the one of `Block.forward`, the fast form that of `edm2.nn.fast`. Times are those of the processor on the CPU.
"""

import contextlib
import copy
import time

import torch
from common import convolution_peak, in_turns, machine, make_denoiser, options, table, timed

from edm2.diffusion import edm2_loss
from edm2.memory import keep_freed_memory
from edm2.nn import ForcedWeightNorm, count_flops, fast, use_channels_last
from edm2.train.build import compile_blocks
from edm2.train.parallel import blocks_of


class Step:
    """One training step on fixed data."""

    def __init__(self, denoiser, batch, *, quick, plain=False, dtype=torch.float32, compiled=False):
        self.denoiser = copy.deepcopy(denoiser).train()
        self.denoiser.dtype = dtype
        self.images, self.labels, self.sigma, self.noise = batch
        self.force = None
        self.forms = fast.plain_forms if plain else contextlib.nullcontext
        if quick:
            use_channels_last(self.denoiser)
            self.force = ForcedWeightNorm(self.denoiser)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        if compiled:
            compile_blocks(blocks_of(self.denoiser))
        kind = {"fused": True} if quick else {}
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), lr=1e-3, betas=(0.9, 0.99), **kind)
        self.losses = []

    def __call__(self):
        if self.force:
            self.force()
        self.optimizer.zero_grad(set_to_none=True)
        with self.forms():
            loss = edm2_loss(self.denoiser, self.images, self.labels, self.sigma, self.noise)
        (loss.sum() / len(self.images)).backward()
        self.optimizer.step()
        self.losses.append(loss.detach().mean())


def main():
    arguments = options(
        __doc__,
        resolution=32, channels=1, model_channels=32, channel_mult=(1, 2, 2), num_blocks=2, attention=(8,),
        batch=64, rounds=7, compile=True, bf16=True, keep_memory=True,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    device = torch.device(arguments.device)
    if arguments.keep_memory:
        keep_freed_memory()
    denoiser = make_denoiser(arguments).to(device)
    g = torch.Generator().manual_seed(1)
    shape = (arguments.batch, arguments.channels, arguments.resolution, arguments.resolution)
    batch = (
        0.5 * torch.randn(shape, generator=g),
        torch.arange(arguments.batch) % 10,
        torch.exp(torch.randn(arguments.batch, generator=g) - 0.4),
        torch.randn(shape, generator=g),
    )
    batch = tuple(x.to(device) for x in batch)
    with torch.device("meta"):
        flops = count_flops(make_denoiser(arguments).eval(), torch.zeros(1, *shape[1:]), torch.ones(1))

    steps = {
        "plain": Step(denoiser, batch, quick=False),
        "one pass, channels last": Step(denoiser, batch, quick=True, plain=True),
        "... fast form of blocks": Step(denoiser, batch, quick=True),
    }
    if arguments.compile:
        steps["... compiled blocks"] = Step(denoiser, batch, quick=True, compiled=True)
    if arguments.bf16:
        bf16 = {"quick": True, "dtype": torch.bfloat16}
        steps["bf16, plain form"] = Step(denoiser, batch, plain=True, **bf16)
        steps["... fast form of blocks (bf16)"] = Step(denoiser, batch, **bf16)
        if arguments.compile:
            steps["... compiled blocks (bf16)"] = Step(denoiser, batch, compiled=True, **bf16)
    if arguments.compile:
        for name, step in steps.items():
            if "compiled" in name:
                print(f"{name}: first step took {timed(step, device):.0f} s")
                step.losses.clear()
                step.denoiser.load_state_dict(denoiser.state_dict())
                step.optimizer.state.clear()
    peak = convolution_peak(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times = in_turns({**steps, "peak": peak}, device, arguments.rounds, clock)
    reference = torch.stack(steps["plain"].losses)
    notes = {
        name: f"losses {float((torch.stack(s.losses) - reference).abs().max() / reference.abs().max()):.1e}"
        for name, s in steps.items()
        if name != "plain"
    }
    parameters = sum(p.numel() for p in denoiser.parameters())
    print(
        f"training step: {parameters / 1e6:.1f}M parameters at {shape[2]}x{shape[3]}x{shape[1]}, batch {shape[0]}"
    )
    print(machine(device))
    # Forward, and twice that backward; two operations a multiply-accumulate.
    print(table({n: times[n] for n in steps}, arguments.batch, 6 * flops, times["peak"], notes))


if __name__ == "__main__":
    main()
