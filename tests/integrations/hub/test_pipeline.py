"""The pipeline with the real huggingface_hub, whose calls to the network are replaced by a folder."""

import fnmatch
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import INFO, latent_coding, small_denoiser, small_generator, small_model

huggingface_hub = pytest.importorskip("huggingface_hub")

from edm2.data import ArrayDataset, FloatCoding, PairedDataset  # noqa: E402
from edm2.data.autoencoder import RELEASED_AUTOENCODER  # noqa: E402
from edm2.diffusion import save_model  # noqa: E402
from edm2.generate import ImageGenerator  # noqa: E402
from edm2.hub import EDM2Pipeline, Pretrained, Sampling, open_pretrained, save_pretrained  # noqa: E402
from edm2.hub import pipeline as module  # noqa: E402
from edm2.train import DataConfig, NetworkConfig, TrainConfig, train  # noqa: E402
from edm2.train.coding import Coding  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries
QUICK: dict[str, Any] = {"num_inference_steps": 2}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_model(tmp_path / "m.safetensors")


@pytest.fixture
def pipe() -> EDM2Pipeline:
    return EDM2Pipeline(Pretrained(small_generator()))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Repositories as folders; the client's calls to the network are replaced, nothing else of it."""
    root = tmp_path / "hub"

    class Made:
        def __init__(self, repo_id: str) -> None:
            self.repo_id = repo_id

    def create_repo(self: Any, repo_id: str, **_: Any) -> Made:
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        (root / repo_id).mkdir(parents=True, exist_ok=True)
        return Made(repo_id)

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}"

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        assert options["revision"] == "v1"
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        for file in (root / repo_id).iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(module, "snapshot_download", snapshot_download)
    return root


