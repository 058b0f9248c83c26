"""The command line: help at each level, exit codes, and what it says of a mistake."""

import gc
import importlib
import keyword
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edm2
from edm2.cli import COMMANDS, _imported, _wait_asleep, main
from edm2.train import Stopped
from edm2.train.world import FirstFailed


def leaves() -> Iterator[tuple[str, ...]]:
    for name, text in COMMANDS.items():
        if isinstance(text, dict):
            yield from ((name, word) for word in text if word)
        else:
            yield (name,)


def ends(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr()
    return ended.value.code, printed.out + printed.err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_overview(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(words)
    out = capsys.readouterr().out
    assert out.startswith("usage: edm2 COMMAND")
    assert all(name in out for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.strip() == edm2.__version__


def test_every_command_has_its_function() -> None:
    for name, *word in leaves():
        module = importlib.import_module(f"edm2.commands.{name}{'_' * keyword.iskeyword(name)}")
        assert callable(getattr(module, word[0] if word else "run"))


@pytest.mark.parametrize(
    "words",
    [
        "sample nowhere --out x",
        "sample nowhere --out x --ema 0.1",
        "forecast nowhere --start x.npz --steps 1 --members 1 --out y.npz",
        "tune nowhere",
        "distill nowhere --out x",
        "probe nowhere",
        "export nowhere --to onnx --out x",
        "report nowhere",
        "studio nowhere",
        "info nowhere",
        "suggest nowhere",
        "ema list nowhere",
        "ema verify nowhere",
        "ema reconstruct nowhere --sigma-rel 0.1 --out x",
        "ema profile nowhere --out x.png",
        "metrics ensemble nowhere.npz",
        "metrics compare nowhere x",
        "metrics ref nowhere --out x.safetensors",
        "data info nowhere",
        "train --preset digits --init nowhere --out x",
        "train --preset digits --residual nowhere --out x",
        "train --settings nowhere --out x",
        "train --settings nowhere.toml --out x",
    ],
)
def test_a_path_that_does_not_exist(
    words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, text = ends(words.split(), capsys)
    assert re.search(
        r"nowhere\S* (does not exist:|is neither an existing path)|no file or folder is called 'nowhere'",
        text,
    ), text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", list(leaves()), ids=" ".join)
def test_help_of_a_command(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ends([*words, "--help"], capsys)
    assert code == 0
    assert f"edm2 {' '.join(words)}" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["smaple"], "error: unknown command edm2 smaple: did you mean sample"),
        (["ema", "reconstrct"], "unknown command edm2 ema reconstrct: did you mean reconstruct"),
        (["zzzz"], "unknown command edm2 zzzz: there are demo, train"),
        ([""], "unknown command edm2 : there are demo"),
        (["info", "digit"], "no file or folder is called 'digit', and unknown preset 'digit': did you mean"),
        (["import", "nothing", "--out", "x"], "no file or folder is called 'nothing', and no released model"),
        (["sample", "--sedes", "1"], "--sedes"),
        (["sample"], "--out"),
        (["train"], "--out"),
        (["train", "--preset"], "--preset"),
        (["train", "--preset", "digits"], "--out"),
        (
            ["train", "--preset", "digits", "--preset=fashion-mnist"],
            "--preset is given 2 times (digits, fashion",
        ),
        (["report"], "no run was given"),
    ],
)
def test_mistakes_end_with_2(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ends(words, capsys)
    assert code == 2
    assert told in text


def test_presets_are_listed_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info"])
    assert "edm2-img512-s\n" in capsys.readouterr().out
    main(["info", "edm2-img512-s"])
    out = capsys.readouterr().out
    assert "parameters  280,212,837" in out
    gflops = float(re.search(r"Gflops +(\S+)", out)[1])  # type: ignore[index]
    assert gflops == pytest.approx(101.918, rel=0.005)
    assert "unet.out_gain" in out


@pytest.mark.parametrize("name", [name for name, text in COMMANDS.items() if isinstance(text, dict)])
def test_overview_of_a_group(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([name])
    out = capsys.readouterr().out
    assert out.startswith(f"usage: edm2 {name} COMMAND")
    assert all(word in out and text in out for word, text in COMMANDS[name].items() if word)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("a wrong value: choose another"), 2, "edm2: error: a wrong value: choose another"),
        (FileExistsError("x exists already"), 2, "edm2: error: x exists already"),
        (FileExistsError(17, "File exists", "x"), 2, "x is a file, or is inside one, and a folder is needed"),
        (
            NotADirectoryError(20, "Not a directory", "x"),
            2,
            "x is a file, or is inside one, and a folder is needed",
        ),
        (OSError(28, "No space left on device"), 1, "edm2: error: [Errno 28] No space left on device"),
        (FloatingPointError("loss was NaN"), 1, "edm2: error: loss was NaN"),
        (KeyboardInterrupt(), 1, "edm2: interrupted"),
        (Stopped("stopped at 8 of 16"), 75, "edm2: stopped at 8 of 16"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("edm2.commands.demo.run", fail)
    found, text = ends(["demo"], capsys)
    assert found == code
    assert told in text


def test_one_process_speaks_for_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = iter((FirstFailed("see its own error"), ValueError("a wrong value")))

    def fail(*_: Any) -> None:
        raise next(errors)

    monkeypatch.setattr("edm2.commands.demo.run", fail)
    monkeypatch.setenv("RANK", "3")
    assert ends(["demo"], capsys) == (1, "")
    assert ends(["demo"], capsys) == (2, "edm2: process 3: error: a wrong value\n")


def test_a_file_where_a_folder_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("mine")
    code, text = ends(["train", "--preset", "digits", "--out", str(tmp_path / "notes")], capsys)
    assert code == 2
    assert "and a folder is needed: choose another path" in text
    assert (tmp_path / "notes").read_text() == "mine"


def test_names_from_files_cannot_command_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no \x1b[31mred\nsecond line")

    monkeypatch.setattr("edm2.commands.demo.run", fail)
    assert ends(["demo"], capsys) == (2, "edm2: error: no \\x1b[31mred\nsecond line\n")


def test_everything_shown_goes_through_one_place() -> None:
    package = Path(edm2.__file__).parent
    raw = [
        f"{path.relative_to(package)}:{number}"
        for path in package.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.match(r"\s*(return )?print\(", line) and path.name != "progress.py"
    ]
    assert raw == []  # `show` and `tell` of edm2.progress clean what they print


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edm2.commands.info.run", lambda *_: warnings.warn("look here", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main(["info"])
    assert capsys.readouterr().err == "edm2: warning: look here\n"


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "edm2", "info"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == b""


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_work_is_done_without_a_console(
    closed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "a.png")
    monkeypatch.setattr(sys, closed, None)  # as Python does where the descriptor is closed
    main(["data", "convert", str(tmp_path), "--size", "8", "--out", str(tmp_path / "a.zip")])
    assert (tmp_path / "a.zip").exists()
    assert getattr(sys, closed).name == os.devnull
    getattr(sys, closed).close()


def test_descriptors_of_closed_streams_are_taken() -> None:
    """Else the next file that is opened gets number 1, and what a library writes there lands in it."""
    script = "import os, edm2.cli\nedm2.cli._prepare_streams()\nfor i in range(3): os.fstat(i)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command], timeout=60)
    assert done.returncode == 0


def test_output_in_an_encoding_without_the_character() -> None:
    script = "from edm2.cli import _prepare_streams\n_prepare_streams()\nprint('\u03c3_rel')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    assert done.stdout.strip() == b"\\u03c3_rel"


def test_garbage_is_collected_after_the_first_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(ModuleNotFoundError):
        _imported("edm2.commands.nonsense")
    assert gc.isenabled()
    assert gc.get_freeze_count()
    gc.unfreeze()


@pytest.mark.parametrize(
    ("own", "found"), [({}, "3000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "5"}, "5")]
)
def test_threads_sleep_soon_unless_told_otherwise(
    own: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(own))
    _wait_asleep()
    assert os.environ.get("GOMP_SPINCOUNT") == found
