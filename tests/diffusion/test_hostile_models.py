"""Model files and settings that are damaged or hostile: one clear error, whichever way they are opened."""

import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from mutations import mutate_json

from edm2.commands.info import describe_path
from edm2.diffusion import Denoiser, build_denoiser, load_model, save_model
from edm2.generate import ImageGenerator
from edm2.hub import Pretrained, Sampling, open_pretrained, save_pretrained

INFO = {
    "coding": {"kind": "pixels", "num_channels": 1, "mean": [0.1], "std": [0.5], "sigma_data": 0.5},
    "sigma_rel": 0.1, "num_images": 100, "data": "digits", "class_names": ["a", "b", "c"], "run_id": "x",
    "expected_error": 0.01, "license": "apache-2.0", "license_notice": "n", "source": {"file": "a", "sha256": "b"},
}  # fmt: skip
RARE_OPTIONS = [
    ("network", name)
    for name in [
        "cond_channels",
        "augment_dim",
        "dropout",
        "label_kind",
        "channel_mult_noise",
        "clip_act",
        "other",
    ]
]
WAYS: dict[str, Callable[[Path], Any]] = {
    "info": describe_path,
    "load_model": load_model,
    "sample": lambda path: ImageGenerator.load(path).images([0], num_steps=1),
    "from_pretrained": open_pretrained,
}

COUNT = {"info": 80, "load_model": 300, "sample": 250, "from_pretrained": 250}


def tiny() -> Denoiser:
    torch.manual_seed(0)
    return build_denoiser(
        8,
        1,
        3,
        model_channels=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
        channels_per_head=8,
    )


def write_model(path: Path, description: str) -> Path:
    path.write_bytes(safetensors.torch.save(tiny().state_dict(), metadata={"edm2": description}))
    return path


def outcome(way: str, path: Path) -> str | None:
    """What is said of a file; None where it is good. Any other error than ValueError fails the test."""
    try:
        WAYS[way](path)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_mutated_descriptions_give_one_clear_error(tmp_path: Path, way: str) -> None:
    rng = random.Random(f"{way}")
    description = {"format": "edm2.model/1", "network": tiny().options, "info": INFO}
    told = []
    for _ in range(COUNT[way]):
        changed = description
        for _ in range(rng.choice((1, 1, 2, 3))):
            changed = mutate_json(changed, rng, more=RARE_OPTIONS)
            if not isinstance(changed.get("network"), dict) or not isinstance(changed.get("info"), dict):
                break
        text = json.dumps(changed)
        if rng.random() < 0.05:
            text = text[: rng.randrange(len(text))]
        path = write_model(tmp_path / "m.safetensors", text)
        told.append(outcome(way, path))
    errors = [text for text in told if text is not None]
    assert len(errors) > COUNT[way] // 2
    assert len(told) > len(errors)  # some changes do no harm
    assert [e for e in errors if str(tmp_path) not in e or len(e) > 1000 or not e.isprintable()] == []


