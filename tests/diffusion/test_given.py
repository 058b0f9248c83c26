"""A denoiser bound to a condition and vectors is an ordinary denoiser, for guidance and samplers too."""

from typing import Any

import pytest
import torch

from edm2.diffusion import WithoutLabels, build_denoiser, guided, sample_heun, time_steps

SIZE = dict(model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8)


@pytest.fixture(scope="module")
def networks(speak: Any) -> Any:
    torch.manual_seed(0)

    def made(**options: Any) -> Any:
        return speak(build_denoiser(4, 1, **options, cond_channels=2, **SIZE)).eval()

    return made(label_dim=3), made(label_dim=3, label_kind="vector")


def test_a_bound_denoiser_is_the_denoiser_with_its_arguments(networks: Any) -> None:
    classes, vectors = networks
    x, condition, sigma = torch.randn(4, 1, 4, 4), torch.randn(4, 2, 4, 4), torch.tensor(0.7)
    labels, vector = torch.tensor([0, 1, 2, 0]), torch.randn(4, 3)
    with torch.no_grad():
        assert classes.given(condition)(x, sigma, labels).equal(
            classes(x, sigma, labels, condition=condition)
        )
        given = vectors.given(condition, vector)
        assert given(x, sigma, None).equal(vectors(x, sigma, vector, condition=condition))
        assert given(x, sigma, 2 * vector).equal(vectors(x, sigma, 2 * vector, condition=condition))
        # Two members of each case at a time.
        twice = given(torch.cat([x, x]), sigma)
        assert torch.allclose(twice, torch.cat([given(x, sigma)] * 2), atol=1e-6)
    with pytest.raises(ValueError, match="6 images for conditions or vectors of 4: give one for each image"):
        given(torch.zeros(6, 1, 4, 4), sigma)


@pytest.mark.parametrize("size", [1, 4])
def test_guidance_by_its_label_free_self_keeps_the_condition(networks: Any, size: int) -> None:
    x, condition = torch.randn(size, 1, 4, 4), torch.randn(size, 2, 4, 4)
    known = torch.randn(size, 3)
    for network, given, labels in (
        (networks[0], networks[0].given(condition), torch.zeros(size, dtype=torch.int64)),
        (networks[1], networks[1].given(condition, known), None),
    ):
        guide = WithoutLabels(given, 3)
        made = sample_heun(guided(given, guide, 1.5), x, time_steps(3), labels)

        def by_hand(x: Any, sigma: Any, labels: Any, /, network: Any = network, given: Any = given) -> Any:
            plain = network(x, sigma, None, condition=condition)
            return plain + 1.5 * (given(x, sigma, labels) - plain)

        assert torch.allclose(made, sample_heun(by_hand, x, time_steps(3), labels), atol=1e-4)
