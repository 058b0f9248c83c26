"""What an installed edm2 must do, run by the Python that it was installed into, outside the source tree.

    python tests/installed/smoke.py

Needs no test library. With the extra `cli` it also trains, samples and reports through the `edm2` command; without
it the command must say in one line what to install.
"""

import importlib.util
import platform
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata, resources
from pathlib import Path

import torch

import edm2
from edm2.diffusion import sample_heun, time_steps
from edm2.ema import PowerEMA, reconstruct
from edm2.nn import UNet

COMMAND = Path(sysconfig.get_path("scripts")) / "edm2"
TINY = ["--network.model-channels", "8", "--network.num-blocks", "1", "--network.channels-per-head", "8"]
SHORT = ["--images", "64", "--batch", "8", "--snapshot-images", "16", "--log-images", "16"]


def check_package() -> None:
    """The files lie where pip put them, and those that are not code came along."""
    assert Path(edm2.__file__).is_relative_to(sysconfig.get_path("purelib")), edm2.__file__
    assert metadata.version("edm2") == edm2.__version__
    for name in ("py.typed", "report/page.css", "report/page.html"):
        assert resources.files("edm2").joinpath(name).is_file(), name


def check_core(folder: Path) -> None:
    """Networks, averages and samplers, with nothing but the base install."""
    torch.manual_seed(0)
    net = UNet(8, 1, 0, model_channels=8, channel_mult=(1,), num_blocks=1, channels_per_head=8)
    ema = PowerEMA(net, sigma_rels=(0.05, 0.10))
    for step in range(1, 9):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        ema.update(step)
        if step % 2 == 0:
            ema.snapshot(folder)
    net.load_state_dict(reconstruct(folder, 0.07, warn_above=1.0).tensors)
    # The best denoiser of a normal distribution of deviation 0.5 is known.
    noise = torch.randn(4, 1, 8, 8)
    x = sample_heun(lambda x, sigma, labels: x * 0.25 / (0.25 + sigma**2), noise, time_steps(num_steps=32))
    assert 0.3 < float(x.std()) < 0.7


def check_command(folder: Path) -> None:
    """The `edm2` command does its work, or names the extra that it needs."""
    assert run("--version") == (0, edm2.__version__ + "\n", "")
    train = ["train", "--preset", "digits", *TINY, *SHORT, "--out", str(folder / "run"), "--device", "cpu"]
    if importlib.util.find_spec("tyro") is None:
        code, _, told = run(*train)
        assert code == 2
        assert "the extra 'cli' installs: run `pip install -e '.[cli]'`" in told, told
        return
    sample = ["sample", str(folder / "run"), "--ema", "0.1", "--seeds", "0-3", "--num-steps", "2"]
    for words in (train, [*sample, "--out", str(folder / "samples")], ["report", str(folder / "run")]):
        code, _, told = run(*words)
        assert code == 0, told


def run(*words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the `edm2` command."""
    done = subprocess.run([COMMAND, *words], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        check_package()
        check_core(Path(temporary) / "snapshots")
        check_command(Path(temporary))
    kind = "base" if importlib.util.find_spec("tyro") is None else "with the extra cli"
    print(
        f"edm2 {edm2.__version__} {kind}: Python {platform.python_version()}, torch {torch.__version__}: ok"
    )
    sys.exit(0)
