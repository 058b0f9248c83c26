"""Errors of reconstructed averages: edm2, the plain solve of the same snapshots, and other libraries.

    python benchmarks/ema_accuracy.py

The weights of every step are kept (two random walks, and a small network of config G trained on digits), so
that any exact average can be summed in float64. Weights seen at an update count for the time since the
previous update. Other libraries are included if they are installed: ema-pytorch, nitrous-ema,
pytorch-posthoc-ema.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from common import machine
from sklearn.datasets import load_digits
from torch import nn

from edm2.diffusion import build_denoiser, draw_sigma, edm2_loss
from edm2.ema import (
    PLANS,
    PowerEMA,
    Reconstruction,
    reconstruct,
    sigma_rel_to_gamma,
    solve_coefficients,
)
from edm2.ema.storage.manifest import read_manifest
from edm2.ema.storage.snapshots import open_snapshot
from edm2.ema.storage.weighted_sums import read_elements

WIDTHS = (0.03, 0.045, 0.06, 0.08, 0.11, 0.13, 0.16, 0.2, 0.25)
PAIR = (0.05, 0.1)
LONG = (0.02, 0.05, 0.1, 0.25, 0.28)
DTYPES = ("fp32", "fp16", "bf16")

# Name -> widths, and times of snapshots as parts of the run; those with history are also evaluated in between.
ARRANGEMENTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "pair, 16 times": (PAIR, tuple((i + 1) / 16 for i in range(16))),
    "pair, 4 times": (PAIR, tuple((i + 1) / 4 for i in range(4))),
    "compact": (PLANS["compact"].sigma_rels, (0.5, 1.0)),
    "lean": (PLANS["lean"].sigma_rels, PLANS["lean"].times),
    "small": (PLANS["small"].sigma_rels, (0.5, 1.0)),
}


class Weights(nn.Module):
    """Weights that stand for a network."""

    def __init__(self, first: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(first.clone(), requires_grad=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One reconstruction: its target, and relative L2 errors of the parameters."""

    path: str
    arrangement: str
    every: int
    dtype: str
    mid_run: bool
    sigma_rel: float
    error: float
    expected: float
    plain: float


def random_walk(steps: int, size: int, *, slowing: float, seed: int) -> torch.Tensor:
    """A random walk from a random start, in steps that shrink as time**(-slowing / 2)."""
    generator = torch.Generator().manual_seed(seed)
    pace = (torch.arange(1, steps + 1) / steps) ** (-slowing / 2)
    moves = torch.randn(steps, size, generator=generator) * (0.5 * steps**-0.5 * pace)[:, None]
    return (torch.randn(size, generator=generator, dtype=torch.float64) + moves.double().cumsum(0)).float()


def training(steps: int, *, channels: int = 8, batch: int = 16, seed: int = 0) -> torch.Tensor:
    """All weights of every step of a small network of configuration G that learns digits."""
    torch.manual_seed(seed)
    data = load_digits()
    images = torch.from_numpy(data.images[:, None] / 8 - 1).float() * 0.5
    labels = nn.functional.one_hot(torch.from_numpy(data.target), 10).float()
    model = build_denoiser(
        8, 1, 10, model_channels=channels, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,),
        channels_per_head=8,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(seed)
    history = []
    for step in range(steps):
        index = torch.randint(len(images), (batch,), generator=generator)
        sigma = draw_sigma(torch.arange(batch) + step * batch, p_mean=-0.8, p_std=1.6, seed=seed)
        noise = torch.randn(batch, 1, 8, 8, generator=generator)
        loss = edm2_loss(model, images[index], labels[index], sigma, noise).sum() / batch
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * min((step + 1) / 50, max(1.0, step / (steps / 5)) ** -0.5)
        optimizer.step()
        history.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return torch.stack(history)


def exact(path: torch.Tensor, every: int, t: int, sigma_rels: Sequence[float]) -> list[torch.Tensor]:
    """The averages in float64."""
    edges = np.arange(0, t + 1, every) / t
    masses = np.stack([np.diff(edges ** (sigma_rel_to_gamma(s) + 1)) for s in sigma_rels])
    rows = path[every - 1 : t : every]
    pieces = [torch.from_numpy(masses) @ piece.double() for piece in rows.split(4096, dim=1)]
    return list(torch.cat(pieces, dim=1))


