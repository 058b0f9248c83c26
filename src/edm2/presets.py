"""Presets: one function for each training run.

Each docstring says where the settings come from, what the run costs, and what came out of it, or that it was not run
here. `edm2 info NAME` prints parameters and operations.
"""

import difflib
from collections.abc import Callable

from edm2.train.config import TrainConfig
from edm2.train.config_groups import DataConfig, EMAConfig, LossConfig, NetworkConfig, OptimizerConfig

_MI = 1 << 20
# EDM2 Table 6: size -> channels, ref_lr, dropout, Mi images at img512 and img64.
_SIZES = {
    "xxs": (64, 0.0170, 0.0, 2048, None),
    "xs": (128, 0.0120, 0.0, 2048, 1024),
    "s": (192, 0.0100, 0.0, 2048, 1024),
    "m": (256, 0.0090, 0.1, 2048, 2048),
    "l": (320, 0.0080, 0.1, 1792, 1024),
    "xl": (384, 0.0070, 0.1, 1280, 640),
    "xxl": (448, 0.0065, 0.1, 896, None),
}
# Mean and standard deviation of the latents of stabilityai/sd-vae-ft-mse on ImageNet.
_LATENT_MEAN = (5.81, 3.25, 0.12, -2.15)
_LATENT_STD = (4.17, 4.62, 3.71, 3.28)


def digits() -> TrainConfig:
    """scikit-learn's handwritten digits, 8x8, on a laptop's CPU.

    Source: ours, chosen by how often a support-vector classifier saw the intended class in 1,000 samples of 16
    Heun steps, after runs of 30,000 images with model_channels 32: batch 64 with ref_lr 0.01, 0.02, 0.03 gave
    97.1%, 97.8%, 98.6%; batch 32 with 0.02, 0.03 gave 98.1%, 98.7%. p_mean of 0 and of -0.8 were not better.
    The faster decay of the rate (ref_batches 150 for 300) makes the choice of EMA length matter less.
    Cost: 3 minutes 11 seconds with everything, two cores of an AMD EPYC. Command: `edm2 demo --out runs/demo`.
    Result: 98.2% recognised (real test digits 98.6%), Frechet distance 0.926 at EMA length 0.05 (real 1.416).
    """
    return TrainConfig(
        data="digits",
        num_images=44_000,
        batch_size=32,
        snapshot_images=3_200,
        checkpoint_images=16_000,
        log_images=640,
        network=NetworkConfig(
            model_channels=32, channel_mult=(1, 2), num_blocks=2, attn_resolutions=(4,), channels_per_head=32
        ),
        optimizer=OptimizerConfig(ref_lr=0.03, ref_batches=150, rampup_mimg=0.002),
        ema=EMAConfig(sigma_rels=(0.05, 0.10)),
    )


def fashion_mnist() -> TrainConfig:
    """Fashion-MNIST, padded to 32x32, on one GPU or in a long evening on a CPU.

    Source: ours (1.7M parameters). Not run to its end here.
    """
    return TrainConfig(
        data="fashion-mnist",
        num_images=4 * _MI,
        batch_size=256,
        snapshot_images=_MI // 2,
        checkpoint_images=_MI // 4,
        log_images=8192,
        dataset=DataConfig(pad_to=32),
        network=NetworkConfig(
            model_channels=32,
            channel_mult=(1, 2, 2),
            num_blocks=2,
            attn_resolutions=(8,),
            channels_per_head=32,
        ),
        optimizer=OptimizerConfig(ref_lr=0.01, ref_batches=2000, rampup_mimg=0.05),
    )


def fashion_mnist_small() -> TrainConfig:
    """Fashion-MNIST, padded to 32x32, with a network of 0.3M parameters, on a laptop's CPU.

    Source: ours; the rate is two thirds of that of `digits`, at twice its batch; not searched for.
    Cost: 16 minutes on one busy core of an AMD EPYC. Command: `edm2 train --preset fashion-mnist-small --out RUN`,
    then `edm2 tune RUN --sampler dpmpp-2m --num-steps 12 --samples 500`.
    Result: Frechet distance 1.83 at EMA length 0.10 without guidance, 1.13 tuned (docs/tuning.md).
    """
    return TrainConfig(
        data="fashion-mnist",
        num_images=128 * 1024,
        batch_size=64,
        dtype="bfloat16",
        snapshot_images=8192,
        checkpoint_images=16_384,
        log_images=2048,
        dataset=DataConfig(pad_to=32),
        network=NetworkConfig(
            model_channels=16,
            channel_mult=(1, 2, 2),
            num_blocks=1,
            attn_resolutions=(8,),
            channels_per_head=32,
        ),
        optimizer=OptimizerConfig(ref_lr=0.02, ref_batches=300, rampup_mimg=0.006),
    )


