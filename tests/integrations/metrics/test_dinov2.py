import hashlib

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

from edm2.extras import MissingExtra  # noqa: E402 - needs transformers
from edm2.metrics import DinoV2Features, describe_extractor  # noqa: E402 - needs transformers

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3, 40, 30), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dino")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56
    )
    transformers.Dinov2Model(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def extractor(folder):
    return DinoV2Features(folder)


def test_features_are_the_class_token_of_prepared_images(folder, extractor):
    large = np.random.default_rng(1).integers(0, 256, (2, 3, 224, 224), dtype=np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    prepared = (large / 255 - mean[:, None, None]) / std[:, None, None]
    network = transformers.Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = network(torch.from_numpy(prepared).float()).pooler_output
    assert torch.allclose(extractor.features(large), expected, atol=1e-4)


def test_resizing_is_bicubic_with_antialiasing(extractor, monkeypatch):
    seen = []
    network = extractor._network

    def watch(pixel_values):
        seen.append(pixel_values)
        return network(pixel_values=pixel_values)

    monkeypatch.setattr(extractor, "_network", watch)
    # Large waves, so that neither clamping nor rounding, which Pillow does, matters much.
    x = np.linspace(0, 40, 900)
    wave = np.rint(127.5 + 60 * np.sin(x)[:, None] * np.cos(x / 2)).astype(np.uint8)
    extractor.features(wave[None, None])
    pillow = np.asarray(Image.fromarray(wave).resize((224, 224), Image.Resampling.BICUBIC))
    assert seen[0].shape == (1, 3, 224, 224)
    assert np.abs(seen[0][0, 0].numpy() * 0.229 + 0.485 - pillow / 255).max() < 1.5 / 255


def test_gray_empty_and_provenance(folder, extractor):
    gray = extractor.features(IMAGES[:, :1])
    assert torch.allclose(gray, extractor.features(IMAGES[:, :1].repeat(3, axis=1)), atol=1e-5)
    assert extractor.features(IMAGES[:0]).shape == (0, 16)
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert DinoV2Features(folder, sha256=sha256).num_features == 16
    described = describe_extractor(extractor)
    assert described["name"] == "dinov2"
    assert described["sha256"] == sha256


def test_errors(tmp_path, folder, monkeypatch):
    with pytest.raises(ValueError, match=r"has the sha256 .*, not 00: it is damaged or another file"):
        DinoV2Features(folder, sha256="00")
    with pytest.raises(ValueError, match=r"lacks config\.json and model\.safetensors: download"):
        DinoV2Features(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"text")
    with pytest.raises(
        ValueError, match=r"does not hold a DINOv2 network .*facebook/dinov2-large.*its sha256"
    ):
        DinoV2Features(tmp_path)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=56
    )
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(
        ValueError, match=r"does not hold a DINOv2 network \(\d+ weights are missing, such as .*layer\.1"
    ):
        DinoV2Features(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match=r"nobody/nothing is not a folder here, and the Hugging Face hub did not provide it .*download",
    ):
        DinoV2Features("nobody/nothing")
    with pytest.raises(ValueError, match="did not provide it"):
        DinoV2Features("a/b/c")
    with pytest.raises(ValueError, match="dinov2 sees RGB or gray images, and these have 2 channels"):
        DinoV2Features(folder).features(IMAGES[:, :2])


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"DINOv2 needs the package 'transformers', .*\.\[metrics\]"):
        DinoV2Features()
