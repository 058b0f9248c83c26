"""Parameters and operations of every configuration and size, as docs/ladder.md prints them.

Nothing is trained and nothing is timed: the networks are built without memory. Gflops are given as they are done,
and with weights normalised in the steps that the paper counts, a division and then a multiplication of each weight,
which are one here. Options: --resolution 64 --channels 4 --classes 1000 --model-channels 64 128 192.
"""

import torch
from common import options

from edm2.diffusion import Denoiser
from edm2.nn import CONFIGS, NormalizedConv, count_flops


def size(
    config: str, *, resolution: int, channels: int, classes: int, model_channels: int
) -> tuple[int, int, float, float]:
    """Parameters of the network and of its uncertainty head; Gflops an image, done here and in the paper's steps."""
    with torch.device("meta"):
        net = Denoiser(resolution, channels, classes, config=config, model_channels=model_channels).eval()
        image, labels = torch.zeros(1, channels, resolution, resolution), torch.zeros(1, classes)
        flops = count_flops(net, image, torch.ones(1), labels if classes else None)
    network = sum(p.numel() for p in net.unet.parameters())
    head = sum(p.numel() for p in net.parameters()) - network
    normalised = sum(m.weight.numel() for m in net.unet.modules() if isinstance(m, NormalizedConv))
    return network, head, flops / 1e9, (flops + normalised) / 1e9


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
    print("| config | base width | parameters | u(sigma) | Gflops | in the paper's steps |")
    print("|---|---:|---:|---:|---:|---:|")
    for config, features in CONFIGS.items():
        for width in chosen.model_channels:
            network, head, ours, paper = size(config, model_channels=width, **shape)
            print(
                f"| {config} {features.title} | {width} | {network:,} | {head} | {ours:.2f} | {paper:.2f} |"
            )


if __name__ == "__main__":
    main()
