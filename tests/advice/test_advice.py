"""Advice follows from the data, the budget and measured speed, and agrees with the presets that it is drawn through."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import edm2.advice.choose as choosing
from edm2.advice import Advice, check_pictures, scaling, suggest
from edm2.advice.memory import activation_bytes, fitting_images, step_bytes
from edm2.advice.structure import helpful_levels, measure_structure
from edm2.cli import main
from edm2.data import ArrayDataset, PairedDataset, open_dataset
from edm2.diffusion import build_denoiser
from edm2.forecast import Torus
from edm2.nn import count_flops
from edm2.presets import get_preset
from edm2.train import TrainConfig
from edm2.train.config_groups import NetworkConfig
from edm2.train.dry_run import DryRun, costs
from edm2.train.settings_file import read_settings

RNG = np.random.default_rng(0)


def coloured_noise(side: int, exponent: float, count: int = 32) -> np.ndarray:
    """Images whose spectrum falls with a power of the frequency."""
    rows, columns = np.fft.fftfreq(side)[:, None] * side, np.fft.fftfreq(side)[None] * side
    frequency = np.maximum(np.hypot(rows, columns), 1)
    noise = np.fft.fft2(RNG.standard_normal((count, 1, side, side)))
    return np.fft.ifft2(noise / frequency**exponent).real.astype(np.float32)


def test_white_data_has_no_structure() -> None:
    center, width = helpful_levels(np.full((1, 8, 8), 0.25), 0.5)
    assert (center, width) == (math.log(0.5), 0.0)


def test_the_levels_are_those_at_which_a_linear_denoiser_beats_one_that_knows_only_the_variance() -> None:
    # Half of the patterns carry all the variance: the error is v / (v + 1/2) / 2, its weight (v + 1/4) / (v / 4).
    center, width = helpful_levels(np.repeat([0.5, 0.0], 32), 0.5)
    levels = np.linspace(-8, 8, 20_001)
    variance = np.exp(2 * levels)
    gain = 1 - (variance + 0.25) / (variance + 0.5)
    mean = float((gain * levels).sum() / gain.sum())
    assert center == pytest.approx(mean, abs=0.05)
    assert width == pytest.approx(
        math.sqrt(float((gain * (levels - mean) ** 2).sum() / gain.sum())), abs=0.05
    )


def test_steeper_and_larger_pictures_need_more_noise_of_more_levels() -> None:
    small, large = (measure_structure(ArrayDataset(coloured_noise(side, 1.0))) for side in (16, 64))
    flat, steep = (measure_structure(ArrayDataset(coloured_noise(32, e))) for e in (0.5, 1.5))
    assert large.center > small.center
    assert large.strongest > 2 * small.strongest
    assert steep.width > flat.width


def test_structure_ignores_scale_and_missing_values() -> None:
    images = coloured_noise(16, 1.0)
    found = measure_structure(ArrayDataset(images))
    scaled = measure_structure(ArrayDataset(1000 * images + 7))
    assert scaled.center == pytest.approx(found.center, abs=1e-3)
    assert scaled.strongest == pytest.approx(found.strongest, rel=1e-3)


def test_levels_for_pairs_are_those_of_what_the_condition_leaves() -> None:
    torus = Torus()
    films = torus.frames(torch.arange(600), 3, seed=0)
    pairs = PairedDataset(ArrayDataset(films[:, 2:].numpy()), ArrayDataset(films[:, :2].numpy()))
    found = measure_structure(pairs)
    mean, std = torus.law(films[:, :2], 1)
    assert found.explained == pytest.approx(1 - float(std[0]) ** 2, abs=0.01)
    # The exact residuals, coded like the data, have these waves.
    waves = torch.fft.fft2((films[:, 2:] - mean) * 0.5 / films[:, 2].std(), norm="ortho")
    power = waves.abs().square().mean(0).numpy()
    levels = np.log(power) / 2
    assert found.center == pytest.approx(np.average(levels, weights=power), abs=0.05)
    assert found.width > math.pi / math.sqrt(12)
    exact = measure_structure(PairedDataset(pairs, ArrayDataset(films[:, 2:].numpy())))
    assert exact.explained == pytest.approx(1, abs=1e-6)
    assert exact.center == measure_structure(ArrayDataset(films[:, 2:].numpy())).center


def test_pairs_of_two_sizes_are_resampled(
    at_speed: Callable[[float], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at_speed(1e10)
    images = coloured_noise(16, 1.0, count=64)
    targets, inputs = tmp_path / "targets.npy", tmp_path / "inputs.npy"
    np.save(targets, images)
    np.save(inputs, images[:, :, ::2, ::2])
    out = tmp_path / "s.json"
    words = ["--condition", str(inputs), "--hours", "0.1", "--device", "cpu", "--out", str(out)]
    main(["suggest", str(targets), *words])
    config = read_settings(out).apply(TrainConfig())
    assert (config.condition, config.dataset.resample) == (str(inputs), "bicubic")
    assert 1.2 <= config.loss.p_std <= 2
    told = capsys.readouterr().out
    assert "--dataset.resample bicubic\n    conditions are of another size than the images" in told
    assert "a linear function of the condition explains" in told
    advice = suggest(
        open_dataset(targets, condition=inputs), data="x", condition="y", hours=0.1, device="cpu", quiet=True
    )
    assert 'condition = "y"' in advice.to_toml()


def test_the_line_goes_through_both_runs_and_near_fashion_mnist() -> None:
    for name in ("digits", "edm2-img512-xxl"):
        config = get_preset(name)
        assert scaling.batch_size(config.num_images) == config.batch_size
        rampup = 1e6 * config.optimizer.rampup_mimg
        assert scaling.rampup_images(config.num_images) == pytest.approx(rampup)
    assert scaling.run_length(3 * 29.2e6 * 44_000) == pytest.approx(44_000)
    # 80 million multiply-accumulates an image, 131,072 images.
    assert scaling.run_length(3 * 80.4e6 * 131_072) == pytest.approx(131_072, rel=0.1)
    for name in ("fashion-mnist-small", "fashion-mnist"):
        config = get_preset(name)
        assert scaling.batch_size(config.num_images) == config.batch_size


@pytest.mark.parametrize("size", ["xxs", "xs", "s", "m", "l", "xl", "xxl"])
def test_the_rate_is_that_of_the_paper(size: str) -> None:
    config = get_preset(f"edm2-img512-{size}")
    assert scaling.reference_rate(config.network.model_channels) == pytest.approx(
        config.optimizer.ref_lr, rel=0.06
    )


@pytest.mark.parametrize(
    ("height", "width", "sides", "pad_to"),
    [
        (8, 8, (8, 4), None),
        (28, 28, (28, 14, 7), None),
        (30, 30, (32, 16, 8), 32),
        (32, 32, (32, 16, 8), None),
        (64, 64, (64, 32, 16, 8), None),
        (64, 96, (64, 32, 16, 8), None),
        (50, 70, (50, 25), None),
        (256, 256, (256, 128, 64, 32, 16, 8), None),
    ],
)
def test_levels(height: int, width: int, sides: tuple[int, ...], pad_to: int | None) -> None:
    levels = scaling.levels_for(height, width)
    assert (levels.sides, levels.pad_to) == (sides, pad_to)
    for shape in ((16, 1), (128, 3)):
        network = scaling.network_for(levels, shape)
        with torch.device("meta"):
            build_denoiser(pad_to or (height, width), 3, **vars(network))


def test_the_network_of_64_pixels_and_128_channels_is_the_papers() -> None:
    network = scaling.network_for(scaling.levels_for(64, 64), (128, 3))
    assert network == get_preset("edm2-img64-xs").network or dataclasses.replace(
        network, dropout=0.0
    ) == dataclasses.replace(get_preset("edm2-img64-xs").network, dropout=0.0)


def test_odd_images_are_refused() -> None:
    with pytest.raises(ValueError, match="images of 7x9 cannot be halved: bring them to an even size"):
        scaling.levels_for(7, 9)


def test_activations_are_counted_as_they_are_kept() -> None:
    with torch.device("meta"):
        small, large = (
            build_denoiser(side, 3, model_channels=16, channel_mult=(1, 2), num_blocks=1,
                           channels_per_head=16, attn_resolutions=())
            for side in (16, 32)
        )  # fmt: skip
    assert 3.5 < activation_bytes(large) / activation_bytes(small) < 4.5
    config = TrainConfig(batch_size=64)
    limit = step_bytes(config, 1000, 10**6, images=16)
    assert fitting_images(config, 1000, 10**6, limit) == 16
    assert fitting_images(config, 1000, 10**6, 10**5) == 0


@functools.cache
def size_of(network: NetworkConfig, shape: tuple[int, int, int], classes: int) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of a forward pass."""
    labels = torch.zeros(1, classes, device="meta") if classes else None
    with torch.device("meta"):
        denoiser = build_denoiser(shape[1:], shape[0], classes, **vars(network)).eval()
        flops = count_flops(denoiser, torch.zeros(1, *shape), torch.ones(1), labels)
    return sum(p.numel() for p in denoiser.parameters()), flops


