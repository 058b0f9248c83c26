"""Files in the official format, made by pickling stand-ins for the classes that such files name."""

import pickle
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

TRAPPED_SOURCE = "raise RuntimeError('embedded source must never be executed')"
TINY = {
    "img_resolution": 2,
    "img_channels": 1,
    "label_dim": 0,
    "model_channels": 2,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
    "channels_per_head": 2,
    "logvar_channels": 2,
}


class Official:
    """Writes what the official code would write, with tensors and arguments of the test's choice."""

    tiny = TINY

    def __init__(self, reconstruct: Any, easy_dict: type) -> None:
        self.reconstruct, self.easy_dict = reconstruct, easy_dict

    def persistent(self, class_name: str, state: dict[str, Any], **meta: Any) -> Any:
        """An object whose pickle carries source code."""
        reconstruct = self.reconstruct
        described = dict(
            type="class", version=6, module_src=TRAPPED_SOURCE, class_name=class_name, state=state
        )

        class Persistent:
            def __reduce__(self) -> Any:
                return reconstruct, ({**described, **meta},)

        return Persistent()

    def network(
        self,
        state: dict[str, Tensor],
        kwargs: dict[str, Any],
        *,
        class_name: str = "Precond",
        **attributes: Any,
    ) -> Any:
        """A network of modules within modules, from flat state names."""
        root: dict[str, Any] = {}
        for name, tensor in state.items():
            *path, last = name.split(".")
            module = root
            for part in path:
                module = module.setdefault(part, {})
            module[last] = tensor

        def build(name: str, content: dict[str, Any], **extra: Any) -> Any:
            tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}
            buffers = {k: v for k, v in tensors.items() if k in ("freqs", "phases")}
            parameters = {k: nn.Parameter(v) for k, v in tensors.items() if k not in buffers}
            modules = {k: build(k, v) for k, v in content.items() if k not in tensors}
            state = dict(training=False, _parameters=parameters, _buffers=buffers, _modules=modules, **extra)
            return self.persistent(name, state)

        return build(class_name, root, _init_args=(), _init_kwargs=kwargs, **attributes)

    def write(self, path: Path, network: Any, *, encoder: str = "StandardRGBEncoder", **extra: Any) -> Path:
        """A network pickle."""
        content = self.easy_dict(encoder=self.persistent(encoder, {}), **extra)
        content["ema"] = network
        path.write_bytes(pickle.dumps(content, protocol=4))
        return path


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> Official:
    """Stand-ins for the official modules, there while pickles are written."""

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("a pickle was executed")

    easy_dict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    for name, content in {
        "dnnlib": {},
        "dnnlib.util": {"EasyDict": easy_dict},
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return Official(_reconstruct_persistent_obj, easy_dict)


@pytest.fixture
def tiny_state() -> dict[str, Tensor]:
    """State of a denoiser with the arguments `TINY`, float16."""
    from edm2.diffusion import build_denoiser

    state = build_denoiser(**TINY).state_dict()
    rng = np.random.default_rng(0)
    return {n: torch.from_numpy(rng.standard_normal(tuple(v.shape))).half() for n, v in state.items()}


@pytest.fixture
def tiny_file(official: Official, tiny_state: dict[str, Tensor], tmp_path: Path) -> Path:
    """A whole official pickle of a few kilobytes."""
    return official.write(tmp_path / "tiny.pkl", official.network(tiny_state, TINY))


@pytest.fixture
def golden_network() -> Path:
    """A pickle of the official format with trapped source inside; see tests/golden/README.md."""
    return Path(__file__).parents[1] / "golden" / "nvlabs_snapshots" / "network-snapshot-0000008-0.050.pkl"


_EXECUTING = ("pickle.find_class", "os.system", "exec", "compile", "subprocess.Popen")
_watched: list[str] | None = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watched is not None and event in _EXECUTING:
        _watched.append(event)


sys.addaudithook(_audit)


@pytest.fixture
def watching() -> Callable[[], AbstractContextManager[list[str]]]:
    """Context that collects what Python is asked to execute: unpickled names, code, commands."""

    @contextmanager
    def watch() -> Iterator[list[str]]:
        global _watched
        _watched = events = []
        try:
            yield events
        finally:
            _watched = None

    return watch
