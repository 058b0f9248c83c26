"""Model files: what goes in comes out, and what is no model is told apart."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from edm2.diffusion import Denoiser, build_denoiser, load_model, read_model_header, save_model


def make_denoiser(**options: Any) -> Denoiser:
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8
    )
    denoiser = build_denoiser(8, 1, 3, **{**settings, **options})
    with torch.no_grad():
        for parameter in denoiser.parameters():  # gains start at 0, which would hide most of the network
            if parameter.ndim == 0:
                parameter.fill_(0.7)
    return denoiser.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    denoiser = make_denoiser()
    return save_model(tmp_path / "m.safetensors", denoiser.options, denoiser.state_dict(), {"data": "test"})


def write_raw(path: Path, header: str | None) -> Path:
    tensors = make_denoiser().state_dict()
    path.write_bytes(safetensors.torch.save(tensors, metadata=None if header is None else {"edm2": header}))
    return path


@pytest.mark.parametrize(
    "options", [{}, {"config": "C"}, {"clip_act": math.inf}, {"cond_channels": 2}, {"label_kind": "vector"}]
)
def test_round_trip_gives_the_same_network(tmp_path: Path, options: dict[str, Any]) -> None:
    denoiser = make_denoiser(**options)
    file = save_model(tmp_path / "folder", denoiser.options, denoiser.state_dict(), {"sigma_rel": 0.1})
    loaded, info = load_model(file)
    assert file == tmp_path / "folder" / "model.safetensors"
    assert info == {"sigma_rel": 0.1}
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.options == denoiser.options
    x, labels = torch.randn(3, 1, 8, 8), torch.eye(3)
    extra = {"condition": torch.randn(3, 2, 8, 8)} if "cond_channels" in options else {}
    assert torch.equal(loaded(x, torch.ones(3), labels, **extra), denoiser(x, torch.ones(3), labels, **extra))


def test_images_that_are_not_square(tmp_path: Path) -> None:
    denoiser = build_denoiser(
        (4, 8), 1, model_channels=8, channel_mult=(1,), num_blocks=1, channels_per_head=8
    )
    loaded, _ = load_model(save_model(tmp_path, denoiser.options, denoiser.state_dict()))
    assert loaded.img_resolution == (4, 8)


def test_half_precision_is_loaded_as_float32(tmp_path: Path) -> None:
    denoiser = make_denoiser().half()
    loaded, _ = load_model(save_model(tmp_path, denoiser.options, denoiser.state_dict()))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_equal_models_are_equal_bytes(tmp_path: Path, saved: Path) -> None:
    denoiser = make_denoiser()
    again = save_model(
        tmp_path / "again.safetensors", denoiser.options, denoiser.state_dict(), {"data": "test"}
    )
    assert again.read_bytes() == saved.read_bytes()
    with safetensors.safe_open(saved, "pt") as file:
        metadata = file.metadata()
    assert safetensors.torch.save(denoiser.state_dict(), metadata) == saved.read_bytes()


def test_nothing_is_overwritten_unasked(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(FileExistsError, match=r"m\.safetensors exists already: choose another name or move"):
        save_model(saved, {}, {})
    assert saved.read_bytes() == before
    save_model(saved, {"other": 1}, {}, overwrite=True)
    assert saved.read_bytes() != before


def test_a_folder_with_one_model_stands_for_it(saved: Path) -> None:
    assert read_model_header(saved.parent)[0] == saved


def test_paths_without_a_model(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist: give a model file, or a folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no model\.safetensors: give a model file or the folder"):
        load_model(tmp_path / "empty")
    (tmp_path / "other.safetensors").write_bytes(saved.read_bytes())
    with pytest.raises(
        ValueError, match=r"holds 2 models \(m\.safetensors, other\.safetensors\): give the one"
    ):
        load_model(tmp_path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "network.pkl").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match=r"network.pkl is a pickle, which is not opened here: convert it to"):
        load_model(tmp_path / "network.pkl")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_file_that_was_cut_short(saved: Path, size: int) -> None:
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"is damaged or not a safetensors file .*: restore it from a copy"):
        load_model(saved)


@pytest.mark.parametrize(
    "header",
    [None, "{", "[]", "7", "{}", '{"format": 7}', '{"format": "edm2.model/1"}',
     '{"format": "other/1", "network": {}, "info": {}}',
     '{"format": "edm2.model/1", "network": [], "info": {}}'],
)  # fmt: skip
def test_tensors_of_something_else(tmp_path: Path, header: str | None) -> None:
    path = write_raw(tmp_path / "foreign.safetensors", header)
    with pytest.raises(
        ValueError, match=r"foreign\.safetensors holds tensors but no description of an edm2 mod"
    ):
        load_model(path)


def test_format_of_another_version(tmp_path: Path) -> None:
    header = json.dumps({"format": "edm2.model/2", "network": {}, "info": {}})
    path = write_raw(tmp_path / "new.safetensors", header)
    with pytest.raises(
        ValueError, match=r"has format version 2, and this edm2 reads version 1: use the edm2"
    ):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_channels": 16}, "size mismatch"),
        ({"num_blocks": 2}, "Missing key"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"img_resolution": 7}, "img_resolution 7 with 2 levels"),
        ({"config": "C"}, "is of config G"),
    ],
)
def test_description_that_does_not_fit_the_tensors(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    denoiser = make_denoiser()
    path = save_model(tmp_path, {**denoiser.options, **change}, denoiser.state_dict())
    with pytest.raises(ValueError, match=r"the tensors do not fit the network .*: restore it") as caught:
        load_model(path)
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["class_names", "coding", "source"])
def test_nothing_in_the_place_of_a_list_is_refused(tmp_path: Path, name: str) -> None:
    denoiser = make_denoiser()
    path = save_model(tmp_path, denoiser.options, denoiser.state_dict(), {name: None})
    with pytest.raises(ValueError, match=f"{name} = a NoneType is not a value that edm2 writes"):
        load_model(path)


@pytest.mark.slow
def test_every_flipped_bit_of_a_model_is_noticed_or_harmless(tmp_path: Path) -> None:
    denoiser = make_denoiser(channel_mult=(1,), attn_resolutions=())
    path = save_model(tmp_path / "m.safetensors", denoiser.options, denoiser.state_dict(), {"sigma_rel": 0.1})
    whole, (expected, info) = path.read_bytes(), load_model(path)
    header = 8 * (8 + int.from_bytes(whole[:8], "little"))
    positions = [*range(0, header, 7), *range(header, 8 * len(whole), 8 * len(whole) // 200)]
    told = 0
    for position in positions:
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            found, found_info = load_model(path)
        except ValueError as error:
            told += path.name in str(error)
            continue
        assert (found_info, found.options) == (info, expected.options)
        states = found.state_dict().values(), expected.state_dict().values()
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert told > 0.99 * len(positions)