@pytest.fixture
def at_speed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let a machine do a number of multiply-accumulates a second, whatever the network."""

    def set_speed(macs: float) -> None:
        def measured(config: TrainConfig, *, steps: int, dataset: ArrayDataset) -> DryRun:
            num_params, flops = size_of(config.network, dataset.image_shape, dataset.num_classes)
            speed = macs / (3 * flops) * (1.1 if config.dtype == "bfloat16" else 1.0)
            return costs(config, num_params=num_params, flops=flops, peak_bytes=0, images_per_second=speed)

        def counted(work: Any, shape: tuple[int, int]) -> int:
            data = work.dataset
            return size_of(scaling.network_for(work.levels, shape), data.image_shape, data.num_classes)[1]

        monkeypatch.setattr(choosing, "dry_run", measured)
        monkeypatch.setattr(choosing._Work, "_macs", counted)  # counted once for all tests

    return set_speed


def advise(dataset: ArrayDataset, hours: float, **options: float) -> Advice:
    return suggest(dataset, data="x", hours=hours, device="cpu", quiet=True, **options)


def test_digits_at_the_speed_of_the_demo_give_the_demos_preset(at_speed: Callable[[float], None]) -> None:
    at_speed(3 * 29.2e6 * 44_000 / 150)  # two cores of an AMD EPYC: 44,000 images in about 150 s
    config = advise(open_dataset("digits"), 150 / 3600).config
    known = get_preset("digits")
    assert config.network.model_channels == known.network.model_channels
    assert config.network.channel_mult == known.network.channel_mult
    assert config.batch_size == known.batch_size
    assert config.num_images == pytest.approx(known.num_images, rel=0.05)
    assert config.optimizer.ref_lr == pytest.approx(known.optimizer.ref_lr, rel=0.25)
    assert config.optimizer.ref_batches == pytest.approx(known.optimizer.ref_batches, rel=0.1)
    assert config.loss.p_mean == pytest.approx(known.loss.p_mean, abs=0.4)
    assert config.loss.p_std == pytest.approx(known.loss.p_std, abs=0.2)
    assert config.dataset.augment == 0
    assert config.dtype == "float32"  # 10% are not worth bfloat16's rounding


def test_more_time_gives_a_larger_network_and_a_longer_run(at_speed: Callable[[float], None]) -> None:
    at_speed(1e10)
    images = coloured_noise(8, 1.0, count=64)
    short, long = (advise(ArrayDataset(images), hours) for hours in (0.05, 2.0))
    assert long.config.num_images > short.config.num_images
    assert long.cost.num_params > short.cost.num_params
    assert short.cost.seconds == pytest.approx(180, rel=0.1)
    for advice in (short, long):
        config = advice.config
        assert config.num_images == 10 * config.snapshot_interval
        assert config.snapshot_interval % config.batch_size == 0
    # 64 images are seen very often: EDM's remedies, and an end.
    assert (long.config.dataset.augment, long.config.network.dropout) == (0.12, 0.1)
    assert long.config.num_images <= 4000 * 64 * 1.1
    assert "64 images are few" in long.describe()


def test_memory_splits_the_batch_and_then_shrinks_the_network(at_speed: Callable[[float], None]) -> None:
    at_speed(1e10)
    dataset = ArrayDataset(coloured_noise(8, 1.0, count=64).repeat(100, 0))
    free, split, small = (advise(dataset, 0.1, memory=memory) for memory in (1e9, 8e7, 2e7))
    assert free.config.microbatch is None
    assert split.config.microbatch in (1, 2, 4, 8, 16, 32)
    assert split.cost.num_params == free.cost.num_params
    assert "divided to fit into 80 MB" in split.describe()
    assert small.cost.num_params < free.cost.num_params
    with pytest.raises(ValueError, match=r"the smallest network needs .* above the memory of 1 kB"):
        advise(dataset, 0.1, memory=1e3)


def test_large_pictures_are_told_about(at_speed: Callable[[float], None]) -> None:
    at_speed(1e11)
    advice = advise(ArrayDataset(coloured_noise(256, 1.5, count=8)), 0.25)
    assert advice.config.sigma_max > 80
    assert (
        f"--sigma-max {advice.config.sigma_max:g}\n    samples start where noise hides" in advice.describe()
    )
    told = "\n".join(advice.remarks())
    assert "or use smaller images (edm2 data convert --size 32)" in told
    assert advice.is_too_large


def test_the_file_gives_the_same_settings(at_speed: Callable[[float], None], tmp_path: Path) -> None:
    at_speed(1e11)
    advice = advise(open_dataset("digits"), 0.1)
    path = tmp_path / "digits.toml"
    path.write_text(advice.to_toml())
    pytest.importorskip("tomllib")
    read = read_settings(path).apply(TrainConfig())
    assert dataclasses.replace(read, device="cpu") == advice.config
    assert all(f"# {why}" in path.read_text() for _, why in advice.reasons())


@pytest.mark.parametrize("options", [{"hours": 0.0}, {"hours": math.inf}, {"memory": -1.0}])
def test_bad_budgets(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be above 0 and finite"):
        suggest(open_dataset("digits"), data="digits", quiet=True, **options)


def test_a_float_array_of_twelve_bands_is_really_measured() -> None:
    images = RNG.standard_normal((40, 12, 8, 8)).astype(np.float32)
    advice = suggest(ArrayDataset(images), data="x", hours=1e-3, device="cpu", quiet=True)
    assert advice.cost.images_per_second > 0
    assert advice.config.num_images % advice.config.batch_size == 0
    assert "12 channels" in advice.headline()


def save(path: Path, size: tuple[int, int], mode: str) -> None:
    Image.fromarray(RNG.integers(0, 256, (*size, len(mode)), dtype=np.uint8).squeeze()).convert(mode).save(
        path
    )


def test_pictures_that_need_mending_are_refused_with_the_command(tmp_path: Path) -> None:
    save(tmp_path / "a.png", (48, 60), "RGB")
    check_pictures(str(tmp_path))
    save(tmp_path / "b.png", (90, 40), "RGB")
    command = f"edm2 data convert {tmp_path} --out {tmp_path.name}-32.zip --size 32"
    with pytest.raises(ValueError, match=f"2 different sizes .*\n  {command}$"):
        check_pictures(str(tmp_path), device="cpu")
    save(tmp_path / "c.png", (90, 20), "RGBA")
    with pytest.raises(ValueError, match=r"transparency in 1 of 3 .*\n.* --size 20 --background white$"):
        check_pictures(str(tmp_path), device="cpu")


def test_arrays_pass() -> None:
    check_pictures("digits")


def test_a_memory_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["suggest", "digits", "--memory", "-1"])
    assert "--memory -1 must be above 0, in GB" in capsys.readouterr().err
