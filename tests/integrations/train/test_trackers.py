"""Trackers against the real libraries."""

import pytest

from edm2.train.trackers import open_trackers


def test_tensorboard_events_are_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for seen, values in ((0, (1.0, 2.0, 3.0)), (32, (20.0, 30.0))):
        (tracker,) = open_trackers(("tensorboard",))
        tracker.start(tmp_path, "abc", {}, seen)
        for i, value in enumerate(values):
            tracker.log(seen + 32 * (i + 1), {"loss": value})
        tracker.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(32, 1.0), (64, 20.0), (96, 30.0)]


def test_trackio_keeps_a_run(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setattr(trackio, "show", lambda **_: None)
    (tracker,) = open_trackers(("trackio",))
    tracker.start(tmp_path / "run", "abc", {"seed": 1}, 0)
    tracker.log(32, {"loss": 0.5})
    tracker.finish()


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tracker,) = open_trackers(("wandb",))
    tracker.start(tmp_path, "abc", {"seed": 1}, 0)
    tracker.log(32, {"loss": 0.5})
    tracker.finish()
    assert list(tmp_path.rglob("run-abc.wandb"))
