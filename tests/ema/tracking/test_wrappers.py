"""Wrappers leave no trace in names, told by their types; models that cannot be followed are refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel

from edm2.ema import PowerEMA, reconstruct
from edm2.ema.tracking.wrappers import clean_names


class Net(nn.Module):
    """A model whose own submodules have the names that wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self._orig_mod = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)


def compiled(module: nn.Module) -> nn.Module:
    """What torch.compile makes around a module, without loading the compiler."""
    wrapper = type("OptimizedModule", (nn.Module,), {"__module__": "torch._dynamo.eval_frame"})()
    wrapper._orig_mod = module
    return wrapper


def test_a_models_own_names_stay(tmp_path: Path) -> None:
    model = Net()
    for wrapped in (model, nn.DataParallel(model), compiled(nn.DataParallel(model))):
        assert PowerEMA(wrapped).names == [name for name, _ in model.named_parameters()]
    ema = PowerEMA(model)
    ema.update(1)
    ema.snapshot(tmp_path)
    model.load_state_dict(reconstruct(tmp_path, sigma_rel=0.1).tensors)


def test_wrappers_within_a_model_leave_no_trace_either() -> None:
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)), compiled(nn.Linear(2, 2)))
    assert PowerEMA(model).names == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_names_that_collide_are_refused() -> None:
    model = nn.Sequential(compiled(nn.Linear(1, 1)))
    model.get_submodule("0").weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"two tensors are called '0\.weight'"):
        PowerEMA(model)


@pytest.mark.parametrize(
    ("names", "clean"),
    [
        (["module.a", "module.b.c"], ["a", "b.c"]),
        (["module.a", "head"], ["module.a", "head"]),
        (["_orig_mod.module.a.weight"], ["a.weight"]),
        (["module._orig_mod.a._orig_mod.weight"], ["a.weight"]),
        (["a._fsdp_wrapped_module.b.weight"], ["a.b.weight"]),
        (["a.module.weight", "my_module.weight"], ["a.module.weight", "my_module.weight"]),
    ],
)
def test_names_in_checkpoints_lose_what_only_wrappers_can_have_put_there(
    names: list[str], clean: list[str]
) -> None:
    assert list(clean_names(names).values()) == clean


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused_unless_its_parameters_are_gathered(use_orig_params: bool) -> None:
    inner = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    for wrapped in (model, nn.Sequential(model)):
        with pytest.raises(
            ValueError, match=r"wrapped in FSDP1 .*: use FSDP2 .*, or .* inside Fully.*summon_full_params"
        ):
            PowerEMA(wrapped)
    with FullyShardedDataParallel.summon_full_params(model):
        assert PowerEMA(model).names == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_parameter_that_zero3_has_taken_away_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.weight.data = torch.empty(0)
    model.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"'weight' is empty: DeepSpeed ZeRO-3 .* use ZeRO stage 1 or 2"):
        PowerEMA(model)
