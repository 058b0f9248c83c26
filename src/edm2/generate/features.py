"""Features inside a network: what each block makes of noisy images, pooled over pixels.

Ref: Xiang et al. 2023, denoising diffusion autoencoders (arXiv 2303.09769).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm2.diffusion import Denoiser
from edm2.nn import UNet, keyed_normal
from edm2.train.coding import Coding

_NOISE_STREAM = 1


def block_names(denoiser: Denoiser) -> list[str]:
    """Names of the blocks that have features, from the input to the output, such as `enc.8x8_block0`.

    Raises:
        ValueError: If the network is not one of edm2's U-Nets.
    """
    return list(_blocks(denoiser))


@torch.no_grad()
def image_features(
    denoiser: Denoiser,
    coding: Coding,
    images: np.ndarray,
    sigma: float,
    blocks: Sequence[str],
    *,
    labels: np.ndarray | None = None,
    cells: int = 1,
    batch_size: int = 250,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Features of several blocks, from one pass through the network; see `ImageGenerator.features`.

    Args:
        denoiser: Denoiser in eval mode.
        coding: Coding of its images.
        images: `[N, C, H, W]` stored images.
        sigma: Noise level, > 0; noise of this standard deviation is added.
        blocks: Names of `block_names`.
        labels: `[N]` classes or `[N, label_dim]` vectors; None for missing labels.
        cells: Each side of the image is divided into so many parts, and the block's output averaged over each cell.
        batch_size: Images per batch.
        seed: Seed of the noise, which also depends on the image's number.

    Returns:
        For each block, `[N, width * cells^2]` float32: its output, averaged over the pixels of each cell.

    Raises:
        ValueError: For a block that does not exist, or a noise level that is not above 0.
    """
    if not sigma > 0:
        raise ValueError(f"noise level {sigma} must be above 0")
    known = _blocks(denoiser)
    for name in blocks:
        if name not in known:
            raise ValueError(f"there is no block {name!r}: the blocks are {', '.join(known)}")
    device = next(denoiser.parameters()).device
    parts: dict[str, list[np.ndarray]] = {name: [] for name in blocks}
    with _pooled({name: known[name] for name in blocks}, parts, cells):
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            stored = torch.from_numpy(images[part]).to(device)
            index = torch.arange(start, start + len(stored), device=device)
            x = coding.encode(stored, index, seed=seed)
            noise = keyed_normal(index, x.shape[1:], seed=seed, stream=_NOISE_STREAM)
            given = None if labels is None else torch.from_numpy(labels[part]).to(device)
            denoiser(x + sigma * noise, torch.tensor(sigma), given)
    return {name: np.concatenate(values) for name, values in parts.items()}


@contextmanager
def _pooled(modules: dict[str, nn.Module], found: dict[str, list[np.ndarray]], cells: int) -> Iterator[None]:
    """Collect the outputs of modules while the context is open."""
    with ExitStack() as stack:
        for name, module in modules.items():

            def keep(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
                pooled = F.adaptive_avg_pool2d(output.float(), cells).flatten(1)
                found[name].append(pooled.cpu().numpy())

            handle = module.register_forward_hook(keep)
            stack.callback(handle.remove)
        yield


def _blocks(denoiser: Denoiser) -> dict[str, nn.Module]:
    network = denoiser.unet
    if not isinstance(network, UNet):
        raise ValueError(
            f"{denoiser.title} is not a U-Net of edm2: register forward hooks on its own modules"
        )
    return {
        f"{side}.{name}": module
        for side, modules in (("enc", network.enc), ("dec", network.dec))
        for name, module in modules.items()
    }