def test_through_the_hub(model: Path, hub: Path, tmp_path: Path) -> None:
    pushed = EDM2Pipeline(open_pretrained(model, license="mit"))
    assert pushed.push_to_hub("digits") == "https://hub/me/digits"
    repository = hub / "me" / "digits"
    assert sorted(p.name for p in repository.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = huggingface_hub.ModelCard.load(repository / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "edm2")
    assert 'from_pretrained("me/digits")' in card.text
    pushed.save_pretrained(tmp_path / "again", push_to_hub=True)
    assert 'from_pretrained("me/again")' in (hub / "me" / "again" / "README.md").read_text()
    (repository / "pytorch_model.bin").write_bytes(b"a pickle")
    (repository / "modeling.py").write_text("raise SystemExit")
    pulled = EDM2Pipeline.from_pretrained("me/digits", revision="v1")
    assert not {"pytorch_model.bin", "modeling.py"} & {p.name for p in (tmp_path / "snapshot").iterdir()}
    a, b = (p(seeds=[5], **QUICK).images[0] for p in (pushed, pulled))
    assert np.array_equal(np.asarray(a), np.asarray(b))


def test_from_the_client_s_own_cache(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "models--me--digits"
    commit = "0" * 40
    save_pretrained(model, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    offline: dict[str, Any] = dict(cache_dir=tmp_path / "cache", local_files_only=True)
    pipe = EDM2Pipeline.from_pretrained("me/digits", **offline)
    assert pipe.model.generator.identity() == ImageGenerator.load(model).identity()
    with pytest.raises(
        ValueError, match=r"me/other is not a folder here, and the hub did not provide it .*: check"
    ):
        EDM2Pipeline.from_pretrained("me/other", **offline)


def test_through_a_folder(model: Path, tmp_path: Path) -> None:
    saved = EDM2Pipeline(open_pretrained(model))
    saved.save_pretrained(tmp_path / "shared")
    with pytest.raises(FileExistsError, match=r"shared already holds model\.safetensors"):
        saved.save_pretrained(tmp_path / "shared")
    # The same files as those written without huggingface_hub.
    save_pretrained(model, tmp_path / "other")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    one, two = (huggingface_hub.ModelCard.load(tmp_path / n / "README.md") for n in ("shared", "other"))
    assert one.text.strip().replace("shared", "other") == two.text.strip()
    assert one.data.to_dict() == two.data.to_dict()
    loaded = EDM2Pipeline.from_pretrained(tmp_path / "shared", dtype=torch.bfloat16)
    assert loaded.model.generator.denoiser.dtype == torch.bfloat16
    made = EDM2Pipeline.from_pretrained(tmp_path / "shared")(seeds=[3], output_type="pt", **QUICK).images
    assert np.array_equal((made * 255).round().byte(), ImageGenerator.load(model).images([3], num_steps=2))


@pytest.mark.parametrize("options", [{}, {"label_dim": 0}, {"label_kind": "vector", "cond_channels": 2}])
def test_the_card_s_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    folder = save_pretrained(small_model(tmp_path / "m.safetensors", **options), tmp_path / "shared")
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "sample.png").exists()


def test_the_card_of_a_model_of_pairs_names_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    given = {"conditions": rng.normal(3, 1, (16, 2, 4, 4)), "vectors": rng.normal(9, 1, (16, 2))}
    labels = np.arange(16) % 3
    data = PairedDataset(
        ArrayDataset(rng.normal(0, 1, (16, 1, 8, 8)), labels),
        ArrayDataset(given["conditions"]),
        given["vectors"],
    )
    network = NetworkConfig(model_channels=8, channel_mult=(1,), num_blocks=1, channels_per_head=8)
    config = TrainConfig(
        num_images=8, batch_size=8, network=network, device="cpu", dataset=DataConfig(resample="bilinear")
    )
    train(config, tmp_path / "run", dataset=data, quiet=True)
    folder = save_pretrained(tmp_path / "run", tmp_path / "shared")
    text = (folder / "README.md").read_text()
    assert "| Conditioned on | images, 4 x 4 x 2; vectors of length 2; 3 classes |" in text
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    np.savez("inputs.npz", **{name: values[:4] for name, values in given.items()}, labels=labels[:4])
    exec(code, {})
    assert "(4, 8, 8, 1)" in capsys.readouterr().out


def test_output_types(pipe: EDM2Pipeline) -> None:
    made = small_generator().images([4, 5], [1, 2], num_steps=2)
    options: dict[str, Any] = dict(seeds=[4, 5], class_labels=[1, 2], **QUICK)
    out = pipe(**options)
    assert out.seeds == [4, 5]
    assert np.array_equal(np.stack([np.asarray(image) for image in out.images]), made[:, 0])
    array = pipe(**options, output_type="np").images
    assert (array.shape, array.dtype) == ((2, 8, 8, 1), np.float32)
    assert np.array_equal(array[..., 0], np.float32(made[:, 0]) / np.float32(255))
    tensor = pipe(**options, output_type="pt", return_dict=False)[0]
    assert torch.equal(tensor, torch.from_numpy(made) / 255)


def test_generators_give_the_seeds(pipe: EDM2Pipeline) -> None:
    def make(**options: Any) -> list[int]:
        return pipe(**options, **QUICK).seeds

    seeded = [torch.Generator().manual_seed(n) for n in (0, 1)]
    together = make(num_images=2, generator=torch.Generator().manual_seed(0))
    assert make(generator=[torch.Generator().manual_seed(0)]) == together[:1]
    assert len(set(together)) == 2
    each = make(generator=seeded)
    assert each[0] == together[0]
    assert make(generator=seeded) != each  # they have moved on
    before = torch.random.get_rng_state()
    assert make() != make()
    assert torch.equal(torch.random.get_rng_state(), before)
    again = pipe(seeds=together, output_type="pt", **QUICK).images
    same = pipe(2, generator=torch.Generator().manual_seed(0), output_type="pt", **QUICK).images
    assert torch.equal(again, same)


def test_labels_and_numbers(pipe: EDM2Pipeline) -> None:
    one = pipe(3, class_labels=2, seeds=[0, 1, 2], output_type="pt", **QUICK).images
    assert len(pipe(class_labels=np.array(2), **QUICK).images) == 1
    many = pipe(class_labels=[2, 2, 2], seeds=[0, 1, 2], output_type="pt", images_at_once=2, **QUICK).images
    assert one.shape == (3, 1, 8, 8)
    assert (one - many).abs().max() <= 1.01 / 255
    assert len(pipe(seeds=7, **QUICK).images) == 1


def test_guidance_is_the_saved_one_unless_given() -> None:
    generator, guide = small_generator(), small_generator(1, label_dim=0)
    saved = EDM2Pipeline(
        Pretrained(generator, guide=guide, sampling=Sampling(guidance=3.0, interval=(0.5, 20.0), num_steps=4))
    )

    def make(**options: Any) -> np.ndarray:
        return (saved(seeds=[0], output_type="pt", **options).images * 255).round().byte().numpy()

    expected = generator.images(
        [0], sampler="heun", num_steps=4, guide=guide, guidance=3.0, interval=(0.5, 20.0)
    )
    assert np.array_equal(make(), expected)
    assert np.array_equal(make(guidance_scale=1.0), generator.images([0], sampler="heun", num_steps=4))
    other = generator.images(
        [0], sampler="heun", num_steps=3, guide=guide, guidance=2.0, interval=(1.0, 90.0)
    )
    assert np.array_equal(make(guidance_scale=2.0, num_inference_steps=3, interval=(1.0, 90.0)), other)


class Doubling(torch.nn.Module):
    """A stand-in for diffusers' AutoencoderKL."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"out_channels": 3, "latent_channels": 2})
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def decode(self, x: torch.Tensor) -> Any:
        sample = x[:, :1].repeat(1, 3, 2, 2) / 10
        return type("Decoded", (), {"sample": sample})


def test_latents_are_decoded(tmp_path: Path) -> None:
    denoiser = small_denoiser(channels=2)
    info = {**INFO, "coding": latent_coding().to_json()}
    path = save_model(tmp_path / "m.safetensors", denoiser.options, denoiser.state_dict(), info)
    pipe = EDM2Pipeline(open_pretrained(path), vae=Doubling())
    latents = pipe(seeds=[0, 1], output_type="latent", **QUICK).images
    assert torch.equal(latents, torch.from_numpy(ImageGenerator.load(path).images([0, 1], num_steps=2)))
    images = pipe(seeds=[0, 1], **QUICK).images
    expected = ((latents[:, 0].repeat(1, 2, 2) / 10).clamp(0, 1) * 255).byte()
    assert images[0].size == (16, 16)
    assert np.array_equal(np.stack([np.asarray(image)[..., 0] for image in images]), expected)
    with pytest.raises(ValueError, match=r"latents need the package 'diffusers'|could not be loaded"):
        EDM2Pipeline(open_pretrained(path), vae=str(tmp_path / "none"))(seeds=[0])


def test_floats_are_arrays() -> None:
    coding = Coding(kind="floats", values=FloatCoding(), num_channels=1)
    pipe = EDM2Pipeline(Pretrained(small_generator(coding=coding)))
    made = pipe(seeds=[0], output_type="np", **QUICK).images
    assert np.array_equal(made[..., 0], pipe.model.generator.images([0], num_steps=2)[:, 0])
    with pytest.raises(
        ValueError, match="floats of 1 channels are not pictures: give output_type='np' or 'pt'"
    ):
        pipe(seeds=[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_images": 3, "seeds": [1, 2]}, "how many images. num_images 3, seeds 2: they must agree"),
        ({"num_images": 0}, "0 images: give at least 1"),
        ({"seeds": [1], "generator": torch.Generator()}, "generator and seeds exclude each other"),
        ({"output_type": "jpeg"}, "output_type 'jpeg': there are pil, np, pt, latent"),
        ({"output_type": "latent"}, "'latent' is for latent models, and this one makes pixels"),
        ({"class_labels": [0, 1, 9], "images_at_once": 1}, r"class 9 is outside 0\.\.2"),
        ({"class_labels": 0.5}, "must be class indices"),
        ({"guidance_scale": 2.0}, "guidance 2.0 needs a guide"),
        ({"num_inference_steps": 0}, "num_steps 0 must be at least 1"),
        ({"sampler": "ddim"}, "unknown sampler 'ddim'"),
    ],
)
def test_bad_input(pipe: EDM2Pipeline, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        pipe(**options)


def test_moving_keeps_the_images(pipe: EDM2Pipeline) -> None:
    before = pipe(seeds=[0], output_type="pt", **QUICK).images
    assert pipe.to("cpu") is pipe
    assert pipe.device == torch.device("cpu")
    assert torch.equal(pipe(seeds=[0], output_type="pt", **QUICK).images, before)


def test_bad_construction(model: Path, tmp_path: Path) -> None:
    folder = save_pretrained(model, tmp_path / "shared")
    with pytest.raises(TypeError, match="unexpected keyword argument 'variant'"):
        EDM2Pipeline.from_pretrained(folder, variant="fp16")
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"edm2":', '"vae": "evil/vae", "model": 1, "edm2":'))
    assert EDM2Pipeline.from_pretrained(folder)._vae == RELEASED_AUTOENCODER
    latent = small_generator(channels=2, coding=latent_coding())
    latent.decoder = object()  # type: ignore[assignment]
    with pytest.raises(
        ValueError, match="the generator has a decoder of its own: give the pipeline vae instead"
    ):
        EDM2Pipeline(Pretrained(latent))
