"""A network of the user's own goes the whole way: trained, stopped, resumed, saved, reconstructed, sampled."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_resume import stop_at
from tiny_run import files_of, log_of, tiny_config, tiny_data
from torch import Tensor, nn

from edm2.cli import main
from edm2.commands.info import describe_path
from edm2.diffusion import (
    Denoiser,
    LearnedUncertainty,
    edm2_loss,
    load_model,
    own_network,
    register_network,
    save_model,
)
from edm2.ema import reconstruct
from edm2.generate import ImageGenerator, reconstruct_models
from edm2.nn import MPConv
from edm2.train import DataConfig, OptimizerConfig, Stopped, Trainer, train


class PlainNet(nn.Module):
    """Two convolutions, a bias for the noise level and for the class, and torch's own dropout."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.level = nn.Linear(1, 8)
        self.label = nn.Linear(classes, 8) if classes else None
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Conv2d(8, channels, 3, padding=1)
        self.register_buffer("scale", torch.full((), 2.0), persistent=False)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        bias = self.level(c_noise[:, None])
        if self.label is not None and labels is not None:
            bias = bias + self.label(labels)
        y = torch.relu(self.first(x) + bias.to(x.dtype)[:, :, None, None])
        out: Tensor = self.last(self.dropout(y) * self.scale)
        return out


def make(img_resolution: Any, img_channels: int, label_dim: int) -> nn.Module:
    return PlainNet(img_channels, label_dim)


NAME = f"{__name__}:make"
CONFIG: dict[str, Any] = {"optimizer": OptimizerConfig(ref_lr=1e-3)}


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_network, "_registered", {})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("own") / "run"
    train(tiny_config(**CONFIG), out, dataset=tiny_data(), network=make, quiet=True)
    return out


def test_stopped_and_resumed_is_the_whole_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(
            tiny_config(**CONFIG), tmp_path / "run", dataset=tiny_data(), network=make, quiet=True,
            on_step=stop_at(72),
        )  # fmt: skip
    train(tiny_config(network_from=NAME, **CONFIG), tmp_path / "run", dataset=tiny_data(), quiet=True)
    assert files_of(tmp_path / "run") == files_of(run)
    assert log_of(tmp_path / "run") == log_of(run)
    assert json.loads((run / "config.json").read_text())["settings"]["network_from"] == NAME


@pytest.mark.parametrize("changes", [{"microbatch": 4}, {"checkpoint_activations": True}])
def test_how_a_batch_is_computed_does_not_matter(run: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    if "microbatch" in changes:  # the masks of dropout are those of other passes: compare without
        changes |= {"num_images": 8}
    train(tiny_config(**CONFIG, **changes), tmp_path / "run", dataset=tiny_data(), network=make, quiet=True)
    again, _ = load_model(tmp_path / "run")
    assert torch.isfinite(torch.cat([p.flatten() for p in again.parameters()])).all()


def test_a_file_does_not_import_the_function_it_names(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, __name__)
    for way in (load_model, ImageGenerator.load, lambda path: ImageGenerator.load(path, 0.1)):
        with pytest.raises(
            ValueError, match=f"^{run}.*: the network was made by the function {NAME}, which .*--network-from"
        ):
            way(run)
    assert __name__ not in sys.modules


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"network_from": ["a"]}, "network_from = a list does not describe a network"),
        (
            {"network_from": "os:system"},
            "was made by the function os:system, which a file cannot make edm2 import",
        ),
        ({"img_resolution": [4]}, "img_resolution = a list does not describe a network"),
        ({"model_channels": 8}, "a network of the user's own has exactly the arguments config, img_channels"),
        ({"config": "Z"}, "config 'Z' is not one of"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    name = register_network(make)
    denoiser = own_network.build_own_denoiser((4, 8), 1, 3, network_from=name)
    assert denoiser.img_shape == (1, 4, 8)
    file = save_model(tmp_path / "good.safetensors", denoiser.options, denoiser.state_dict())
    assert load_model(file)[0].options == denoiser.options
    file = save_model(tmp_path / "m.safetensors", {**denoiser.options, **change}, denoiser.state_dict())
    with pytest.raises(ValueError, match=told):
        load_model(file)


def test_registered_it_is_loaded_reconstructed_and_sampled(run: Path, tmp_path: Path) -> None:
    assert register_network(make) == NAME
    denoiser, info = load_model(run)
    assert denoiser.options["network_from"] == NAME
    assert isinstance(denoiser.network, PlainNet)
    assert f"network     {NAME}" in describe_path(run)
    assert info["sigma_rel"] == 0.1
    images = ImageGenerator.load(run).images([0, 1], num_steps=3)
    assert (images.shape, images.dtype) == ((2, 1, 4, 4), np.uint8)
    ((file, _),) = reconstruct_models(run, [0.07], tmp_path)
    expected = reconstruct(run / "snapshots", 0.07).tensors
    for name, value in load_model(file)[0].state_dict().items():
        assert torch.equal(value, expected[name])
    assert np.array_equal(
        ImageGenerator.load(run, 0.07).images([3], num_steps=3),
        ImageGenerator.load(file).images([3], num_steps=3),
    )


def test_command_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_network.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Conv2d):\n"
        "    def forward(self, x, c_noise, labels=None):\n"
        "        return super().forward(x)\n"
        "def make(img_resolution, img_channels, label_dim):\n"
        "    return Net(img_channels, img_channels, 3, padding=1)\n"
    )
    short = "--images 64 --batch 16 --optimizer.ref-lr 1e-3 --device cpu --threads 1"
    main(f"train --preset digits --out run {short} --network-from my_network:make".split())
    own_network._registered.clear()
    sample = "sample run --seeds 0-1 --num-steps 2 --grid 0 --out"
    with pytest.raises(SystemExit):
        main([*sample.split(), "refused"])
    main([*sample.split(), "made", "--network-from=my_network:make"])
    assert len(list(Path("made").glob("*.png"))) == 2


