"""Post-hoc EMA in a plain PyTorch loop: train once, choose the length of the average afterwards.

    python examples/ema_plain.py                     # seconds on a CPU

A small classifier of handwritten digits is trained at a constant learning rate, so its weights never come
to rest. Two averages are tracked and stored eight times. Any length is reconstructed from them afterwards
and scored on held-out digits. The last line compares one of them with the same average tracked directly.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from edm2.ema import PowerEMA, reconstruct_many

LENGTHS = (0.02, 0.03, 0.05, 0.075, 0.10, 0.15, 0.20, 0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--out", type=Path, help="folder for the snapshots; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        train_and_compare(arguments.steps, arguments.out or Path(temporary) / "snapshots")


def train_and_compare(steps: int, folder: Path) -> dict[str, float]:
    """Held-out loss of the raw weights and of each average; prints them."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    train, test = slice(0, 1200), slice(1200, None)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

    ema = PowerEMA(model, sigma_rels=(0.05, 0.10))
    truth = PowerEMA(model, sigma_rels=(0.15,))  # only to check the reconstruction with
    for step in range(1, steps + 1):
        batch = torch.randint(0, 1200, (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[train][batch]), y[train][batch]).backward()
        optimizer.step()
        ema.update(step)
        truth.update(step)
        if step % (steps // 8) == 0:
            ema.snapshot(folder)

    def score() -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(x[test]), y[test]))

    losses = {"weights as they are": score()}
    print(f"{'weights as they are':<22} held-out loss {losses['weights as they are']:.4f}")
    for result in reconstruct_many(folder, LENGTHS, warn_above=0.1):
        model.load_state_dict(result.tensors)
        losses[result.label] = score()
        print(
            f"{result.label:<22} held-out loss {losses[result.label]:.4f}"
            f"   expected relative error {result.expected_error:.1e}"
        )
        if result.sigma_rel == 0.15:
            exact = torch.cat([a.flatten() for a in truth.average(0.15).values()])
            made = torch.cat([result.tensors[name].flatten() for name in truth.names])
            losses["error"] = float((made - exact).norm() / exact.norm())
    print(f"sigma_rel 0.15 against the same average tracked directly: relative error {losses['error']:.1e}")
    return losses


if __name__ == "__main__":
    main()