@pytest.mark.parametrize("way", WAYS)
def test_mutated_bytes_give_one_clear_error(tmp_path: Path, way: str) -> None:
    rng = random.Random(way)
    good = save_model(tmp_path / "good.safetensors", tiny().options, tiny().state_dict(), INFO).read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0]
    errors = 0
    for _ in range(COUNT[way]):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 3, 30))):
            data[rng.randrange(header if rng.random() < 0.8 else len(data))] = rng.randrange(256)
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        path = tmp_path / "m.safetensors"
        path.write_bytes(data)
        errors += outcome(way, path) is not None
    assert errors > COUNT[way] // 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"network": {"num_blocks": 10**9}}, "num_blocks = 1000000000 does not describe a network"),
        ({"network": {"num_blocks": 64}}, "fewer tensors than its network has blocks"),
        ({"network": {"model_channels": "8"}}, "model_channels = '8' does not describe a network"),
        ({"network": {"img_resolution": 2**40}}, "img_resolution = 1099511627776 does not"),
        ({"network": {"config": "Z"}}, "config 'Z' is not one of A, B, C, D, E, F, G"),
        ({"network": {"channel_mult": [1, 2] * 500}}, "channel_mult = a list does not describe"),
        ({"network": {"sigma_data": float("nan")}}, "sigma_data = nan does not"),
        ({"info": {"num_images": "many"}}, "num_images = 'many' is not a value that edm2 writes"),
        ({"info": {"class_names": "ab"}}, "class_names = 'ab' is not a value that edm2 writes"),
        ({"info": {"data": "\x1b[31m"}, "network": {"config": "\x1b[31m"}}, r"'\\x1b\[31m' is not one of"),
    ],
)
def test_the_error_says_what_is_wrong(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    network, info = tiny().options | change.get("network", {}), INFO | change.get("info", {})
    path = save_model(tmp_path / "m.safetensors", network, tiny().state_dict(), info)
    for way in WAYS:
        with pytest.raises(ValueError, match=f"m.safetensors: the tensors do not fit .*{told}"):
            WAYS[way](path)


def test_a_missing_argument_and_deep_nesting(tmp_path: Path) -> None:
    network = {key: value for key, value in tiny().options.items() if key != "img_channels"}
    path = save_model(tmp_path / "m.safetensors", network, tiny().state_dict(), INFO)
    with pytest.raises(ValueError, match="missing 1 required positional argument: 'img_channels'"):
        describe_path(path)
    deep = write_model(tmp_path / "deep.safetensors", "[" * 100_000)
    with pytest.raises(ValueError, match=r"deep.safetensors holds tensors but no description"):
        load_model(deep)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    state = tiny().state_dict()
    state["unet.out_gain"] = torch.tensor(value)
    path = save_model(tmp_path / "m.safetensors", tiny().options, state, INFO)
    with pytest.raises(
        ValueError, match=r"unet.out_gain has values that are not finite: the training diverged"
    ):
        load_model(path)


@pytest.mark.parametrize(
    "coding", [{"kind": "x"}, {"mean": 7}, {"std": ["a"]}, {"sigma_data": None}, {"num_channels": 0}]
)
def test_a_coding_that_is_none(tmp_path: Path, coding: dict[str, Any]) -> None:
    info = {**INFO, "coding": {**INFO["coding"], **coding}}  # type: ignore[dict-item]
    path = save_model(tmp_path / "m.safetensors", tiny().options, tiny().state_dict(), info)
    with pytest.raises(ValueError, match=r"m.safetensors describes a coding of images that edm2 does not"):
        ImageGenerator.load(path)


def test_integers_where_weights_are_floats(tmp_path: Path) -> None:
    state = {name: x.to(torch.int8) for name, x in tiny().state_dict().items()}
    path = save_model(tmp_path / "m.safetensors", tiny().options, state, INFO)
    with pytest.raises(ValueError, match="of type I8, but weights must be floats"):
        load_model(path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `save_pretrained` with a guide."""
    folder = tmp_path_factory.mktemp("shared")
    model = save_model(folder / "m.safetensors", tiny().options, tiny().state_dict(), INFO)
    generator = ImageGenerator.load(model)
    sampling = Sampling(guidance=1.5, interval=(0.1, 5.0))
    return save_pretrained(Pretrained(generator, guide=generator, sampling=sampling), folder / "out")


def test_mutated_settings_of_a_shared_model(shared: Path) -> None:
    rng = random.Random(0)
    file = shared / "config.json"
    good = json.loads(file.read_text())
    errors = []
    try:
        for _ in range(150):
            text = json.dumps(mutate_json(good, rng))
            file.write_text(text[: rng.randrange(len(text))] if rng.random() < 0.1 else text)
            error = outcome("from_pretrained", shared)
            errors += [error] if error is not None else []
    finally:
        file.write_text(json.dumps(good))
    assert len(errors) > 50
    whole = (
        "with a guide: a guide goes",
        "without a guide: a guide goes",
        "the weights are under apache-2.0",
    )
    assert [e for e in errors if str(shared) not in e and not any(text in e for text in whole)] == []


@pytest.mark.parametrize("name", ["../m.safetensors", "/m.safetensors", 7, "notes.txt"])
def test_settings_name_files_beside_them_only(shared: Path, name: object) -> None:
    settings = shared / "edm2-img64-s-fid.json"
    settings.write_text(json.dumps({"format": "edm2.sampling/1", "guide": None, "model": name}))
    with pytest.raises(
        ValueError, match=r"is damaged \(.* is not the name of a \.safetensors file in the same folder\)"
    ):
        open_pretrained(settings)
    settings.unlink()


GIANTS = [
    {"model_channels": 8192, "channel_mult": [64] * 4, "num_blocks": 2},
    {"img_resolution": [8192, 8192], "cond_channels": 1024},
    {"label_dim": 1 << 20, "logvar_channels": 1 << 16},
]


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """Networks that would take terabytes are refused by a process that may take 400 MB more than it has."""
    for i, change in enumerate(GIANTS):
        save_model(tmp_path / f"{i}.safetensors", {**tiny().options, **change}, tiny().state_dict(), INFO)
    code = f"""
import re, resource, sys
import edm2.diffusion, edm2.generate, edm2.commands.info, torch, safetensors.torch
torch.set_num_threads(1)
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
for i in range({len(GIANTS)}):
    for way in (edm2.commands.info.describe_path, edm2.diffusion.load_model):
        try:
            way(edm2.commands.info.Path(sys.argv[1]) / f"{{i}}.safetensors")
        except ValueError as error:
            print(str(error)[-40:])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("restore it from a copy") == 2 * len(GIANTS)
