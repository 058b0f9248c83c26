"""Why guidance by a weaker model works, in two dimensions with a known density, as one picture.

    python examples/autoguidance_2d.py --out runs/autoguidance.png     # about a minute on a CPU
    python examples/autoguidance_2d.py --label 1 --width 128 --layers 6 --save runs/toy     # keeps the networks

The data are points on a branching tree, a mixture of Gaussians in two classes. A small network is trained
with this package's loss, preconditioning and averages, and sampled in three ways: as it is, with
classifier-free guidance (away from an unconditional network) and with autoguidance (away from a smaller,
less trained network). Below each panel: the share of points where the true density is lower than at 99% of
true points (outliers), and the share of the tree's mass that is reached.

After Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", arXiv 2406.02507, Sec. 3.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edm2.diffusion import draw_sigma, edm2_loss, guided, sample_heun, time_steps
from edm2.ema import PowerEMA
from edm2.nn import MPConv, MPFourier, keyed_normal, keyed_uniform, mp_silu, mp_sum
from edm2.report import figure_png
from edm2.report.style import LIGHT, SERIES
from edm2.train import learning_rate

NUM_CLASSES = 2
SIGMA_DATA = 0.5


class Tree:
    """A mixture of Gaussians along the branches of one tree a class; all of it known in closed form."""

    def __init__(self, *, depth: int = 4, per_branch: int = 8) -> None:
        self.per_branch = per_branch
        self.means: list[np.ndarray] = []
        self.covs: list[np.ndarray] = []
        self.weights: list[float] = []
        for label in range(NUM_CLASSES):
            self._grow(np.zeros(2), math.pi * (0.25 + label), 0.85, depth, 1.0 / NUM_CLASSES, 0.10)
        means, covs = np.array(self.means), np.array(self.covs)
        weights = np.array(self.weights)
        center = weights @ means
        spread = weights @ ((means - center) ** 2 + covs.diagonal(axis1=1, axis2=2))
        scale = SIGMA_DATA / math.sqrt(spread.mean())
        self.mean = torch.from_numpy((means - center) * scale).float()
        self.cov = torch.from_numpy(covs * scale**2).float()
        self.weight = torch.from_numpy(weights).float()
        self.label = torch.arange(NUM_CLASSES).repeat_interleave(len(weights) // NUM_CLASSES)

    def _grow(
        self, start: np.ndarray, angle: float, length: float, depth: int, weight: float, width: float
    ) -> None:
        along = np.array([math.cos(angle), math.sin(angle)])
        across = np.array([-along[1], along[0]])
        share = 0.3 if depth > 1 else 1.0
        spacing = length / self.per_branch
        for k in range(self.per_branch):
            self.means.append(start + along * spacing * (k + 0.5))
            self.covs.append(
                (0.6 * spacing) ** 2 * np.outer(along, along) + (0.5 * width) ** 2 * np.outer(across, across)
            )
            self.weights.append(weight * share / self.per_branch)
        if depth > 1:
            for side, turn, shrink in ((1, 0.55, 0.72), (-1, 0.42, 0.64)):
                end = start + along * length
                self._grow(
                    end,
                    angle + side * turn,
                    length * shrink,
                    depth - 1,
                    weight * (1 - share) / 2,
                    width * 0.8,
                )

    def component_log_density(self, x: Tensor, label: int) -> Tensor:
        """Log of weight times density of each component of a class at `[N, 2]` points: `[N, K]`."""
        own = self.label == label
        weight = self.weight[own] / self.weight[own].sum()
        gaussians = torch.distributions.MultivariateNormal(self.mean[own], self.cov[own])
        return weight.log() + gaussians.log_prob(x[:, None, :])

    def log_density(self, x: Tensor, label: int) -> Tensor:
        """Log density of a class at `[N, 2]` points."""
        return self.component_log_density(x, label).logsumexp(dim=1)

    def sample(self, index: Tensor, *, seed: int, label: int | None = None) -> tuple[Tensor, Tensor]:
        """Points `[N, 2]` and labels `[N]`, each a function of (seed, index)."""
        weight = self.weight if label is None else self.weight * (self.label == label)
        edges = weight.double().cumsum(0) / weight.double().sum()
        which = torch.searchsorted(edges, keyed_uniform(index, seed=seed, stream=10).double(), right=True)
        which = which.clamp_max(len(edges) - 1)
        normal = keyed_normal(index, (2,), seed=seed, stream=11)
        root = torch.linalg.cholesky(self.cov)[which]
        return self.mean[which] + torch.einsum("nij,nj->ni", root, normal), self.label[which]


class ToyDenoiser(nn.Module):
    """A magnitude-preserving multilayer perceptron over points `[B, 2, 1, 1]`, with EDM's preconditioning."""

    def __init__(self, width: int, *, layers: int = 4, label_dim: int = NUM_CLASSES) -> None:
        super().__init__()
        self.sigma_data = SIGMA_DATA
        self.label_dim = label_dim
        self.fourier = MPFourier(64)
        self.noise = MPConv(64, width)
        self.label = MPConv(label_dim, width) if label_dim else None
        self.first = MPConv(3, width)
        self.hidden = nn.ModuleList(MPConv(width, width) for _ in range(layers))
        self.last = MPConv(width, 2)
        self.gain = nn.Parameter(torch.zeros([]))
        self.logvar = MPConv(64, 1)

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, return_logvar: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The expected clean points, and the learned uncertainty on demand."""
        points, sigma = x.flatten(1), sigma.reshape(-1, 1)
        scale = (sigma**2 + self.sigma_data**2).rsqrt()
        features = self.fourier(sigma.flatten().log() / 4)
        emb = self.noise(features)
        if self.label is not None:
            assert labels is not None
            one_hot = nn.functional.one_hot(labels, self.label_dim).float()
            emb = mp_sum(emb, self.label(one_hot * math.sqrt(self.label_dim)), 0.5)
        h = self.first(torch.cat([points * scale, torch.ones_like(points[:, :1])], dim=1))
        h = mp_sum(h, emb.expand_as(h), 0.5)
        for layer in self.hidden:
            h = mp_sum(h, layer(mp_silu(h)), 0.5)
        raw = self.last(mp_silu(h), gain=self.gain)
        out = self.sigma_data**2 * scale**2 * points + sigma * self.sigma_data * scale * raw
        out = out.reshape(x.shape)
        return (out, self.logvar(features).reshape(-1, 1, 1, 1)) if return_logvar else out


def train(tree: Tree, net: ToyDenoiser, *, steps: int, batch: int = 1024, seed: int = 0) -> ToyDenoiser:
    """Train and leave the average of the weights in the network."""
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    ema = PowerEMA(net, sigma_rels=(0.10,))
    for step in range(steps):
        index = torch.arange(step * batch, (step + 1) * batch)
        points, labels = tree.sample(index, seed=seed)
        sigma = draw_sigma(index, p_mean=-1.8, p_std=1.2, seed=seed)
        noise = keyed_normal(index, (2, 1, 1), seed=seed, stream=1)
        images = points.reshape(-1, 2, 1, 1)
        loss = edm2_loss(net, images, labels if net.label_dim else None, sigma, noise)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step * batch, batch_size=batch, ref_lr=0.01, ref_batches=512, rampup_mimg=50 * batch / 1e6
            )
        optimizer.zero_grad()
        (loss.sum() / batch).backward()
        optimizer.step()
        ema.update(step + 1)
    net.load_state_dict({**net.state_dict(), **ema.average(0.10)})
    return net.eval().requires_grad_(False)


def judge(tree: Tree, points: Tensor, *, label: int, floor: float) -> tuple[float, float]:
    """Share of points below a log density, and share of the class's mass that the others reach."""
    logs = tree.component_log_density(points, label)
    density = logs.logsumexp(dim=1)
    inside = (logs - density[:, None]).exp()[density >= floor].sum(dim=0) / len(points)
    own = tree.label == label
    truth = tree.weight[own] / tree.weight[own].sum()
    # Components of one branch overlap: what counts is whether a branch is reached, not which of its Gaussians.
    branches = torch.stack([inside, truth]).reshape(2, -1, tree.per_branch).sum(dim=2)
    return float((density < floor).float().mean()), float(branches.min(dim=0).values.sum())


