"""Settings in files: JSON, TOML, YAML and runs give the run that the same options give; mistakes are named."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_config, tiny_data

from edm2.cli import main
from edm2.files import write_sealed
from edm2.train import TrainConfig, read_settings, train
from edm2.train.amounts import amount_text, parse_amount
from edm2.train.build import open_run_data
from edm2.train.run_folder import claim
from edm2.train.settings_file import run_settings

TOML = """
preset = "fashion-mnist"
images = "8Mi"
batch = 64
keep-checkpoints = 3.0
[network]
model-channels = 16
channel_mult = [1, 2]
dropout = 0
[optimizer]
betas = [0.9, 0.95]
"""
YAML = """
preset: fashion-mnist
images: 8Mi
batch: 64
keep-checkpoints: 3
network: {model-channels: 16, channel_mult: [1, 2], dropout: 0}
optimizer: {betas: [0.9, 0.95]}
"""
JSON = {
    "preset": "fashion-mnist",
    "num_images": 8 << 20,
    "batch_size": 64,
    "keep_checkpoints": 3,
    "network": {"model_channels": 16, "channel_mult": [1, 2], "dropout": 0},
    "optimizer": {"betas": [0.9, 0.95]},
}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("128Ki", 128 << 10),
        ("8Mi", 8 << 20),
        ("2gi", 2 << 30),
        ("1.5Ki", 1536),
        ("100_000", 100_000),
        ("7", 7),
    ],
)
def test_amounts(text: str, number: int) -> None:
    assert parse_amount(text) == number
    assert parse_amount(amount_text(number)) == number


def test_amounts_are_written_with_the_largest_unit() -> None:
    assert [amount_text(n) for n in (0, 1000, 3072, 8 << 20, 3 << 30)] == ["0", "1000", "3Ki", "8Mi", "3Gi"]


@pytest.mark.parametrize("text", ["", "Ki", "8Q", "1.5", "0.3Ki", "infMi", "8 M"])
def test_bad_amounts(text: str) -> None:
    with pytest.raises(ValueError, match="must be a whole number, which may end in Ki, Mi or Gi"):
        parse_amount(text)


def test_the_three_formats_say_the_same(tmp_path: Path) -> None:
    for name, text in (("s.toml", TOML), ("s.yaml", YAML), ("s.json", json.dumps(JSON))):
        (tmp_path / name).write_text(text)
    found = [read_settings(tmp_path / name) for name in ("s.toml", "s.yaml", "s.json")]
    configs = [each.apply(TrainConfig()) for each in found]
    assert configs[0] == configs[1] == configs[2]
    assert {each.preset for each in found} == {"fashion-mnist"}
    assert (configs[0].num_images, configs[0].batch_size, configs[0].keep_checkpoints) == (8 << 20, 64, 3)
    assert configs[0].network.channel_mult == (1, 2)
    assert type(configs[0].network.dropout) is float
    assert configs[0].optimizer.betas == (0.9, 0.95)


def test_a_run_is_a_file_of_settings(tmp_path: Path) -> None:
    config = tiny_config(num_images=8, seed=3)
    train(config, tmp_path / "run", dataset=tiny_data(), quiet=True, preset="mine")
    for path in (tmp_path / "run", tmp_path / "run" / "config.json"):
        found = read_settings(path)
        assert found.is_complete
        assert found.preset == "mine"
        assert found.apply(TrainConfig()) == config


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"imgaes": 5}, r"unknown setting imgaes: did you mean images"),
        ({"network": {"width": 5}}, r"unknown setting network.width: there are model_channels"),
        ({"network": 5}, "network holds settings of its own, not 5"),
        ({"batch": "8Q"}, "batch_size is '8Q': it must be a whole number, such as 4096, 128Ki or 8Mi"),
        ({"batch": 1.5}, "batch_size is 1.5: it must be a whole number"),
        ({"batch": True}, "batch_size is True: it must be a whole number"),
        ({"config": "H"}, "config is 'H': it must be one of A, B"),
        ({"optimizer": {"betas": [0.9]}}, r"optimizer.betas is \[0.9\]: it must be a list of 2 numbers"),
        ({"network": {"channel_mult": 2}}, "network.channel_mult is 2: it must be a list of numbers"),
        ({"optimizer": {"eps": "small"}}, "optimizer.eps is 'small': it must be a number"),
        ({"compile": "yes"}, "compile is 'yes': it must be true or false"),
        ({"batch": 0}, "batch_size 0 must be at least 1"),
        ({"preset": 5}, "preset 5 must be a name"),
        ([], "must hold names and values"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, content: Any, told: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=told):
        read_settings(path).apply(TrainConfig())


def test_files_that_are_not_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist: give a text file with settings, or a run"):
        read_settings(tmp_path / "none.json")
    for name in ("s.json", "s.toml", "s.yaml"):
        (tmp_path / name).write_text("{[")
        with pytest.raises(ValueError, match="cannot be parsed"):
            read_settings(tmp_path / name)
    (tmp_path / "s.txt").write_text("")
    with pytest.raises(ValueError, match=r"must end in .json, .toml, .yaml or .yml"):
        read_settings(tmp_path / "s.txt")


SMALL = [
    "--images",
    "32",
    "--batch",
    "16",
    "--network.model-channels",
    "8",
    "--network.num-blocks",
    "1",
    "--network.channels-per-head",
    "8",
    "--device",
    "cpu",
]


def shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Settings that a command would train with."""
    main(["train", *words, "--print-settings", "--out", "none"])
    settings: dict[str, Any] = json.JSONDecoder().decode(capsys.readouterr().out)
    return settings


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The preset, then --config, then the file, then the options."""
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"preset": "digits", "images": "1Ki", "optimizer": {"eps": 1e-6}, "seed": 3}))
    options = ["--preset", "digits", "--seed", "3", "--optimizer.eps", "1e-6", *SMALL]
    assert shown(["--settings", str(path), *SMALL], capsys) == shown(options, capsys)
    # The file overrides what --config changes.
    words = ["--settings", str(path), "--config", "D", *SMALL]
    assert shown(words, capsys) == shown([*options, "--config", "D"], capsys)
    path.write_text(json.dumps({"preset": "digits", "config": "D", "images": 32}))
    assert shown(["--settings", str(path), *SMALL], capsys) == shown(
        ["--preset", "digits", "--config", "D", *SMALL], capsys
    )


def test_command_line_with_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(tiny_config(num_images=8, data="digits"), run, dataset=tiny_data(), quiet=True, preset="mine")
    there = json.loads((run / "config.json").read_text())["settings"]
    assert {**shown(["--settings", str(run), "--images", "32"], capsys), "preset": "mine"} == {
        **there,
        "num_images": 32,
    }
    with pytest.raises(SystemExit):
        main(["train", "--settings", str(run), "--preset", "digits", "--out", "none"])
    assert "--preset digits has no effect" in capsys.readouterr().err


def test_settings_of_a_run_that_an_older_edm2_began(tmp_path: Path) -> None:
    config = tiny_config(config="C", num_images=24)
    settings = {"preset": "digits", **config.to_json()}
    settings["architecture"] = settings.pop("config")
    for lost in ("seed", "loss", "workers"):
        del settings[lost]
    claim(tmp_path, settings, {}, "r")
    found = run_settings(tmp_path)
    assert (found.config, found.num_images, found.network) == ("C", 24, config.network)
    assert (found.loss, found.seed) == (TrainConfig().loss, TrainConfig().seed)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_images": "many"}, r"config.json is damaged \(the setting num_images is 'many': it must be"),
        ({"loss": {"p_mean": None}}, "the setting loss.p_mean is None"),
        ({"num_images": -1}, "num_images -1 must be at least 1"),
        ({"loss": 3}, "config.json: loss holds settings of its own, not 3"),
        ({"unheard_of": 1}, "config.json has an unknown setting unheard_of"),
    ],
)
def test_damaged_settings_of_a_run_are_named(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    content = {"run_id": "r", "identity": {}, "settings": {**TrainConfig().to_json(), **change}}
    write_sealed(tmp_path / "config.json", content)
    with pytest.raises(ValueError, match=told):
        run_settings(tmp_path)


def test_a_run_whose_images_were_given_in_python(tmp_path: Path) -> None:
    claim(tmp_path, TrainConfig().to_json(), {}, "r")
    with pytest.raises(
        ValueError, match="does not name its training images: they were given to it in Python"
    ):
        open_run_data(tmp_path)


def test_a_value_that_unfolds_without_end_is_shown_in_short(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    text = "&a0 [x]"
    for i in range(40):
        text = f"&a{i + 1} [{text}, *a{i}]"
    (tmp_path / "b.yaml").write_text(f"loss: {text}")
    with pytest.raises(ValueError, match="loss holds settings of its own, not") as caught:
        read_settings(tmp_path / "b.yaml")
    assert len(str(caught.value)) < 1000
