"""What a network is trained for."""

import torch

from edm2.diffusion import draw_sigma, edm2_loss
from edm2.nn import keyed_normal
from edm2.train import TrainConfig
from edm2.train.objectives import TrainingBatch, make_objective


class Shrink:
    """A denoiser that halves its input, and keeps what else it was given."""

    sigma_data = 0.5

    def __call__(self, x, sigma, labels=None, return_logvar=False, **given):
        self.given = given
        return x / 2, torch.zeros(len(x), 1, 1, 1)


def test_the_default_is_the_loss_of_edm2_on_noise_keyed_by_position():
    config = TrainConfig(seed=3)
    index = torch.arange(40, 44)
    batch = TrainingBatch(images=torch.randn(4, 1, 2, 2), index=index, num_images=32)
    denoiser = Shrink()
    sigma = draw_sigma(index, p_mean=-0.4, p_std=1.0, seed=3, stream=0)
    noise = keyed_normal(index, (1, 2, 2), seed=3, stream=1)
    wanted = edm2_loss(denoiser, batch.images, None, sigma, noise)
    assert torch.equal(make_objective(config)(denoiser, batch), wanted)
    assert denoiser.given == {"augment_labels": None, "dropout_index": index, "dropout_seed": 3 + (1 << 62)}
