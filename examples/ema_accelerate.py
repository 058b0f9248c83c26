"""Post-hoc EMA in a Hugging Face Accelerate loop, with checkpoints that resume exactly.

    python examples/ema_accelerate.py --out runs/accelerate
    accelerate launch --cpu --num_processes 2 examples/ema_accelerate.py --out runs/accelerate

`accelerator.register_for_checkpointing(ema)` is all it takes to save and resume the averages. All
data-parallel processes hold equal averages, and the first one writes the snapshots.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from edm2.ema import PowerEMA, reconstruct


def train(out: Path, steps: int, *, resume: bool = False, cpu: bool = False) -> PowerEMA:
    """Fit random labels for at least some steps; a snapshot and a checkpoint come after each epoch."""
    accelerator = Accelerator(cpu=cpu)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    data = TensorDataset(torch.randn(256, 16), torch.randint(0, 4, (256,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, 32))

    ema = PowerEMA(model, sigma_rels=(0.05, 0.10))  # it follows the prepared model
    accelerator.register_for_checkpointing(ema)
    if resume:
        accelerator.load_state(str(out / "checkpoint"))
    while ema.t < steps:
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            ema.update(ema.t + 1)
        accelerator.save_state(str(out / "checkpoint"))
        ema.snapshot(out / "snapshots")
    return ema


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for snapshots and checkpoint")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, resume=arguments.resume)
    if Accelerator().is_main_process:
        result = reconstruct(arguments.out / "snapshots", sigma_rel=0.075)
        print(f"{result.label} at step {result.t:g}: expected relative error {result.expected_error:.1e}")


if __name__ == "__main__":
    main()
