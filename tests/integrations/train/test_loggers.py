"""Trackers against the real libraries."""

import json
import os
import subprocess
import sys

import pytest

from edm2.train.loggers import open_loggers


def test_tensorboard_events_are_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for seen, values in ((0, (1.0, 2.0, 3.0)), (32, (20.0, 30.0))):
        (logger,) = open_loggers(("tensorboard",))
        logger.start(tmp_path, "abc", {}, seen)
        for i, value in enumerate(values):
            logger.log(seen + 32 * (i + 1), {"loss": value})
        logger.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(32, 1.0), (64, 20.0), (96, 30.0)]


_TRACKIO = """
import json, pathlib, sys
from edm2.train.loggers import open_loggers
from trackio.sqlite_storage import SQLiteStorage
for seen, values in ((0, (1.0, 2.0)), (64, (3.0,))):
    (logger,) = open_loggers(("trackio",))
    logger.start(pathlib.Path("a-run"), "abc", {"seed": 7}, seen)
    for i, value in enumerate(values):
        logger.log(seen + 32 * (i + 1), {"loss": value})
    logger.finish()
(name,) = SQLiteStorage.get_runs("edm2")
print("found", json.dumps([name, SQLiteStorage.get_logs("edm2", name), SQLiteStorage.get_run_config("edm2", name)]))
"""


@pytest.mark.slow
def test_trackio_continues_one_run(tmp_path):
    pytest.importorskip("trackio")
    # It decides where its data lie when it is imported.
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _TRACKIO], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = next(line for line in done.stdout.splitlines() if line.startswith("found "))
    name, logs, config = json.loads(found.removeprefix("found "))
    assert name == "a-run-abc"
    assert [(log["step"], log["loss"]) for log in logs] == [(32, 1.0), (64, 2.0), (96, 3.0)]
    assert config["seed"] == 7


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (logger,) = open_loggers(("wandb",))
    logger.start(tmp_path, "abc", {"seed": 1}, 0)
    logger.log(32, {"loss": 0.5})
    logger.finish()
    assert list(tmp_path.rglob("run-abc.wandb"))
