import hashlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from edm2.metrics import (
    CallableFeatures,
    ClassifierFeatures,
    InceptionFeatures,
    describe_extractor,
    fit_classifier,
)

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 3, 6, 7), dtype=np.uint8)


class Flagged(nn.Module):
    """Gives features only where asked, as the file of the field does."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = img.to(torch.float32).mean(dim=(2, 3))
        return x if return_features else x.sum(dim=1, keepdim=True)


class Plain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float32).amax(dim=(2, 3))


class Flat(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float32)


class Latent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x.to(torch.float32), torch.zeros(5, 2))


def scripted(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        torch.jit.save(torch.jit.script(module), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_torchscript_with_its_hash(tmp_path):
    path, sha256 = scripted(Flagged(), tmp_path / "inception.pt")
    extractor = InceptionFeatures(path, sha256=sha256.upper())
    assert torch.allclose(extractor.features(RGB), torch.from_numpy(RGB).float().mean((2, 3)))
    assert extractor.features(RGB[:0]).shape == (0, 3)
    gray = extractor.features(RGB[:, :1])
    assert torch.equal(gray, extractor.features(RGB[:, :1].repeat(3, axis=1)))
    assert describe_extractor(extractor) == {
        "name": "inception",
        "sha256": sha256,
        "num_features": 3,
        "resize": "by the TorchScript file itself, from uint8 RGB",
    }


def test_torchscript_trusted_explicitly(tmp_path):
    path, sha256 = scripted(Plain(), tmp_path / "mine.pt")
    extractor = InceptionFeatures(path, trust_code=True)
    assert extractor.sha256 == sha256
    assert torch.equal(extractor.features(RGB), torch.from_numpy(RGB).float().amax((2, 3)))


def test_torchscript_is_not_opened_without_hash_or_trust(tmp_path, monkeypatch):
    path, sha256 = scripted(Plain(), tmp_path / "mine.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("was opened"))
    with pytest.raises(
        ValueError, match=f"contains code that runs: give the sha256 .*or trust it .*{sha256}"
    ):
        InceptionFeatures(path)
    with pytest.raises(ValueError, match=f"has the sha256 {sha256}, not {'0' * 64}.* is not used"):
        InceptionFeatures(path, sha256="0" * 64, trust_code=True)


def test_torchscript_errors(tmp_path):
    with pytest.raises(
        ValueError, match=r"no Inception weights at .*none\.pt: get the TorchScript file .*sha256"
    ):
        InceptionFeatures(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(ValueError, match="is not a TorchScript file"):
        InceptionFeatures(tmp_path / "text.pt", trust_code=True)
    with pytest.raises(ValueError, match=r"does not give features \[N, D\]"):
        InceptionFeatures(scripted(Flat(), tmp_path / "flat.pt")[0], trust_code=True)
    with pytest.raises(ValueError, match="does not take uint8 RGB images"):
        InceptionFeatures(scripted(Latent(), tmp_path / "latent.pt")[0], trust_code=True)
    extractor = InceptionFeatures(scripted(Plain(), tmp_path / "a.pt")[0], trust_code=True)
    with pytest.raises(ValueError, match="inception sees RGB or gray images, and these have 2 channels"):
        extractor.features(RGB[:, :2])
    with pytest.raises(ValueError, match=r"images must be \[N, C, H, W\] uint8"):
        extractor.features(RGB / 255)


def test_any_function():
    extractor = CallableFeatures(lambda x: x.double().mean((2, 3)), name="mean", num_features=3)
    assert torch.equal(extractor.features(RGB), torch.from_numpy(RGB).double().mean((2, 3)))
    assert describe_extractor(extractor)["name"] == "mean"
    wrong = CallableFeatures(lambda x: x.float(), name="wrong", num_features=3)
    with pytest.raises(
        ValueError, match=r"'wrong' gave \[5, 3, 6, 7\] torch.float32 for 5 images: it must give \[5, 3\]"
    ):
        wrong.features(RGB)
    with pytest.raises(ValueError, match=r"images must be \[N, C, H, W\] uint8"):
        extractor.features(RGB[0])


def classifier(seed=0):
    return fit_classifier(RGB, np.arange(5) % 2, num_classes=2, num_steps=2, seed=seed)


def test_a_saved_classifier_is_the_same(tmp_path):
    made = classifier()
    made.save(tmp_path / "c.safetensors")
    read = ClassifierFeatures.load(tmp_path / "c.safetensors")
    assert torch.equal(read.features(RGB), made.features(RGB))
    assert torch.equal(read.predict(RGB), made.predict(RGB))
    assert describe_extractor(read) == describe_extractor(made)
    assert read.num_features == 64
    assert classifier(seed=1).sha256 != made.sha256 == classifier().sha256


def test_classifier_errors(tmp_path):
    with pytest.raises(ValueError, match=r"there is no classifier at .*: `edm2 metrics ref DATA --out FILE`"):
        ClassifierFeatures.load(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(
        ValueError, match=r"is not a classifier that .*its format is None, not 'edm2 feature class"
    ):
        ClassifierFeatures.load(tmp_path / "bad")
    (tmp_path / "worse").write_bytes(b"text")
    with pytest.raises(ValueError, match="is not a classifier"):
        ClassifierFeatures.load(tmp_path / "worse")


def test_importing_metrics_loads_nothing_heavy_nor_above_it():
    code = (
        "import sys, edm2.metrics; "
        "print(*(m for m in sys.modules if m.startswith(('edm2.', 'transformers', 'sklearn', 'scipy'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    same_floor = ("edm2.metrics", "edm2.ema", "edm2.files", "edm2.extras", "edm2.progress")
    assert [name for name in loaded if not name.startswith(same_floor)] == []
