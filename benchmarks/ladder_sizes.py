"""Parameters and operations of every configuration and size, for docs/results/ladder.md.

    python benchmarks/ladder_sizes.py --resolution 64 --channels 4 --classes 1000 --model-channels 64 128 192

Nothing is trained or timed, and the networks take no memory.
"""

import torch
from common import options

from edm2.diffusion import build_denoiser
from edm2.nn import CONFIGS, count_flops


def size(
    config: str, *, resolution: int, channels: int, classes: int, model_channels: int
) -> tuple[int, int, float]:
    """Parameters of the network and of its uncertainty head, and Gflops of an evaluation of one image."""
    with torch.device("meta"):
        net = build_denoiser(
            resolution, channels, classes, config=config, model_channels=model_channels
        ).eval()
        image, labels = torch.zeros(1, channels, resolution, resolution), torch.zeros(1, classes)
        flops = count_flops(net, image, torch.ones(1), labels if classes else None)
    network = sum(p.numel() for p in net.unet.parameters())
    return network, sum(p.numel() for p in net.parameters()) - network, flops / 1e9


def main() -> None:
    """Print the table."""
    chosen = options(
        "Parameters and Gflops of configs A to G.",
        resolution=64,
        channels=4,
        classes=1000,
        model_channels=(64, 128, 192),
    )
    shape = dict(resolution=chosen.resolution, channels=chosen.channels, classes=chosen.classes)
    print("| config | base width | parameters | u(sigma) | Gflops |")
    print("|---|---:|---:|---:|---:|")
    for config, features in CONFIGS.items():
        for width in chosen.model_channels:
            network, head, gflops = size(config, model_channels=width, **shape)
            print(f"| {config} {features.title} | {width} | {network:,} | {head} | {gflops:.2f} |")


if __name__ == "__main__":
    main()