def distance(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((value.double() - truth).norm() / truth.norm())


def track(
    path: torch.Tensor,
    every: int,
    sigma_rels: Sequence[float],
    times: Sequence[float],
    folder: Path,
    dtypes: Sequence[str] = DTYPES,
) -> tuple[list[int], dict[float, float]]:
    """Replay a path with `PowerEMA`; returns the snapshots' times and each track's own error at the end."""
    steps = len(path)
    stored = sorted({round(t * steps / every) * every for t in times})
    model = Weights(path[0])
    ema = PowerEMA(model, sigma_rels, run_id="benchmark")
    for t in range(every, steps + 1, every):
        model.weight.data.copy_(path[t - 1])
        ema.update(t)
        if t in stored:
            for dtype in dtypes:
                ema.snapshot(folder / dtype, dtype=dtype)
    truths = exact(path, every, steps, sigma_rels)
    own = {s: distance(ema.average(s)["weight"], truth) for s, truth in zip(sigma_rels, truths, strict=True)}
    return stored, own


def plain_solve(folder: Path, t: int) -> list[torch.Tensor]:
    """The plain solve's averages from the same files."""
    manifest = read_manifest(folder)
    used = [s for s in manifest.snapshots if s.t <= t]
    x = solve_coefficients([s.t for s in used], [s.sigma_rel for s in used], t, WIDTHS)
    rows = []
    for snapshot in used:
        file = open_snapshot(folder, manifest.run, snapshot)
        size = file.specs["weight"].numel
        scales = json.loads(file.metadata.get("scales", "{}"))
        rows.append(read_elements(file, [("weight", 0, size)], scales))
    return list(torch.from_numpy(x.T @ np.stack(rows)))


def ours(
    name: str, path: torch.Tensor, every: int, arrangement: str, dtypes: Sequence[str] = DTYPES
) -> list[Case]:
    """All reconstructions of one arrangement, at the end and in mid-run."""
    cases = []
    sigma_rels, times = ARRANGEMENTS[arrangement]
    with tempfile.TemporaryDirectory() as root:
        stored, _ = track(path, every, sigma_rels, times, Path(root), dtypes)
        middle = []
        if arrangement != "pair, 4 times":  # too few for a reconstruction in mid-run
            middle.append(stored[len(stored) // 2 - 1])
        if arrangement == "pair, 16 times":  # close enough for one between two of them
            middle.append((stored[-2] + stored[-1]) // 2 // every * every)
        for t in sorted({stored[-1], *middle}):
            truths = exact(path, every, t, WIDTHS)
            for dtype in dtypes:
                folder = Path(root) / dtype
                results = [_asked(folder, s, t) for s in WIDTHS]
                plains = plain_solve(folder, t)
                for s, result, plain, truth in zip(WIDTHS, results, plains, truths, strict=True):
                    if result is None:
                        continue
                    cases.append(
                        Case(
                            path=name, arrangement=arrangement, every=every, dtype=dtype, mid_run=t < stored[-1],
                            sigma_rel=s, error=distance(result.tensors["weight"], truth),
                            expected=result.expected_error, plain=distance(plain, truth),
                        )
                    )  # fmt: skip
    return cases


def _asked(folder: Path, sigma_rel: float, t: int) -> Reconstruction | None:
    """A reconstruction, or None if the snapshots cannot express it."""
    try:
        return reconstruct(folder, sigma_rel, t=t, warn_above=np.inf)
    except ValueError as error:
        if "cannot be expressed" not in str(error):
            raise
        return None


def peer_errors(path: torch.Tensor, every: int, times: int = 16) -> dict[str, list[float]]:
    """Errors of other installed libraries at the end, each with the pair of tracks, float32 and the same snapshots."""
    steps, found = len(path), {}
    truths = exact(path, every, steps, WIDTHS)
    for name, replay in (
        ("ema-pytorch", _lucidrains("ema_pytorch.post_hoc_ema", {})),
        ("nitrous-ema", _lucidrains("nitrous_ema", {})),
        ("nitrous-ema, corrected", _lucidrains("nitrous_ema", {"step_size_correction": True})),
        ("pytorch-posthoc-ema", _posthoc),
    ):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                values = replay(path, every, steps // times, folder)
            except ImportError:
                continue
        found[name] = [distance(v, truth) for v, truth in zip(values, truths, strict=True)]
    return found


def long_run(updates: int, *, rows: int = 256) -> dict[str, list[float]]:
    """Errors of the running averages after many updates, for weights that move in one way each."""
    generator = torch.Generator().manual_seed(0)
    first, goal = torch.randn(2, rows, generator=generator)
    pool = torch.randn(997, rows, generator=generator)  # noise comes back after 997 updates
    moves = {  # drift over the run, and noise
        "1 with noise of 1e-3": (0, 1e-3),
        "drift of 1e-5 over the run": (1e-5, 0),
        "drift of 1e-3 over the run, noise of 1e-4": (1e-3, 1e-4),
        "drift of 1e-2 over the run": (1e-2, 0),
        "drift of 1e-1 over the run": (1e-1, 0),
        "drift of 1 over the run": (1, 0),
    }
    drifts, noises = torch.tensor([*moves.values()])[:, :, None].unbind(1)
    starts = torch.stack([torch.ones(rows), *[first] * (len(moves) - 1)])
    wandering = first.double().clone()
    model = nn.Linear(rows, len(moves) + 1, bias=False)
    ema, exact_ones = PowerEMA(model, LONG), PowerEMA(model, LONG, dtype=torch.float64)
    for t in range(1, updates + 1):
        wandering += 5e-2 * updates**-0.5 * torch.randn(rows, generator=generator)
        model.weight.data[:-1] = starts + t / updates * drifts * goal + noises * pool[t * 7919 % 997]
        model.weight.data[-1] = wandering
        ema.update(t)
        exact_ones.update(t)
    averages = [(ema.average(s)["weight"], exact_ones.average(s)["weight"]) for s in LONG]
    return {
        name: [distance(x[i], exact[i]) for x, exact in averages]
        for i, name in enumerate([*moves, "random walk of 5e-2 over the run"])
    }


Replay = Callable[[torch.Tensor, int, int, str], list[torch.Tensor]]


def _lucidrains(module: str, options: dict[str, bool]) -> Replay:
    """ema-pytorch and its descendant share an interface."""

    def replay(path: torch.Tensor, every: int, snapshot_every: int, folder: str) -> list[torch.Tensor]:
        kind = import_module(module).PostHocEMA
        model = Weights(path[0])
        ema = kind(
            model, sigma_rels=PAIR, update_every=every, checkpoint_every_num_steps=snapshot_every,
            checkpoint_folder=folder, checkpoint_dtype=torch.float32, **options,
        )  # fmt: skip
        for row in path:
            model.weight.data.copy_(row)
            ema.update()
        where = {"device": torch.device("cpu")} if module == "nitrous_ema" else {}
        return [
            ema.synthesize_ema_model(sigma_rel=s, **where).ema_model.weight.detach().clone() for s in WIDTHS
        ]

    return replay


def _posthoc(path: torch.Tensor, every: int, snapshot_every: int, folder: str) -> list[torch.Tensor]:
    kind = import_module("posthoc_ema").PostHocEMA
    model = Weights(path[0])
    ema = kind.from_model(
        model,
        folder,
        sigma_rels=PAIR,
        update_every=every,
        checkpoint_every=snapshot_every,
        update_after_step=0,
    )
    for row in path:
        model.weight.data.copy_(row)
        ema.update_(model)
    values = []
    for s in WIDTHS:
        with ema.state_dict(sigma_rel=s) as state:
            values.append(state["weight"].detach().clone())
    return values


def make_path(name: str, steps: int, size: int) -> torch.Tensor:
    """One path to measure."""
    if name == "digits":
        return training(steps)
    return random_walk(steps, size, slowing=float(name == "slowing-walk"), seed=len(name))


def calibration(cases: Sequence[Case]) -> tuple[float, float, float]:
    """Shares of cases below the estimate and within a factor 5 of it, and the worst ratio to the plain solve."""
    true = np.array([max(c.error, 1e-12) for c in cases])
    ratio = np.array([c.expected for c in cases]) / true
    plain = np.array([max(c.plain, 1e-12) for c in cases])
    return (
        float((ratio >= 1).mean()),
        float(((ratio <= 5) & (ratio >= 0.2)).mean()),
        float((true / plain).max()),
    )


def _print_groups(cases: Sequence[Case]) -> None:
    print("| cases | number | below the estimate | within a factor 5 | error / plain solve, worst |")
    print("|---|---|---|---|---|")
    groups: list[tuple[str, Callable[[Case], object]]] = [
        ("", lambda c: "all"),
        ("", lambda c: c.path),
        ("", lambda c: c.arrangement),
        ("every ", lambda c: c.every),
        ("", lambda c: c.dtype),
        ("", lambda c: "mid-run" if c.mid_run else "end"),
    ]
    for prefix, key in groups:
        for value in dict.fromkeys(map(key, cases)):
            part = [c for c in cases if key(c) == value]
            below, near, worst = calibration(part)
            print(f"| {prefix}{value} | {len(part)} | {below:.1%} | {near:.1%} | {worst:.3f} |")


def _print_errors(name: str, cases: Sequence[Case], peers: dict[int, dict[str, list[float]]]) -> None:
    print(f"\nLargest relative error over sigma_rel {WIDTHS[0]} to {WIDTHS[-1]}, {name}, float32 at the end:")
    print("| | files | " + " | ".join(f"every {every}" for every in peers) + " |")
    print("|---|---|" + "---|" * len(peers))
    for arrangement, (sigma_rels, times) in ARRANGEMENTS.items():
        files = len(sigma_rels) * (1 if arrangement in ("compact", "small") else len(times))
        for label in ("ours", "plain solve"):
            row = []
            for every in peers:
                part = [
                    c for c in cases
                    if (c.path, c.arrangement, c.every, c.dtype, c.mid_run) == (name, arrangement, every, "fp32", False)
                ]  # fmt: skip
                row.append(max(c.error if label == "ours" else c.plain for c in part))
            print(f"| {label}, {arrangement} | {files} | " + " | ".join(f"{e:.1e}" for e in row) + " |")
    for peer in next(iter(peers.values())):
        print(f"| {peer} | 32 | " + " | ".join(f"{max(p[peer]):.1e}" for p in peers.values()) + " |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=1600, help="length of each path; a multiple of 1600 for every 100"
    )
    parser.add_argument("--size", type=int, default=20_000, help="weights of a random walk")
    parser.add_argument("--paths", nargs="*", default=["walk", "slowing-walk", "digits"])
    parser.add_argument("--every", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument(
        "--long",
        type=int,
        nargs="*",
        default=[1000, 10_000, 50_000, 130_000, 200_000],
        help="updates of the long runs",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(torch.device("cpu")))
    cases: list[Case] = []
    peers: dict[str, dict[int, dict[str, list[float]]]] = {}
    for name in args.paths:
        path = make_path(name, args.steps, args.size)
        for every in args.every:
            for arrangement in ARRANGEMENTS:
                cases += ours(name, path, every, arrangement)
            peers.setdefault(name, {})[every] = peer_errors(path, every)
        _, own = track(path, 1, PAIR, (1.0,), Path(tempfile.mkdtemp()), ("fp32",))
        print(f"{name}: {path.shape[1]:,} weights; error of the tracks themselves {max(own.values()):.1e}")
    if cases:
        _print_groups(cases)
    for name in peers:
        _print_errors(name, cases, peers[name])
    if args.long:
        print(f"\nLargest relative error of the tracks after {args.long} updates, by sigma_rel:")
        print("| weights | " + " | ".join(f"{s:g}" for s in LONG) + " |")
        print("|---|" + "---|" * len(LONG))
        runs = [long_run(updates) for updates in args.long]
        for name in runs[0]:
            worst = np.max([run[name] for run in runs], axis=0)
            print(f"| {name} | " + " | ".join(f"{e:.1e}" for e in worst) + " |")


if __name__ == "__main__":
    main()
