"""Networks of official pickles: equal to the golden numbers, and strict about everything else."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edm2.diffusion import build_denoiser
from edm2.interop.nvlabs import load_network, read_network
from edm2.interop.pickle_file import read_pickle

TINY_NAME = "unet.enc.2x2_conv.weight"


def test_golden_network_is_rebuilt_exactly(
    golden_network: Path, fill_by_rule: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    found = load_network(golden_network)
    expected = fill_by_rule(build_denoiser(**found.options), prefix="8-0.050.").half().float().eval()
    assert not found.training
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
        assert found.state_dict()[name].dtype == torch.float32
    x = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    sigma, labels = torch.tensor([0.3, 20.0]), torch.tensor([1, 3])
    assert torch.equal(found(x, sigma, labels), expected(x, sigma, labels))
    assert torch.equal(found.logvar(sigma), expected.logvar(sigma))
    assert "CC BY-NC-SA 4.0" in caplog.text


def test_golden_network_is_described_without_reading_its_weights(golden_network: Path) -> None:
    found = read_network(golden_network)
    assert (found.options["img_resolution"], found.options["channel_mult"]) == (8, [1, 2])
    assert found.options["attn_resolutions"] == [4]
    assert found.encoder == "StandardRGBEncoder"
    assert sorted(found.buffers) == [
        f"{m}_fourier.{n}" for m in ("logvar", "unet.emb") for n in ("freqs", "phases")
    ]
    assert all(tensor.dtype == torch.float16 for tensor in found.parameters.values())


def test_embedded_source_leaves_no_trace(golden_network: Path) -> None:
    assert b"must never be executed" in golden_network.read_bytes()

    def texts(value: Any) -> Any:
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from texts(item)
        elif isinstance(value, dict):
            for item in value.values():
                yield from texts(item)
        elif hasattr(value, "state"):
            yield from texts(value.state)

    assert not any("never" in text for text in texts(read_pickle(golden_network)))


def test_any_strides_and_float_types_are_read(
    official: Any, tiny_state: dict[str, Tensor], tmp_path: Path
) -> None:
    state = {n: x.float() for n, x in tiny_state.items()}
    state[TINY_NAME] = state[TINY_NAME].to(memory_format=torch.channels_last)
    state["unet.out_conv.weight"] = state["unet.out_conv.weight"].double()
    state["unet.emb_noise.weight"] = state["unet.emb_noise.weight"].bfloat16()
    found = load_network(
        official.write(tmp_path / "net.pkl", official.network(state, official.tiny))
    ).state_dict()
    for name, value in state.items():
        assert torch.equal(found[name], value.float()), name


def refused(path: Path, what: str) -> None:
    with pytest.raises(ValueError, match=f"{path.name} was not read: it holds {what}.*Nothing in it was run"):
        load_network(path)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"img_resolution": 3, "channel_mult": [1, 1]}, "a network that cannot be built .*multiples of 2"),
        ({"num_blocks": 1 << 40}, "a network with 'num_blocks' = 1099511627776, which is not known here"),
        ({"num_blocks": 60}, "a network that cannot be built .fewer tensors than its network has blocks"),
        ({"model_channels": 4}, "a tensor of shape .* for .*, where its network has a tensor of shape"),
        ({"model_channels": 2.0}, "a network with 'model_channels' = 2.0"),
        ({"model_channels": 0}, "a network with 'model_channels' = 0"),
        ({"model_channels": True}, "a network with 'model_channels' = True"),
        ({"channel_mult": list(range(99))}, "a network with 'channel_mult' = a list"),
        ({"channel_mult": [1 << 30]}, "a network with 'channel_mult' = a list"),
        ({"label_dim": 5}, "no tensor for unet.emb_label.weight, where its network has a tensor of shape"),
        ({"sigma_data": 0}, "a network with 'sigma_data' = 0"),
        ({"sigma_data": float("nan")}, "a network with 'sigma_data' = nan"),
        ({"config": "A"}, "a network with 'config' = 'A', which is not known here"),
        ({"dtype": "float16"}, "a network with 'dtype' = 'float16', which is not known here"),
    ],
)
def test_implausible_arguments_are_refused(
    official: Any, tiny_state: dict[str, Tensor], tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    network = official.network(tiny_state, {**official.tiny, **changes})
    refused(official.write(tmp_path / "net.pkl", network), what)


def test_arguments_without_a_meaning_here_are_left_out(
    official: Any, tiny_state: dict[str, Tensor], tmp_path: Path
) -> None:
    kwargs = {**official.tiny, "use_fp16": True, "channel_mult_emb": None}
    network = official.network(tiny_state, kwargs, sigma_data=0.7)
    assert load_network(official.write(tmp_path / "net.pkl", network)).sigma_data == 0.7


def test_state_that_does_not_fit_is_refused(
    official: Any, tiny_state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "net.pkl"
    for state, what in (
        ({k: v for k, v in tiny_state.items() if k != TINY_NAME}, f"no tensor for {TINY_NAME}, where"),
        (
            {**tiny_state, "unet.more.weight": torch.ones(2)},
            "a tensor of shape .2. for unet.more.weight, where .* no",
        ),
        (
            {**tiny_state, TINY_NAME: torch.ones(2, 2, 3, 1)},
            f"a tensor of shape .2, 2, 3, 1. for {TINY_NAME}",
        ),
        ({**tiny_state, TINY_NAME: tiny_state[TINY_NAME] / 0}, f"values of {TINY_NAME} that are not finite"),
        ({**tiny_state, "a\x1b[2Jb\n": torch.ones(2)}, r"a tensor of shape .2. for a\\x1b.2Jb\\n, where"),
        ({**tiny_state, "a" * 101: torch.ones(2)}, "a module '' whose _parameters have no plausible names"),
        ({}, "a network that cannot be built .fewer tensors than its network has blocks"),
    ):
        refused(official.write(path, official.network(state, official.tiny)), what)


def test_content_that_is_no_network_is_refused(
    official: Any, tiny_state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "net.pkl"
    for content, what in (
        ([1, 2], "no network under 'ema'"),
        ({"net": 1}, "no network under 'ema'"),
        ({"ema": tiny_state}, "no network under 'ema'"),
        (
            {"ema": official.persistent("EDMPrecond", {})},
            "a network of class 'EDMPrecond', not the 'Precond'",
        ),
        ({"ema": official.persistent("P" * 5000, {})}, "a network of class 'P{300,400}[.]"),
        ({"ema": official.persistent("Precond", {})}, "a network without its constructor's arguments"),
        (
            {"ema": official.persistent("Precond", {"_init_args": (64, 3)})},
            "a network without its constructor's",
        ),
        ({"ema": official.persistent("Precond", {"_modules": {"a": 1}})}, "a value 'a' in place of a module"),
        (
            {"ema": official.persistent("Precond", {"_modules": [1]})},
            "a module '' whose _modules have no plausible names",
        ),
        (
            {"ema": official.persistent("Precond", {"_parameters": {1: 1}})},
            "a module '' whose _parameters have no",
        ),
        (
            {"ema": official.persistent("Precond", {"_buffers": {"x": 1}})},
            "a x that is not a tensor of floats",
        ),
    ):
        path.write_bytes(pickle.dumps(content, 4))
        refused(path, what)


def test_modules_that_share_modules_do_not_explode(official: Any, tmp_path: Path) -> None:
    module = official.persistent("Leaf", {})
    for _ in range(7):
        module = official.persistent("Node", {"_modules": {str(i): module for i in range(10)}})
    path = official.write(tmp_path / "net.pkl", official.persistent("Precond", {"_modules": {"a": module}}))
    refused(path, "more modules than any network has")
    wide = official.persistent("Wide", {"_parameters": dict.fromkeys(map(str, range(20_000)))})
    module = official.persistent("Node", {"_modules": {str(i): wide for i in range(20_000)}})
    official.write(path, official.persistent("Precond", {"_modules": {"a": module}}))
    refused(path, "more modules than any network has")
    official.write(path, official.persistent("Precond", {"_modules": {"a" * 1000: module}}))
    refused(path, "a module '' whose _modules have no plausible names")


class Rebuilt:
    """Pickles as a tensor with any start, shape and stride over four numbers."""

    def __init__(self, *layout: Any) -> None:
        self.layout = layout

    def __reduce__(self) -> Any:
        storage = torch.arange(4.0)._typed_storage()
        return torch._utils._rebuild_tensor_v2, (storage, *self.layout, False, {})


@pytest.mark.parametrize(
    ("start", "shape", "stride", "what"),
    [
        (0, (1 << 40,), (0,), "a tensor that reaches beyond its storage"),
        (0, (1 << 20, 1 << 20), (0, 0), "a tensor that reaches beyond its storage"),
        (0, (5,), (1,), "a tensor that reaches beyond its storage"),
        (2, (3,), (1,), "a tensor that reaches beyond its storage"),
        (0, (2,), (4,), "a tensor that reaches beyond its storage"),
        (-1, (2,), (1,), "a tensor whose shape, stride and start do not fit each other"),
        (0, (2,), (), "a tensor whose shape, stride and start do not fit each other"),
        (0, (-2,), (1,), "a tensor's shape that is not a tuple of up to 8 sizes"),
        (0, (2,), (-1,), "a tensor's stride that is not a tuple"),
        (0, (1,) * 9, (1,) * 9, "a tensor's shape that is not a tuple"),
        (0, (1 << 60,), (1,), "a tensor's shape that is not a tuple"),
    ],
)
def test_tensors_stay_inside_their_storage(
    tmp_path: Path, start: int, shape: tuple[int, ...], stride: tuple[int, ...], what: str
) -> None:
    path = tmp_path / "net.pkl"
    path.write_bytes(pickle.dumps(Rebuilt(start, shape, stride), 4))
    refused(path, what)


def test_many_tensors_over_one_storage_are_refused(tmp_path: Path) -> None:
    storage = torch.zeros(1000)._typed_storage()

    class Shared(Rebuilt):
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (storage, 0, (1000,), (1,), False, {})

    path = tmp_path / "net.pkl"
    path.write_bytes(pickle.dumps([Shared() for _ in range(100)], 4))
    refused(path, "tensors that claim more bytes than the file has")


def test_tensors_are_read_as_they_were(tmp_path: Path) -> None:
    tensors = [
        torch.arange(24.0).reshape(4, 6)[1:, 2:4],
        torch.zeros([]),
        torch.ones(2, 3).t(),
        torch.zeros(0, 3),
    ]
    tensors += [torch.arange(3, dtype=t) for t in (torch.int64, torch.uint8, torch.bfloat16)] + [
        torch.tensor([True])
    ]
    path = tmp_path / "tensors.pkl"
    path.write_bytes(pickle.dumps(tensors, 4))
    for tensor, stored in zip(tensors, read_pickle(path), strict=True):
        assert torch.equal(stored.read(), tensor)
        assert stored.read().dtype == tensor.dtype
        assert stored.contiguous == tensor.is_contiguous()
        raw = path.read_bytes()[stored.file_offset :]
        if tensor.numel() and tensor.dtype == torch.float32:
            first = torch.frombuffer(bytearray(raw[:4]), dtype=torch.float32)[0]
            assert first == tensor.flatten()[0]


def test_tensors_of_a_graphics_card_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tensor.pkl"
    content = pickle.dumps(torch.arange(3.0), 4)
    assert content.count(b"cpu") == 1
    path.write_bytes(content.replace(b"cpu", b"mps"))
    assert read_pickle(path).read().tolist() == [0, 1, 2]


def test_attributes_that_are_types_devices_or_arrays_are_passed_over(
    official: Any, tiny_state: dict[str, Tensor], tmp_path: Path
) -> None:
    extra = dict(
        kind=torch.float16,
        device=torch.device("cpu"),
        size=torch.Size([1]),
        scale=np.ones(3),
        one=np.float32(1),
    )
    network = official.network(tiny_state, official.tiny, **extra)
    assert load_network(official.write(tmp_path / "net.pkl", network)).label_dim == 0
