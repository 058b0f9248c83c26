"""Sampling speed, and how much each faster way changes the images: precision, compilation, sampler, guidance.

    python benchmarks/sampling.py

The plain path is the denoiser as it trains: float32, eager, weights normalised in every evaluation.
Differences are root mean squares relative to the standard deviation of the images: paths against the plain
path, samplers against Heun with four times the steps. The last tables evaluate main network and guide one
after the other and together, for several batch sizes: two networks stacked by torch.vmap, and one network
with and without labels in one batch.

    python benchmarks/sampling.py --batches 16 64 250 1000 --threads 1 2    # batch sizes and threads instead
"""

import argparse
import functools
import statistics
import time

import torch
from common import convolution_peak, in_turns, machine, make_denoiser, options, table, timed
from torch.func import functional_call, stack_module_state

from edm2.diffusion import SAMPLERS, Denoiser, DenoiserFn, WithoutLabels, guided, time_steps
from edm2.diffusion.fixed_weights import SamplingNetwork
from edm2.memory import keep_freed_memory
from edm2.nn import count_flops, keyed_normal, use_channels_last


class Sample:
    """One batch through a sampler, from fixed noise."""

    def __init__(
        self,
        network: DenoiserFn,
        noise: torch.Tensor,
        num_steps: int,
        sampler: str = "heun",
    ) -> None:
        self.network, self.noise, self.sigmas = network, noise, time_steps(num_steps)
        self.labels = torch.arange(len(noise), device=noise.device) % 10
        self.sampler = SAMPLERS[sampler]
        self.out = noise

    def __call__(self) -> None:
        self.out = self.sampler(self.network, self.noise, self.sigmas, self.labels)

    def difference(self, reference: torch.Tensor) -> str:
        """Root mean square difference of the images, relative to their standard deviation."""
        return f"images {float((self.out - reference).square().mean().sqrt() / reference.std()):.1e}"