def img512(size: str) -> TrainConfig:
    """ImageNet-512 latents, 64x64x4, 1000 classes.

    Source: EDM2 Table 6. The paper's cost: 2048 Mi images at batch 2048. Data: latents with 8 channels, means then
    standard deviations. Not run here.
    """
    channels, lr, dropout, mimg, _ = _SIZES[size]
    return TrainConfig(
        num_images=mimg * _MI,
        batch_size=2048,
        dtype="float16",
        dataset=DataConfig(coding="latents", mean=_LATENT_MEAN, std=_LATENT_STD),
        network=NetworkConfig(model_channels=channels, dropout=dropout),
        optimizer=OptimizerConfig(ref_lr=lr, ref_batches=70000),
        loss=LossConfig(p_mean=-0.4, p_std=1.0),
        ema=EMAConfig(dtype="fp16"),
    )


def img64(size: str) -> TrainConfig:
    """ImageNet-64 pixels, 64x64x3, 1000 classes.

    Source: EDM2 Table 6. Not run here.
    """
    channels, lr, dropout, _, mimg = _SIZES[size]
    assert mimg is not None
    return TrainConfig(
        num_images=mimg * _MI,
        batch_size=2048,
        dtype="float16",
        dataset=DataConfig(coding="plain"),
        network=NetworkConfig(model_channels=channels, dropout=dropout),
        optimizer=OptimizerConfig(ref_lr=lr, ref_batches=35000),
        loss=LossConfig(p_mean=-0.8, p_std=1.6),
        ema=EMAConfig(dtype="fp16"),
    )


def cifar(classes: int) -> TrainConfig:
    """CIFAR-10 or CIFAR-100, 32x32, on one GPU.

    Source: width, levels, batch, length, dropout and augmentation of EDM's networks for CIFAR-10 (arXiv 2206.00364
    Table 7, App. F.2); layers and noise levels of EDM2's config G; the rate is ours and was not searched for.
    Cost and result: it was not run here.
    """
    return TrainConfig(
        data=f"cifar-{classes}-python.tar.gz",
        num_images=200 * _MI,
        batch_size=512,
        checkpoint_images=4 * _MI,
        dataset=DataConfig(augment=0.12),
        network=NetworkConfig(
            model_channels=128, channel_mult=(2, 2, 2), attn_resolutions=(16,), dropout=0.13
        ),
        optimizer=OptimizerConfig(ref_lr=0.01, ref_batches=70_000, rampup_mimg=10.0),
    )


def tiny_imagenet() -> TrainConfig:
    """Tiny-ImageNet, 64x64, 200 classes, on one GPU.

    Source: noise levels and decay of the rate as in EDM2's networks for ImageNet-64 (Table 6), at half the width of
    their XS; augmentation as in EDM's for FFHQ at 64x64 (arXiv 2206.00364 App. F.2); rate, batch, length and dropout
    are ours and were not searched for.
    Cost and result: it was not run here.
    """
    return TrainConfig(
        data="tiny-imagenet-200.zip",
        num_images=100 * _MI,
        batch_size=512,
        checkpoint_images=4 * _MI,
        dataset=DataConfig(augment=0.15),
        network=NetworkConfig(model_channels=64, dropout=0.1),
        optimizer=OptimizerConfig(ref_lr=0.01, ref_batches=35_000),
        loss=LossConfig(p_mean=-0.8, p_std=1.6),
    )


def _named(make: Callable[[str], TrainConfig], size: str) -> Callable[[], TrainConfig]:
    return lambda: make(size)


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "fashion-mnist-small": fashion_mnist_small,
    "cifar-10": lambda: cifar(10),
    "cifar-100": lambda: cifar(100),
    "tiny-imagenet": tiny_imagenet,
    **{f"edm2-img512-{size}": _named(img512, size) for size in _SIZES},
    **{f"edm2-img64-{size}": _named(img64, size) for size, facts in _SIZES.items() if facts[4]},
}


def get_preset(name: str) -> TrainConfig:
    """The settings of a preset.

    Raises:
        ValueError: If there is no preset of that name; the message suggests similar ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(PRESETS)}"
        raise ValueError(f"unknown preset {name!r}: {hint}")
    return PRESETS[name]()


def image_shape(name: str) -> tuple[int, int, int, int]:
    """Channels, height, width and classes of a preset's images, without opening the data set."""
    if name == "digits":
        return 1, 8, 8, 10
    if name.startswith("fashion-mnist"):
        return 1, 32, 32, 10
    if name.startswith("cifar"):
        return 3, 32, 32, int(name.rpartition("-")[2])
    if name == "tiny-imagenet":
        return 3, 64, 64, 200
    return (4 if "img512" in name else 3), 64, 64, 1000
