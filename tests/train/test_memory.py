"""Bytes for people, and a GPU's sensors."""

import pytest
import torch

from edm2.train.memory import gpu_sensors, size_text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (999.7, "1 kB"), (1.5e9, "1.5 GB"), (3e15, "3e+03 TB")],
)
def test_sizes(num_bytes: float, text: str) -> None:
    assert size_text(num_bytes) == text


def test_a_gpu_tells_its_load_and_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: {1: 97}[device.index])
    monkeypatch.setattr(torch.cuda, "temperature", lambda device: {1: 61}[device.index])
    assert gpu_sensors(torch.device("cuda:1")) == {"gpu_load": 97.0, "gpu_celsius": 61.0}
    assert gpu_sensors(torch.device("cpu")) == {}


def test_a_gpu_without_sensors_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> int:
        raise OSError("Not Supported")

    monkeypatch.setattr(torch.cuda, "utilization", fail)
    assert gpu_sensors(torch.device("cuda:0")) == {}