def test_augment_needs_a_network_that_is_told(tmp_path: Path) -> None:
    config = tiny_config(**CONFIG, dataset=DataConfig(augment=0.2))
    with pytest.raises(
        ValueError, match=r"dataset.augment 0.2 needs a network that takes augmentation .* augment_dim = "
    ):
        Trainer(config, tiny_data(), tmp_path / "run", network=make)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("make", "'make' must be MODULE:FUNCTION, such as my_network:make"),
        ("no_such_module:make", "the function no_such_module:make was not found"),
        ("math:no_such", "the function math:no_such was not found"),
        ("math:pi", "math:pi is a float, not a function"),
    ],
)
def test_names_of_no_function(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_network(name)


def test_a_function_that_makes_no_network() -> None:
    name = register_network(lambda *_: 7)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"returned a int: it must return a torch.nn.Module"):
        own_network.build_own_denoiser(4, 1, 0, network_from=name)


def test_the_function_of_a_script_may_be_imported_by_its_own_name() -> None:
    register_network(make)
    assert own_network.build_own_denoiser(4, 1, 0, network_from="__main__:make").network is not None


def test_a_bare_network_behind_the_preconditioning() -> None:
    torch.manual_seed(0)
    net = PlainNet(1, 3)
    denoiser = Denoiser(net, sigma_data=0.6).eval()
    x, sigma, labels = torch.randn(2, 1, 5, 7), torch.tensor([0.3, 2.0]), torch.eye(3)[:2]
    scale = (sigma**2 + 0.36).sqrt()[:, None, None, None]
    raw = net(x / scale, sigma.log() / 4, labels)
    expected = (0.6 / scale) ** 2 * x + sigma[:, None, None, None] * 0.6 / scale * raw
    assert torch.allclose(denoiser(x, sigma, labels), expected, atol=1e-6)
    assert not denoiser.logvar(sigma).any()
    assert set(denoiser.state_dict()) == {f"unet.{name}" for name in net.state_dict()}
    with pytest.raises(
        ValueError, match="does not know the size of its images: give Denoiser img_resolution"
    ):
        _ = denoiser.img_shape
    sized = Denoiser(net, img_resolution=4, img_channels=1, label_dim=3, uncertainty=LearnedUncertainty())
    assert sized.img_shape == (1, 4, 4)
    assert torch.equal(
        sized(x[:, :, :4, :4], sigma, torch.tensor([0, 1])), sized(x[:, :, :4, :4], sigma, labels)
    )


def test_uncertainty_of_another_kind_and_by_itself() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.tensor(0.3))

        def forward(self, sigma: Tensor) -> Tensor:
            return self.value.expand(sigma.numel(), 1, 1, 1)

    denoiser = Denoiser(PlainNet(1, 0), uncertainty=Constant())
    assert "uncertainty.value" in denoiser.state_dict()
    images, noise = torch.randn(2, 3, 1, 4, 4).unbind()
    edm2_loss(denoiser, images, None, torch.tensor([0.1, 1.0, 3.0]), noise).sum().backward()
    assert denoiser.get_parameter("uncertainty.value").grad is not None
    learned = LearnedUncertainty(16)
    assert learned(torch.tensor([0.1, 2.0])).shape == (2, 1, 1, 1)
    assert isinstance(learned.linear, MPConv)
    inside = Denoiser(PlainNet(1, 0), uncertainty=learned)
    assert {"logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight"} < set(
        inside.state_dict()
    )
    assert torch.equal(inside.logvar(torch.tensor([0.1, 2.0])), learned(torch.tensor([0.1, 2.0])))
