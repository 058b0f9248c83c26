"""A damaged log costs one line and never the run."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from tiny_run import log_of, tiny_config, tiny_data

from edm2.train import train
from edm2.train.logs import (
    LOG_FILE,
    MAGNITUDES_FILE,
    append_log,
    is_magnitudes,
    is_progress,
    read_log,
    rewind_log,
)

RECORDS = [{"num_images": n, "loss": 0.1 * n, "of": {"a": [n, None]}} for n in range(1, 6)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for record in RECORDS:
        append_log(tmp_path, record)
    return tmp_path


def test_lines_are_json_and_come_back_exactly(run: Path) -> None:
    lines = (run / LOG_FILE).read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [r["loss"] for r in RECORDS]
    assert read_log(run) == RECORDS
    assert read_log(run, "missing.jsonl") == []


def test_a_line_that_a_kill_cut_short_is_named_and_left_out(run: Path) -> None:
    with open(run / LOG_FILE, "a") as file:
        file.write('{"num_images": 6, "lo')
    with pytest.warns(UserWarning, match=r"log.jsonl: line 6 is damaged and left out"):
        assert read_log(run) == RECORDS
    with pytest.warns(UserWarning, match="line 6"):
        rewind_log(run, 2)
    assert read_log(run) == RECORDS[:2]


def test_every_flipped_bit_costs_at_most_one_line_and_is_named(run: Path) -> None:
    path, rng = run / LOG_FILE, np.random.default_rng(0)
    whole = path.read_bytes()
    for position in rng.integers(0, 8 * len(whole), 400):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = read_log(run)
        number = whole[: position // 8].count(b"\n")
        assert found == RECORDS or found == RECORDS[:number] + RECORDS[number + 1 :]
        assert found == RECORDS or f"{path}: line {number + 1} is damaged" in str(told[0].message)


@pytest.mark.parametrize(
    "content", [b"\n", b"[]\n", b"{}\n", b"1" * 9000 + b"\n", b"[" * 100_000 + b"\n", b"\xff\n"]
)
def test_foreign_lines(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOG_FILE).write_bytes(content)
    with pytest.warns(UserWarning, match="line 1 is damaged"):
        assert read_log(tmp_path) == []


def test_a_run_with_a_damaged_log_goes_on(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(tiny_config(num_images=96), whole, dataset=tiny_data(), quiet=True)
    train(tiny_config(num_images=48), run, dataset=tiny_data(), quiet=True)
    lines = (run / LOG_FILE).read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b"loss", b"lass")
    (run / LOG_FILE).write_bytes(b"\n".join(lines))
    with pytest.warns(UserWarning, match="line 2 is damaged and left out"):
        train(tiny_config(num_images=96), run, dataset=tiny_data(), quiet=True)
    expected = log_of(whole)
    assert log_of(run) == expected[:1] + expected[2:]


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).mkdir()
    with pytest.raises(OSError, match=r"could not write .*log.jsonl .*: checkpoints are untouched"):
        append_log(tmp_path, {})


def test_records_of_another_kind_are_left_out_for_pages(tmp_path: Path) -> None:
    good = {
        "loss": None,
        "grad_norm": 1.0,
        "learning_rate": 1,
        "nonfinite_steps": 0,
        "seconds": 1.0,
        "images_per_second": 2,
    }
    bad = [{"loss": []}, {"grad_norm": "a"}, {"learning_rate": None}, {"seconds": 10**400}]
    for n, change in enumerate([{}, *bad, {}]):
        append_log(tmp_path, {"num_images": n, **good, **change})
    append_log(tmp_path, {"num_images": 9, **{k: v for k, v in good.items() if k != "loss"}})
    with pytest.warns(UserWarning, match="lines 2, 3, 4, 5, 7 are damaged and left out"):
        assert [r["num_images"] for r in read_log(tmp_path, is_wanted=is_progress)] == [0, 5]
    tables = {kind: {"enc": 1.0} for kind in ("activations", "weights", "gradients", "updates")}
    for n, change in enumerate([{}, {"weights": None}, {"updates": {"a": {}}}]):
        append_log(tmp_path, {"num_images": n, **tables, **change}, MAGNITUDES_FILE)
    with pytest.warns(UserWarning, match="lines 2, 3 are damaged"):
        assert len(read_log(tmp_path, MAGNITUDES_FILE, is_wanted=is_magnitudes)) == 1
