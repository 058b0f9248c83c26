"""Networks that diffusers' EDM schedulers and guiders drive; needs diffusers."""

from typing import Any

import torch
from torch import Tensor

from edm2.diffusion import Denoiser
from edm2.diffusion.description import build_from
from edm2.extras import needed

with needed("edm2.hub.diffusers"):
    from diffusers import ConfigMixin, EDMEulerScheduler, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.unets.unet_2d import UNet2DOutput


class EDM2Model(ModelMixin, ConfigMixin):
    """The raw network F of a denoiser, as diffusers' EDM schedulers expect it.

    `EDMEulerScheduler` and `EDMDPMSolverMultistepScheduler` have EDM's preconditioning in themselves: they scale the
    inputs, give ln(sigma) / 4 as the time step, and turn F's output into denoised images. `scheduler` makes one that
    fits. `save_pretrained` and `from_pretrained` are diffusers' own.

    Args:
        network: Description of the network, `Denoiser.options`.

    Raises:
        ValueError: If no network has such a description.

    Ref: EDM (arXiv 2206.00364) Table 1.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, network: dict[str, Any]) -> None:
        super().__init__()
        build_from(network)  # without memory: says whether there is such a network
        self.denoiser = build_from(network, device="cpu")

    @classmethod
    def from_denoiser(cls, denoiser: Denoiser) -> "EDM2Model":
        """Copy a denoiser, such as `ImageGenerator.load(run).denoiser`.

        Raises:
            ValueError: If it does not know how it was built.
        """
        if not denoiser.options:
            raise ValueError(
                "this denoiser does not know how it was built: make it with build_denoiser, or register_network"
            )
        model: EDM2Model = cls(denoiser.options)
        model.denoiser.load_state_dict(denoiser.state_dict())
        return model

    def scheduler(self, sigma_max: float = 80.0) -> EDMEulerScheduler:
        """A scheduler that fits, with EDM's noise levels; start it from unit noise times `sigma_max`."""
        return EDMEulerScheduler(
            sigma_min=0.002, sigma_max=sigma_max, sigma_data=self.denoiser.sigma_data, rho=7.0
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Apply F.

        Args:
            sample: `[B, C, H, W]`, scaled by the scheduler.
            timestep: ln(sigma) / 4, a scalar or `[B]`.
            class_labels: `[B]` class indices, `[B, label_dim]` floats, or None for a missing label.
            condition: `[B, cond_channels, H, W]` image given as a condition.
            return_dict: False returns a tuple.

        Returns:
            F's output, `[B, C, H, W]`.
        """
        times = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).flatten()
        inputs = sample if condition is None else torch.cat([sample, condition.to(sample.dtype)], dim=1)
        made: Tensor = self.denoiser.unet(
            inputs, times.expand(len(sample)), self.denoiser.encode_labels(class_labels)
        )
        return UNet2DOutput(sample=made) if return_dict else (made,)

    def denoise(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """Estimate the clean images, as `edm2.diffusion.Denoiser` does."""
        denoised: Tensor = self.denoiser(x, sigma, labels, condition=condition)
        return denoised