def draw(tree: Tree, panels: dict[str, tuple[Tensor, str]], *, label: int) -> bytes:
    """Points of each panel over the contours of the true density, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(panels), 3.7), layout="constrained", facecolor=LIGHT["paper"])
    FigureCanvasAgg(figure)
    truth = tree.mean[tree.label == label]
    low = (truth.min(dim=0).values - 0.25).tolist()
    high = (truth.max(dim=0).values + 0.25).tolist()
    xs, ys = np.linspace(low[0], high[0], 240), np.linspace(low[1], high[1], 240)
    grid = torch.from_numpy(np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)).float()
    density = tree.log_density(grid, label).reshape(240, 240).numpy()
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True)
    for ax, (title, (points, note)) in zip(axes, panels.items(), strict=True):
        ax.contourf(
            xs, ys, density, levels=np.linspace(-2.5, 2.5, 4), colors=["#e9ecf1"], extend="max", alpha=0.9
        )
        ax.scatter(*points.T.numpy(), s=1.2, color=SERIES[1], linewidths=0, alpha=0.7)
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal", xticks=[], yticks=[])
        ax.set_facecolor(LIGHT["paper"])
        ax.set_title(title, fontsize=11, color=LIGHT["ink"])
        ax.set_xlabel(note, fontsize=9, color=LIGHT["muted"])
        for spine in ax.spines.values():
            spine.set_visible(False)
    return figure_png(figure)


def run(
    out: Path,
    *,
    steps: int = 3000,
    num_points: int = 4000,
    label: int = 0,
    width: int = 64,
    layers: int = 4,
    save: Path | None = None,
) -> dict[str, tuple[float, float]]:
    """Train, sample, judge and draw; returns (share of outliers, share of mass reached) by panel."""
    torch.manual_seed(0)
    tree = Tree()
    main = train(tree, ToyDenoiser(width, layers=layers), steps=steps)
    unconditional = train(tree, ToyDenoiser(width, layers=layers, label_dim=0), steps=steps)
    weak = train(tree, ToyDenoiser(width // 2, layers=layers), steps=steps // 4)
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        for name, net in (("main", main), ("unconditional", unconditional), ("weak", weak)):
            save_file(net.state_dict(), save / f"{name}.safetensors")
    index = torch.arange(num_points)
    real, _ = tree.sample(index, seed=1, label=label)
    floor = float(tree.log_density(real, label).quantile(0.01))
    noise = keyed_normal(index, (2, 1, 1), seed=2)
    labels = torch.full((num_points,), label)
    ways = {
        "no guidance": main,
        "classifier-free, w = 3": guided(main, unconditional, 3.0),
        "autoguidance, w = 2": guided(main, weak, 2.0),
    }
    points = {"true points": real}
    for name, denoiser in ways.items():
        points[name] = sample_heun(denoiser, noise, time_steps(sigma_max=5.0), labels).flatten(1)
    judged = {name: judge(tree, p, label=label, floor=floor) for name, p in points.items()}
    notes = {name: f"outliers {o:.1%}, mass reached {m:.1%}" for name, (o, m) in judged.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(draw(tree, {name: (p, notes[name]) for name, p in points.items()}, label=label))
    return judged


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/autoguidance.png"), help="the picture")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the main network")
    parser.add_argument(
        "--label", type=int, choices=range(NUM_CLASSES), default=0, help="class that is drawn"
    )
    parser.add_argument("--width", type=int, default=64, help="of the main network; the weak one has half")
    parser.add_argument("--layers", type=int, default=4, help="hidden layers of each network")
    parser.add_argument("--save", type=Path, help="folder for the networks, as safetensors files")
    options = vars(parser.parse_args())
    start = time.monotonic()
    for panel, (outliers, mass) in run(**options).items():
        print(f"{panel:24} outliers {outliers:6.1%}   mass reached {mass:6.1%}")
    print(f"{options['out']}, {time.monotonic() - start:.0f} s")
