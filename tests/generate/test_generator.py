"""An image is a function of its seed, and inputs that do not fit are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import CODING, small_denoiser, small_generator, small_model
from torch import Tensor

import edm2
from edm2.data import PixelCoding
from edm2.diffusion import WithoutLabels, fixed_weights, save_model
from edm2.diffusion.fixed_weights import SamplingNetwork
from edm2.generate import ImageGenerator
from edm2.nn import NormalizedConv, use_channels_last
from edm2.nn.fast import FoldedConv
from edm2.train.coding import Coding


@pytest.mark.parametrize(
    "options", [{}, {"sampler": "heun", "s_churn": 4.0}, {"sampler": "euler"}, {"sampler": "dpmpp-2m-sde"}]
)
def test_image_depends_on_its_seed_alone(options: dict[str, Any]) -> None:
    generator = small_generator(fix_weights=True)
    together = generator.latents([5, 1, 9, 2], num_steps=4, **options)
    for place, seed in enumerate([5, 1, 9, 2]):
        alone = generator.latents([seed], num_steps=4, **options)[0]
        assert torch.allclose(together[place], alone, rtol=1e-4, atol=1e-4)
    assert float((together[0] - together[1]).abs().max()) > 0.1


def test_batches_give_the_same_images() -> None:
    generator = small_generator()
    whole = generator.images(range(5), num_steps=4)
    parts = generator.images(range(5), num_steps=4, batch_size=2)
    assert whole.shape == (5, 1, 8, 8)
    # The same numbers in another order of summation may fall on the other side of a half.
    assert np.abs(whole.astype(int) - parts).max() <= 1


def test_default_labels() -> None:
    generator = small_generator()
    assert generator.labels_for([0, 4, 8]).tolist() == [0, 1, 2]
    assert torch.equal(generator.latents([4], num_steps=2), generator.latents([4], [1], num_steps=2))
    assert not torch.equal(generator.latents([4], num_steps=2), generator.latents([4], [0], num_steps=2))


@pytest.mark.parametrize("config", "CDEFG")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fixed_weights_equal_the_plain_path_bit_for_bit(config: str, dtype: str) -> None:
    denoiser = small_denoiser(config=config, dtype=dtype)
    fixed = SamplingNetwork(denoiser, fold=False)
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0]), torch.tensor([0, 2])
    assert torch.equal(fixed(x, sigma, labels), denoiser(x, sigma, labels))
    denoiser.load_state_dict(small_denoiser(7, config=config).state_dict())
    assert not torch.allclose(fixed(x, sigma, labels), denoiser(x, sigma, labels), atol=0.05)
    fixed.refresh()
    assert torch.equal(fixed(x, sigma, labels), denoiser(x, sigma, labels))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 0.02)])
def test_folded_constants_change_only_the_rounding(dtype: str, bound: float, last: bool) -> None:
    options: dict[str, Any] = dict(
        channel_mult=(1, 2), attn_resolutions=(4,), res_balance=0.4, attn_balance=0.2, clip_act=2.0
    )
    denoiser = small_denoiser(**options)
    x, sigma, labels = torch.randn(5, 1, 8, 8), torch.tensor([0.01, 0.1, 0.5, 3.0, 50.0]), torch.arange(5) % 3
    exact = denoiser(x, sigma, labels)
    denoiser.dtype = getattr(torch, dtype)
    if last:
        use_channels_last(denoiser)
        x = x.contiguous(memory_format=torch.channels_last)
    given = x.clone()
    fixed = SamplingNetwork(denoiser)
    assert sum(type(layer) is FoldedConv for layer in fixed.module.modules()) > 20
    for network in (fixed, denoiser):
        assert float((network(x, sigma, labels) - exact).norm() / exact.norm()) < bound
    assert torch.equal(x, given)
    denoiser.load_state_dict(small_denoiser(7, **options).state_dict())
    fixed.refresh()
    torch.testing.assert_close(fixed(x, sigma, labels), denoiser(x, sigma, labels), rtol=bound, atol=bound)


def test_gradients_through_a_network_with_folded_constants() -> None:
    denoiser = small_denoiser()
    gradients = []
    for network in (SamplingNetwork(denoiser), denoiser):
        x = torch.ones(1, 1, 8, 8, requires_grad=True)
        network(x, torch.ones(1), torch.tensor([1])).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_weights_are_normalised_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    original = fixed_weights._weight

    def count(denoiser: Any, name: str, *, folded: bool) -> torch.Tensor:
        counted.append(name)
        return original(denoiser, name, folded=folded)

    generator = small_generator(fix_weights=True)
    monkeypatch.setattr(fixed_weights, "_weight", count)
    generator.latents([0], num_steps=8)
    layers = [name for name, layer in generator.denoiser.named_modules() if isinstance(layer, NormalizedConv)]
    assert counted == [name for name in layers if name.startswith("unet.")]


def test_compile_is_given_the_network_with_fixed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda module: given.append(module) or module)
    compiled = ImageGenerator(small_denoiser(), CODING, compile=True)
    assert torch.equal(compiled.latents([1], num_steps=3), small_generator().latents([1], num_steps=3))
    assert not any(isinstance(layer, NormalizedConv) for layer in given[0].unet.modules())


def test_fixed_weights_follow_a_change_of_precision() -> None:
    denoiser = small_denoiser()
    fixed = SamplingNetwork(denoiser)
    x, labels = torch.randn(1, 1, 8, 8), torch.tensor([0])
    for dtype in (torch.bfloat16, torch.float32):
        denoiser.dtype = dtype
        fixed.refresh()
        out = fixed(x, torch.ones(1), labels)
        assert torch.allclose(
            out, denoiser(x, torch.ones(1), labels), atol=0.02 if dtype != torch.float32 else 1e-5
        )


def test_guides_and_a_changed_image() -> None:
    generator, guide = small_generator(fix_weights=True), small_generator(1, label_dim=0)
    plain = generator.latents([0], num_steps=4)
    guided = generator.latents([0], num_steps=4, guide=guide, guidance=2.0)
    assert not torch.allclose(plain, guided, atol=1e-2)
    same = generator.latents([0], num_steps=4, guide=guide.denoiser, guidance=2.0)
    assert torch.allclose(guided, same, atol=1e-5)


@pytest.mark.parametrize("cond_channels", [0, 2])
def test_a_model_guides_itself_without_its_label(cond_channels: int) -> None:
    generator = small_generator(fix_weights=True, cond_channels=cond_channels)
    conditions = torch.ones(1, cond_channels, 8, 8) if cond_channels else None

    def unlabelled(x: Tensor, sigma: Tensor, labels: Tensor | None, /) -> Tensor:
        options = {} if conditions is None else {"condition": conditions}
        return generator.denoiser(x, sigma, None, **options)  # type: ignore[no-any-return]

    given: dict[str, Any] = dict(conditions=conditions, num_steps=4, guidance=2.0)
    own = generator.latents([0], guide=WithoutLabels(generator.denoiser, 3), **given)
    assert torch.allclose(own, generator.latents([0], guide=unlabelled, **given), rtol=1e-4, atol=1e-4)


def test_vectors_and_images_as_conditions() -> None:
    vectors = small_generator(label_kind="vector")
    assert (vectors.num_classes, vectors.takes_vectors) == (0, True)
    given = np.array([[1.0, 0.0, -1.0]], np.float32)
    assert vectors.latents([0], given, num_steps=2).shape == (1, 1, 8, 8)
    conditioned = small_generator(cond_channels=2)
    one, other = (
        conditioned.latents([0], conditions=v * torch.ones(1, 2, 8, 8), num_steps=2) for v in (-1, 1)
    )
    assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "labels", "told"),
    [
        ({}, [3], r"class 3 is outside 0\.\.2"),
        ({}, [-1], r"class -1 is outside 0\.\.2"),
        ({}, [0, 1], "2 labels for 1 seeds: give one each"),
        ({}, np.zeros((1, 3)), "must be class indices, integers"),
        ({"label_dim": 0}, [0], "labels were given to an unconditional model: leave them out"),
        ({"label_kind": "vector"}, None, r"conditioned on vectors: give labels \[N, 3\], none were given"),
        ({"label_kind": "vector"}, [1], r"give labels \[N, 3\], not of shape \(1,\)"),
        ({"cond_channels": 2}, None, r"conditioned on images: give conditions \[1, 2, 8, 8\]"),
    ],
)
def test_inputs_that_do_not_fit(options: dict[str, Any], labels: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        small_generator(**options).latents([0], labels)


def test_conditions_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"conditions of shape \[1, 1, 8, 8\]: this model takes none"):
        small_generator().latents([0], conditions=np.zeros((1, 1, 8, 8)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"channels": 2},
            r"the guide has images \(2, 8, 8\), the model \(1, 8, 8\): choose a guide that fits",
        ),
        ({"label_dim": 5}, "the guide has label size 5, the model 3"),
        ({"cond_channels": 1}, "the guide has condition channels 1, the model 0"),
    ],
)
def test_guide_that_does_not_fit(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        small_generator().latents([0], guide=small_generator(**options), guidance=2.0)


def test_guide_with_another_coding() -> None:
    other = Coding(kind="pixels", values=PixelCoding(mean=(0.5,), std=(0.3,)), num_channels=1)
    with pytest.raises(
        ValueError, match=r"the guide's images are coded as .*choose a guide that was trained with"
    ):
        small_generator().latents([0], guide=ImageGenerator(small_denoiser(1), other), guidance=2.0)


def test_models_with_equal_weights_are_told_apart() -> None:
    digests = {small_generator(**options).identity()["digest"] for options in ({}, {"sigma_data": 1.0})}
    assert len(digests) == 2


def test_other_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown sampler 'ddim': there are heun, euler, dpmpp-2m"):
        small_generator().latents([0], sampler="ddim")
    with pytest.raises(ValueError, match="0 seeds in batches of 250: both must be at least 1"):
        small_generator().images([])
    with pytest.raises(ValueError, match="5 images of which average"):
        ImageGenerator.load(tmp_path, num_images=5)


def test_load(tmp_path: Path) -> None:
    path = small_model(tmp_path / "m.safetensors")
    loaded = edm2.ImageGenerator.load(path)
    assert torch.allclose(
        loaded.latents([3], num_steps=3), small_generator().latents([3], num_steps=3), atol=1e-4
    )
    assert loaded.identity()["digest"] == small_generator().identity()["digest"]
    assert loaded.identity()["digest"] != small_generator(1).identity()["digest"]
    for dtype in ("bfloat16", torch.bfloat16):
        assert ImageGenerator.load(path, dtype=dtype).denoiser.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype float64 must be float32, bfloat16, float16"):
        ImageGenerator.load(path, dtype="float64")
    assert CODING.to_json() == loaded.coding.to_json()


def test_models_that_cannot_be_sampled(tmp_path: Path) -> None:
    denoiser = small_denoiser()
    path = save_model(tmp_path / "m.safetensors", denoiser.options, denoiser.state_dict())
    with pytest.raises(ValueError, match="does not say how its images are coded: load it with"):
        ImageGenerator.load(path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"run has no model.safetensors: give a model file or the folder of a fin"
    ):
        ImageGenerator.load(run)
    (run / "snapshots").mkdir()
    with pytest.raises(ValueError, match=r"run is an unfinished run, .*: name an EMA length, --ema 0\.1"):
        ImageGenerator.load(run)
    with pytest.raises(ValueError, match=r"m\.safetensors is a file: an EMA length is reconstructed from"):
        ImageGenerator.load(path, 0.1)
