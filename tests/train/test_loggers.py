import sys
import types
from pathlib import Path

import pytest

from edm2.extras import MissingExtra
from edm2.train.loggers import numbers, open_loggers


class Recorded(types.ModuleType):
    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options))

    def log(self, values, step):
        self.calls.append(("log", values, step))

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_trackers_continue_under_the_same_name(name, monkeypatch, tmp_path):
    module = Recorded(name)
    monkeypatch.setitem(sys.modules, name, module)
    for seen in (0, 64):
        (logger,) = open_loggers((name,))
        logger.start(tmp_path / "run", "abc", {"seed": 1}, seen)
        logger.log(seen + 32, {"loss": 0.5})
        logger.finish()
    first, second = module.calls[:3], module.calls[3:]
    assert first[0] == second[0]
    assert first[0][1]["config"] == {"seed": 1}
    assert first[0][1]["resume"] == "allow"
    assert "abc" in str(first[0][1])
    assert first[1:] == [("log", {"loss": 0.5}, 32), ("finish",)]
    assert second[1] == ("log", {"loss": 0.5}, 96)


def test_tensorboard_writes_and_forgets_what_is_trained_again(monkeypatch, tmp_path):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append((Path(folder), purge_step))

        def add_scalar(self, name, value, global_step):
            calls.append((name, value, global_step))

        def close(self):
            calls.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    (logger,) = open_loggers(("tensorboard",))
    logger.start(tmp_path, "abc", {}, 64)
    logger.log(96, {"loss": 0.5, "grad_norm": 2.0})
    logger.finish()
    assert calls == [(tmp_path / "tensorboard", 65), ("loss", 0.5, 96), ("grad_norm", 2.0, 96), "closed"]


def test_only_numbers_are_drawn():
    assert numbers({"loss": None, "num_images": 3, "learning_rate": 0.1, "name": "a"}) == {
        "num_images": 3.0,
        "learning_rate": 0.1,
    }


def test_unknown_or_missing(monkeypatch):
    with pytest.raises(ValueError, match="unknown logger 'mlflow': choose from tensorboard, wandb, trackio"):
        open_loggers(("mlflow",))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        MissingExtra, match=r"--log-to wandb needs .*\.\[log\].*, or leave it out of --log-to"
    ):
        open_loggers(("wandb",))
