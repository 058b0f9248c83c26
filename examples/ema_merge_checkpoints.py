"""A language model trained at a constant rate: merged checkpoints against runs that really decay the rate.

    python examples/ema_merge_checkpoints.py                          # about a million parameters; minutes on a GPU
    python examples/ema_merge_checkpoints.py --steps 400 --width 64   # a quick look on a CPU

The text is Python's own standard library, read character by character. The training stores plain checkpoints. For
decays over the last 5, 10, 20 and 40% of it, `Target.minus_sqrt` merges the checkpoints as a rate falling by 1 - sqrt
would weigh them, and a real decay of that length starts from the checkpoint at its beginning.
"""

import argparse
import math
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from edm2.ema import Target, average_checkpoints

CONTEXT = 64
DECAYS = (0.05, 0.1, 0.2, 0.4)


class CharacterModel(nn.Module):
    """A small transformer that predicts the next byte."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        self.register_buffer(
            "mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False
        )

    def forward(self, text: Tensor) -> Tensor:
        x = self.blocks(self.embed(text) + self.position, mask=self.mask, is_causal=True)
        return self.head(self.norm(x))


def standard_library(size: int) -> tuple[Tensor, Tensor]:
    """Text for training and for validation, as bytes."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.tensor(list(b"".join(path.read_bytes() for path in files)[:size]))
    return text[: -size // 10], text[-size // 10 :]


def batch(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    begin = torch.randint(len(text) - CONTEXT - 1, (count, 1), generator=generator)
    return text[begin + torch.arange(CONTEXT + 1)]


def loss(model: nn.Module, pieces: Tensor) -> Tensor:
    return functional.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


@torch.no_grad()
def validation(model: nn.Module, text: Tensor, device: str) -> float:
    pieces = batch(text, 256, torch.Generator().manual_seed(1))
    model.eval()
    losses = [float(loss(model, part.to(device))) for part in pieces.split(64)]
    model.train()
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--width", type=int, default=144)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    train_text, held_out = standard_library(2_000_000)
    model = CharacterModel(options.width, options.layers).to(options.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {options.steps} steps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    every = max(1, options.steps // 100)

    def steps(first: int, last: int, decay_from: int | None = None) -> None:
        for step in range(first, last):
            rate = options.rate * min(1.0, (step + 1) / (0.02 * options.steps))
            if decay_from is not None:
                rate *= 1 - math.sqrt((step - decay_from) / (options.steps - decay_from))
            for group in optimizer.param_groups:
                group["lr"] = rate
            pieces = batch(train_text, options.batch, torch.Generator().manual_seed(step)).to(options.device)
            optimizer.zero_grad()
            loss(model, pieces).backward()
            optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        starts = {round((1 - decay) * options.steps): decay for decay in DECAYS}
        resumes = {}
        for first in range(0, options.steps, every):
            steps(first, last := min(first + every, options.steps))
            weights = {name: x.detach().cpu().clone() for name, x in model.state_dict().items()}
            save_file(weights, Path(folder) / f"step-{last}.safetensors")
            if last in starts:
                torch.save(optimizer.state_dict(), Path(folder) / f"optimizer-{last}.pt")
                resumes[last] = Path(folder) / f"step-{last}.safetensors"
        print(f"constant rate: loss {validation(model, held_out, options.device):.4f}")
        print("decay  merged  real decay")
        for start, path in sorted(resumes.items(), reverse=True):
            target = Target.minus_sqrt(options.steps - start)
            (merged,) = average_checkpoints(folder, [target], warn_above=math.inf)
            model.load_state_dict(merged.tensors)
            of_merged = validation(model, held_out, options.device)
            model.load_state_dict(load_file(path))
            optimizer.load_state_dict(torch.load(Path(folder) / f"optimizer-{start}.pt", weights_only=True))
            steps(start, options.steps, decay_from=start)
            print(
                f"{starts[start]:>5.0%}  {of_merged:.4f}  {validation(model, held_out, options.device):.4f}"
            )


if __name__ == "__main__":
    main()