def main() -> None:
    arguments = options(
        __doc__,
        resolution=32, channels=1, model_channels=32, channel_mult=(1, 2, 2), num_blocks=2, attention=(8,),
        batch=64, num_steps=8, rounds=5, compile=True, bf16=True, together=(1, 4, 64), batches=(), threads=(),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    device = torch.device(arguments.device)
    keep_freed_memory()  # as the commands do
    shape = (arguments.channels, arguments.resolution, arguments.resolution)
    noise = keyed_normal(torch.arange(arguments.batch, device=device), shape)
    with torch.device("meta"):
        flops = 2 * count_flops(make_denoiser(arguments).eval(), torch.zeros(1, *shape), torch.ones(1))
    print(f"batch {arguments.batch}; {machine(device)}")
    if arguments.batches:
        return compare_batches(arguments)
    compare_paths(arguments, noise, flops)
    compare_samplers(arguments, noise, flops)
    for batch in arguments.together:
        compare_together(arguments, noise[:batch], flops)


def compare_batches(arguments: argparse.Namespace) -> None:
    """One evaluation with each batch size and number of threads: images a second, and a processor second."""
    device = torch.device(arguments.device)
    shape = (arguments.channels, arguments.resolution, arguments.resolution)
    whole, default = max(arguments.batches), torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        network = SamplingNetwork(_denoiser(arguments, fast=True, dtype=dtype))

        def work(batch: int, threads: int, network: SamplingNetwork = network) -> None:
            torch.set_num_threads(threads)
            x = torch.zeros(batch, *shape, device=device).contiguous(memory_format=torch.channels_last)
            for _ in range(whole // batch):
                network(x, torch.ones((), device=device), torch.arange(batch, device=device) % 10)

        cases = [(b, t) for t in arguments.threads or (default,) for b in arguments.batches]
        runs = {str(case): functools.partial(work, *case) for case in cases}
        for clock in (time.perf_counter, time.process_time):
            times = in_turns(runs, device, arguments.rounds, clock)
            rates = [
                f"{b}: {whole // b * b / statistics.median(times[str((b, t))]):.0f} ({t} threads)"
                for b, t in cases
            ]
            print(f"{dtype}, {clock.__name__}: images/s for batches of {', '.join(rates)}")


def compare_paths(arguments: argparse.Namespace, noise: torch.Tensor, flops: float) -> None:
    """The same evaluations, each path adding one thing to the path above it; bf16 and compile apart."""
    steps, last = arguments.num_steps, noise.contiguous(memory_format=torch.channels_last)
    samples = {
        "plain": Sample(_denoiser(arguments), noise, steps),
        "channels last": Sample(_denoiser(arguments, fast=True), last, steps),
        "... weights fixed": Sample(
            SamplingNetwork(_denoiser(arguments, fast=True), fold=False), last, steps
        ),
        "... ... fast form": Sample(SamplingNetwork(_denoiser(arguments, fast=True)), last, steps),
    }
    if arguments.bf16:
        for fold, name in ((False, "... ... bf16"), (True, "... ... fast form, bf16")):
            network = SamplingNetwork(_denoiser(arguments, fast=True, dtype=torch.bfloat16), fold=fold)
            samples[name] = Sample(network, last, steps)
    if arguments.compile:
        network = SamplingNetwork(_denoiser(arguments, fast=True), compile=True)
        samples["... ... compile"] = Sample(network, last, steps)
        print(f"compile: first batch took {timed(samples['... ... compile'], noise.device):.0f} s")
        if arguments.bf16:
            network = SamplingNetwork(_denoiser(arguments, fast=True, dtype=torch.bfloat16), compile=True)
            samples["... ... bf16 and compile"] = Sample(network, last, steps)
    evaluations = dict.fromkeys(samples, 2 * steps - 1)
    _report(
        f"paths: heun, {2 * steps - 1} evaluations an image", arguments, samples, evaluations, flops, "plain"
    )


def compare_samplers(arguments: argparse.Namespace, noise: torch.Tensor, flops: float) -> None:
    """Samplers and guidance on the path with fixed weights."""
    network, last = (
        SamplingNetwork(_denoiser(arguments, fast=True)),
        noise.contiguous(memory_format=torch.channels_last),
    )
    steps = arguments.num_steps
    samples = {f"heun, {steps} steps": Sample(network, last, steps)}
    evaluations = {f"heun, {steps} steps": 2 * steps - 1}
    for name, count in (("euler", 2 * steps), ("dpmpp-2m", steps), ("dpmpp-2m", 2 * steps)):
        samples[f"{name}, {count} steps"] = Sample(network, last, count, name)
        evaluations[f"{name}, {count} steps"] = count
    exact = Sample(network, last, 4 * steps)
    exact()
    _report("samplers", arguments, samples, evaluations, flops, exact.out)

    levels = time_steps(steps).tolist()
    interval = levels[2 * steps // 3], levels[steps // 3]
    guide = SamplingNetwork(_denoiser(arguments, fast=True, weak=True))
    ways = {
        "no guide": Sample(network, last, steps),
        "guide of the same size": Sample(guided(network, guide, 1.5), last, steps),
        "... in a third of the levels": Sample(guided(network, guide, 1.5, interval), last, steps),
    }
    _report("guidance", arguments, ways, dict.fromkeys(ways, 2 * steps - 1), flops, "guide of the same size")


def compare_together(arguments: argparse.Namespace, noise: torch.Tensor, flops: float) -> None:
    """One evaluation of main network and guide, with fixed weights: one after the other, and together."""
    main, guide = (
        SamplingNetwork(_denoiser(arguments, fast=True, weak=weak), fold=False) for weak in (False, True)
    )
    modules = [network.module for network in (main, guide)]
    parameters, buffers = stack_module_state(modules)

    def one(parameters: dict, buffers: dict, *inputs: torch.Tensor) -> torch.Tensor:
        return functional_call(modules[0], (parameters, buffers), inputs)

    def stacked(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        both = torch.vmap(one, in_dims=(0, 0, None, None, None))(parameters, buffers, x, sigma, labels)
        return both[1] + 2 * (both[0] - both[1])

    def joined(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with_labels, without = WithoutLabels(main, 10).both(x, sigma, labels)
        return without + 2 * (with_labels - without)

    last = noise.contiguous(memory_format=torch.channels_last)
    pairs = {
        "two networks": (guided(main, guide, 2.0), stacked),
        "one network": (guided(main, lambda x, sigma, labels: main(x, sigma, None), 2.0), joined),
    }
    for title, (apart, together) in pairs.items():
        samples = {"one after the other": Sample(apart, last, 1), "together": Sample(together, last, 1)}
        _report(
            f"{title}, {len(noise)} images, one evaluation of both", arguments, samples,
            dict.fromkeys(samples, 2), flops, "one after the other",
        )  # fmt: skip


def _report(
    title: str,
    arguments: argparse.Namespace,
    samples: dict[str, Sample],
    evaluations: dict[str, int],
    flops: float,
    reference: str | torch.Tensor,
) -> None:
    """A table, whose GFLOP/s count the main network alone."""
    device = next(iter(samples.values())).noise.device
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times = in_turns({**samples, "peak": convolution_peak(device)}, device, arguments.rounds, clock)
    truth = samples[reference].out if isinstance(reference, str) else reference
    notes = {name: sample.difference(truth) for name, sample in samples.items() if name != reference}
    flops_per_image = {name: flops * evaluations[name] for name in samples}
    print(f"\n{title}")
    images = len(next(iter(samples.values())).noise)
    print(table({n: times[n] for n in samples}, images, flops_per_image, times["peak"], notes))


def _denoiser(
    arguments: argparse.Namespace,
    *,
    fast: bool = False,
    dtype: torch.dtype = torch.float32,
    weak: bool = False,
) -> Denoiser:
    denoiser = make_denoiser(arguments).to(arguments.device).eval().requires_grad_(False)
    denoiser.dtype = dtype
    if weak:
        assert denoiser.unet.out_gain is not None
        denoiser.unet.out_gain.fill_(0.4)
    if fast:
        use_channels_last(denoiser)
    return denoiser


if __name__ == "__main__":
    main()
