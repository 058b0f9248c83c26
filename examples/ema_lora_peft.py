"""Post-hoc EMA of LoRA adapters with peft: only the trained weights are averaged and stored.

    python examples/ema_lora_peft.py                 # seconds on a CPU

A small network learns digits 0 to 4, then adapters teach it all ten. The averages count time from the start
of the fine-tuning and contain only the adapters. Afterwards any length is reconstructed and loaded back.
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edm2.ema import PowerEMA, reconstruct_many


def main(steps: int = 400) -> dict[str, float]:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    known = torch.nonzero(y[:1200] < 5).flatten()
    base = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    fit(base, x, y, known, steps, learning_rate=0.1)

    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2"]))
    ema = PowerEMA(model, sigma_rels=(0.05, 0.10), include=lambda name, tensor: tensor.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, x, y, torch.arange(1200), steps, learning_rate=0.05, ema=ema, folder=Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 16
        print(
            f"averaged: {len(ema.names)} of {len(list(model.parameters()))} tensors, {size / 1e3:.0f} kB a snapshot"
        )
        losses = {"weights as they are": score(model, x, y)}
        for result in reconstruct_many(folder, (0.05, 0.10, 0.15, 0.20), warn_above=0.1):
            model.load_state_dict(result.tensors, strict=False)
            losses[result.label] = score(model, x, y)
    for name, loss in losses.items():
        print(f"{name:<22} held-out loss {loss:.4f}")
    return losses


def fit(
    model: nn.Module, x: Tensor, y: Tensor, rows: Tensor, steps: int, *, learning_rate: float,
    ema: PowerEMA | None = None, folder: Path | None = None,
) -> None:  # fmt: skip
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for step in range(1, steps + 1):
        batch = rows[torch.randint(0, len(rows), (16,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        if ema is not None:
            ema.update(step)
            if step % (steps // 8) == 0:
                ema.snapshot(folder)


def score(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x[1200:]), y[1200:]))


if __name__ == "__main__":
    main()
