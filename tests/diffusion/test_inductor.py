"""What torch.compile really makes of the network; elsewhere only its tracing is tested, which is quick.

A compiler may be wrong: torch 2.13's dropped the factor of a sum that it fused with a matrix product, see `mp_sum`,
and gave no gradients to the layers before an upsampling, see `resample`.
"""

from pathlib import Path

import pytest
import torch

from edm2.diffusion import build_denoiser, edm2_loss


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("config", ["A", "E", "G"])
def test_the_compiled_network_is_the_network(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A cache of its own: the shared one may hold what a killed compiler left.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    denoiser = build_denoiser(
        8, 2, 5, config=config, augment_dim=9, model_channels=16, channel_mult=(1, 2), num_blocks=1,
        channels_per_head=16, attn_resolutions=(4,), dropout=0.0,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.abs().max() == 0:  # gains and the ends of branches: let them speak
                parameter.normal_().mul_(0.3)
    images, noise = torch.randn(2, 6, 2, 8, 8).unbind()
    labels, sigma = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([0.02, 0.1, 0.4, 1.0, 5.0, 40.0])
    augment_labels = torch.randn(6, 9) * (torch.arange(6) % 2)[:, None]

    def outcome(forward: torch.nn.Module) -> dict[str, torch.Tensor]:
        denoiser.zero_grad()
        loss = edm2_loss(forward, images, labels, sigma, noise, augment_labels=augment_labels)
        loss.mean().backward()
        gradients = {name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **gradients}

    denoiser.eval()  # config E's and G's layers overwrite their weights in training mode: that is ForcedWeightNorm's
    eager = outcome(denoiser)
    found = outcome(torch.compile(denoiser))
    assert found.keys() == eager.keys()
    errors = {
        name: float((found[name] - value).abs().max() / value.abs().max().clamp_min(1e-6))
        for name, value in eager.items()
    }
    assert {name: error for name, error in errors.items() if error > 1e-4} == {}
