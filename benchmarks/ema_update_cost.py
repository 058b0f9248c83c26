"""Cost of one EMA update: edm2, the textbook loop and other libraries, relative to the possible minimum.

    python benchmarks/ema_update_cost.py                       # 5M parameters in 200 tensors
    python benchmarks/ema_update_cost.py --million 100 --tensors 300
    PYTHONPATH=peers python benchmarks/ema_update_cost.py      # with ema-pytorch and nitrous-ema installed there

The minimum is an in-place lerp of as many flat tensors of the same size: one pass over the same bytes. Methods take
turns, and ratios are taken round by round, of CPU time where there is no GPU. Most updates go into a window,
and only full windows into the averages (the first 1,024 updates of three or more averages excepted); costs are means
over whole windows. For a model in many tensors, a foreach lerp of the same tensors is a second reference. Other
libraries are included if they are installed; each makes its own update of two averages on the model's device.
pytorch-posthoc-ema moves the model to host memory and back, and is measured as it is.
"""

import copy
import importlib.util
import math
import statistics
import tempfile
import time

import torch
from common import in_turns, machine, options
from torch import nn

from edm2.ema import PowerEMA, plan
from edm2.ema.tracking.averages import windows_per_run


def make_model(num_params: int, num_tensors: int) -> nn.Module:
    """Tensors of many sizes, some as small as biases."""
    torch.manual_seed(0)
    sizes = torch.rand(num_tensors) ** 3
    sizes[::4] = 0
    sizes = (sizes / sizes.sum() * num_params).long().clamp(min=64).tolist()
    model = nn.Module()
    for i, size in enumerate(sizes):
        model.register_parameter(f"p{i}", nn.Parameter(torch.randn(size)))
    return model


class Counter:
    """Calls a function with 1, 2, 3, ..., or from another number on; once or several times in a row."""

    def __init__(self, function, start=0, in_a_row=1):
        self.function, self.count, self.in_a_row = function, start, in_a_row

    def __call__(self):
        for _ in range(self.in_a_row):
            self.count += 1
            self.function(self.count)


def textbook(model: nn.Module):
    """The loop of many training scripts, over two copies of the model."""
    copies = [copy.deepcopy(model) for _ in range(2)]

    @torch.no_grad()
    def update():
        for average, beta in zip(copies, (0.999, 0.9999), strict=True):
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.mul_(beta).add_(p, alpha=1 - beta)

    return update


def flat(model: nn.Module, tracks: int):
    """The possible minimum."""
    source = torch.cat([p.detach().flatten() for p in model.parameters()])
    averages = [source.clone() for _ in range(tracks)]

    def update():
        for average in averages:
            average.lerp_(source, 0.001)

    return update


def foreach(model: nn.Module, tracks: int):
    """The least for a model in many tensors."""
    sources = [p.detach() for p in model.parameters()]
    averages = [[p.clone() for p in sources] for _ in range(tracks)]

    def update():
        for tensors in averages:
            torch._foreach_lerp_(tensors, sources, 0.001)

    return update


def peers(model: nn.Module, folder: str):
    """Updates of other libraries that are installed here."""
    found = {}
    if importlib.util.find_spec("ema_pytorch"):
        from ema_pytorch import EMA, PostHocEMA

        for use_foreach in (False, True):
            emas = [
                EMA(
                    model,
                    update_every=1,
                    update_after_step=0,
                    use_foreach=use_foreach,
                    include_online_model=False,
                )
                for _ in range(2)
            ]
            name = f"ema-pytorch EMA{', foreach' if use_foreach else ''}"
            found[name] = lambda emas=emas: [ema.update() for ema in emas]
        ema = PostHocEMA(
            model,
            sigma_rels=(0.05, 0.10),
            update_every=1,
            checkpoint_every_num_steps=10**9,
            checkpoint_folder=folder,
        )
        found["ema-pytorch PostHocEMA"] = ema.update
    if importlib.util.find_spec("nitrous_ema"):
        from nitrous_ema import PostHocEMA as NitrousEMA

        nitrous = NitrousEMA(
            model,
            sigma_rels=(0.05, 0.10),
            update_every=1,
            checkpoint_every_num_steps=10**9,
            checkpoint_folder=folder,
        )
        found["nitrous-ema"] = nitrous.update
    if importlib.util.find_spec("posthoc_ema"):
        from posthoc_ema import PostHocEMA as PlainEMA

        plain = PlainEMA.from_model(
            model,
            folder,
            sigma_rels=(0.05, 0.10),
            update_every=1,
            checkpoint_every=10**9,
            update_after_step=0,
        )
        found["pytorch-posthoc-ema"] = lambda: plain.update_(model)
    return found


def main():
    arguments = options(
        __doc__, million=5, tensors=200, rounds=21, tracks=2, peers=1,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    device = torch.device(arguments.device)
    model = make_model(arguments.million * 10**6, arguments.tensors).to(device)
    widths = plan(tracks=arguments.tracks).sigma_rels if arguments.tracks != 2 else (0.05, 0.10)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        methods = {
            "flat lerp (the least)": flat(model, arguments.tracks),
            "foreach lerp": foreach(model, arguments.tracks),
        }
        for updates in (500, 10_000, 100_000):
            ema = PowerEMA(model, widths)
            ema.update(updates)
            window = math.ceil(updates / windows_per_run(ema.gammas))
            if arguments.tracks == 1 or (arguments.tracks == 2 and updates == 500):
                window = 32  # each average has its own
            window = min(window, 32)
            name = "edm2" if updates == 500 else f"edm2 after {updates:,} updates"
            methods[name] = Counter(ema.update, updates, window)
            rows[name] = methods[name].in_a_row
        if arguments.tracks == 2 and arguments.peers:
            methods |= {"textbook loop": textbook(model), **peers(model, folder)}
        if device.type == "cuda":
            on_cpu = PowerEMA(model, widths, device="cpu")
            on_cpu.update(500)
            methods["edm2, averages on the CPU"] = Counter(on_cpu.update, 500)
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        times = in_turns(methods, device, arguments.rounds, clock)
    times = {name: [x / rows.get(name, 1) for x in seconds] for name, seconds in times.items()}
    print(
        f"one update of {arguments.tracks} averages, {arguments.million}M float32 parameters in"
        f" {arguments.tensors} tensors"
    )
    print(machine(device))
    print(f"{'method':<28} {'ms':>8} {'of the least':>12} {'of edm2':>8}")
    for name, seconds in times.items():
        ratios = [
            statistics.median(a / b for a, b in zip(seconds, times[other], strict=True))
            for other in ("flat lerp (the least)", "edm2")
        ]
        print(f"{name:<28} {1e3 * statistics.median(seconds):>8.2f} {ratios[0]:>11.2f}x {ratios[1]:>7.2f}x")


if __name__ == "__main__":
    main()
