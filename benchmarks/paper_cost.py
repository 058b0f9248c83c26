"""Cost of the paper's training runs, as a table for docs/reproducing.md.

    python benchmarks/paper_cost.py --gpus 8 --peak-tflops 989 --utilisation 0.35

An estimate: operations are counted, the utilisation is an argument. One multiply-accumulate is two
operations, a training step costs three forward passes, and only the network counts.
"""

import argparse

import torch

from edm2.diffusion import build_denoiser
from edm2.nn import count_flops
from edm2.presets import PRESETS, get_preset, image_shape

_PASSES, _OPERATIONS = 3, 2


def multiply_accumulates(name: str) -> tuple[int, float]:
    """Parameters of a preset, and multiply-accumulates of one forward pass."""
    channels, size, _, classes = image_shape(name)
    with torch.device("meta"):
        net = build_denoiser(size, channels, classes, **vars(get_preset(name).network)).eval()
        image = torch.zeros(1, channels, size, size)
        flops = count_flops(net, image, torch.ones(1), torch.zeros(1, classes))
    return sum(p.numel() for p in net.parameters()), flops


def table(gpus: int, peak_tflops: float, utilisation: float) -> str:
    """Markdown table, a row each published run."""
    lines = [
        "| preset | Mparams | Gflops a forward pass | images (Mi) | Zflop of training | "
        f"days on {gpus} GPUs | GPU days |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in PRESETS:
        if not name.startswith("edm2-"):
            continue
        params, flops = multiply_accumulates(name)
        images = get_preset(name).num_images
        total = _PASSES * _OPERATIONS * flops * images
        gpu_days = total / (peak_tflops * 1e12 * utilisation) / 86400
        lines.append(
            f"| {name} | {params / 1e6:.1f} | {flops / 1e9:.1f} | {images >> 20} | {total / 1e21:.2f} | "
            f"{gpu_days / gpus:.1f} | {gpu_days:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="of one GPU, dense; 989: H100 SXM in bf16"
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.35, help="share of the peak that is reached, assumed"
    )
    options = parser.parse_args()
    print(table(options.gpus, options.peak_tflops, options.utilisation))
