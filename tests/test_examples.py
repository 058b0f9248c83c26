"""The notebook of the first hour runs from top to bottom, with small arguments."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "first_hour.ipynb"


def test_the_first_hour_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: str(tmp_path))
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # outputs would make every run a change of the file
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert {"images", "num_seeds", "num_steps"} <= names.keys()
                names |= {"images": 640, "num_seeds": 6, "num_steps": 2}
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert names["averaged"] < names["raw"]
    assert "images of (1, 8, 8), 10 classes" in capsys.readouterr().out
