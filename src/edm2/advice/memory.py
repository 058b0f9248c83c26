"""Memory of a training step, counted instead of tried."""

import torch
from torch import Tensor

from edm2.diffusion import Denoiser, edm2_loss
from edm2.ema.maths.plans import memory_bytes
from edm2.train.config import TrainConfig

_STATES = 4 * 4  # weights, gradients and two moments of Adam in float32
_MARGIN = 1.25  # the backward pass's own intermediates, and what an allocator wastes


def activation_bytes(denoiser: Denoiser) -> int:
    """Bytes that one image keeps between the forward and the backward pass.

    Args:
        denoiser: The network on the meta device, so that nothing is computed.
    """
    one, two = (_kept(denoiser, count) for count in (1, 2))  # both hold the normalised weights
    return two - one


def _kept(denoiser: Denoiser, count: int) -> int:
    kept: dict[int, tuple[Tensor, int]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (tensor, storage.nbytes())  # held, so that no other storage takes its place
        return tensor

    image = torch.zeros((count, *denoiser.img_shape), device="meta")
    labels = torch.zeros(count, denoiser.label_dim, device="meta") if denoiser.label_dim else None
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        edm2_loss(denoiser.train(), image, labels, torch.ones(count, device="meta"), image)
    return sum(size for _, size in kept.values())


def step_bytes(config: TrainConfig, num_params: int, per_image: int, images: int) -> float:
    """Bytes of a run at its peak, with some number of images in a forward pass."""
    averages = memory_bytes(num_params, len(config.ema.sigma_rels), updates=config.num_steps)
    return _MARGIN * (_STATES * num_params + averages + images * per_image)


def fitting_images(config: TrainConfig, num_params: int, per_image: int, limit: float) -> int:
    """Images per forward pass that fit into the memory: the batch, halved until they do; 0 if not one fits."""
    images = config.batch_size
    while images and step_bytes(config, num_params, per_image, images) > limit:
        images //= 2
    return images
