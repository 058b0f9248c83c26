"""Presets are what the paper's table says, and each can be built."""

from collections.abc import Callable

import pytest
import torch

from edm2.diffusion import Denoiser, build_denoiser
from edm2.presets import PRESETS, fashion_mnist, fashion_mnist_small, get_preset, image_shape, img64, img512
from edm2.presets import digits as digits_preset
from edm2.train import EMAConfig

MI = 1 << 20
# EDM2 Table 6: images (Mi), channels, ref_lr, t_ref, dropout, P_mean, P_std; then parameters, counted layer by layer.
TABLE = {
    "edm2-img512-xxs": (2048, 64, 0.0170, 70000, 0.0, -0.4, 1.0, 31_309_029),
    "edm2-img512-xs": (2048, 128, 0.0120, 70000, 0.0, -0.4, 1.0, 124_713_253),
    "edm2-img512-s": (2048, 192, 0.0100, 70000, 0.0, -0.4, 1.0, 280_212_837),
    "edm2-img512-m": (2048, 256, 0.0090, 70000, 0.1, -0.4, 1.0, 497_807_781),
    "edm2-img512-l": (1792, 320, 0.0080, 70000, 0.1, -0.4, 1.0, 777_498_085),
    "edm2-img512-xl": (1280, 384, 0.0070, 70000, 0.1, -0.4, 1.0, 1_119_283_749),
    "edm2-img512-xxl": (896, 448, 0.0065, 70000, 0.1, -0.4, 1.0, 1_523_164_773),
    "edm2-img64-xs": (1024, 128, 0.0120, 35000, 0.0, -0.8, 1.6, 124_710_949),
    "edm2-img64-s": (1024, 192, 0.0100, 35000, 0.0, -0.8, 1.6, 280_209_381),
    "edm2-img64-m": (2048, 256, 0.0090, 35000, 0.1, -0.8, 1.6, 497_803_173),
    "edm2-img64-l": (1024, 320, 0.0080, 35000, 0.1, -0.8, 1.6, 777_492_325),
    "edm2-img64-xl": (640, 384, 0.0070, 35000, 0.1, -0.8, 1.6, 1_119_276_837),
}


def build(name: str) -> Denoiser:
    config = get_preset(name)
    channels, height, _, classes = image_shape(name)
    with torch.device("meta"):
        return build_denoiser(height, channels, classes, **vars(config.network))


def test_presets_of_the_table_are_all_there() -> None:
    assert {name for name in PRESETS if name.startswith("edm2-")} == TABLE.keys()


@pytest.mark.parametrize("name", TABLE)
def test_preset_equals_the_table(name: str) -> None:
    images, channels, lr, ref_batches, dropout, p_mean, p_std, parameters = TABLE[name]
    config = get_preset(name)
    assert config.num_images == images * MI
    assert config.batch_size == 2048
    assert config.network.model_channels == channels
    assert (config.optimizer.ref_lr, config.optimizer.ref_batches) == (lr, ref_batches)
    assert config.optimizer.rampup_mimg == 10
    assert (config.optimizer.betas, config.optimizer.eps) == ((0.9, 0.99), 1e-8)
    assert (config.network.dropout or 0.0) == dropout
    assert (config.loss.p_mean, config.loss.p_std, config.loss.sigma_data) == (p_mean, p_std, 0.5)
    # Averages change nothing of the training; the trainer's own choice spans more lengths than the paper's two.
    assert config.ema.sigma_rels == EMAConfig().sigma_rels
    assert sum(p.numel() for p in build(name).parameters()) == parameters


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name: str) -> None:
    assert build(name).label_dim == image_shape(name)[3]


def test_each_call_gives_the_same_settings() -> None:
    assert get_preset("digits") == get_preset("digits")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("digit", r"unknown preset 'digit': did you mean digits\?"),
        ("edm2-img512-sx", r"unknown preset 'edm2-img512-sx': did you mean edm2-img512-"),
        ("fashion", r"did you mean fashion-mnist or fashion-mnist-small\?"),
        ("", r"unknown preset '': there are digits, fashion-mnist, fashion-mnist-small"),
        ("qqqq", r"unknown preset 'qqqq': there are digits"),
    ],
)
def test_unknown_preset(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        get_preset(name)


@pytest.mark.parametrize(
    "preset", [digits_preset, fashion_mnist, fashion_mnist_small, img512, img64], ids=lambda f: f.__name__
)
def test_every_preset_has_a_receipt(preset: Callable[..., object]) -> None:
    receipt = preset.__doc__ or ""
    assert "Source:" in receipt
    assert "Result:" in receipt or "ot run" in receipt
