"""Arrays in a safetensors file with one JSON header: the same contents are the same bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from edm2.files import read_json

_KEY = "edm2"  # the only one: safetensors writes several keys in random order


def to_metadata(file_format: str, header: Mapping[str, Any]) -> dict[str, str]:
    """The metadata for `safetensors.*.save` that `read_tensor_file` reads.

    Args:
        file_format: Name and version of the format.
        header: JSON.
    """
    return {_KEY: json.dumps({"format": file_format, **header}, sort_keys=True)}


def read_header(path: str | Path) -> dict[str, Any]:
    """Read the header of a file of any edm2 format; empty for other files."""
    try:
        with safe_open(path, "np") as file:
            header = read_json((file.metadata() or {}).get(_KEY, "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def read_tensor_file(
    path: str | Path, framework: str, file_format: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a header and all tensors.

    Args:
        path: The file.
        framework: "pt" for torch tensors, "np" for arrays.
        file_format: What the header must say.

    Raises:
        ValueError: For a file of another format.
        SafetensorError: For another kind of file.
        TypeError: For numbers that the framework does not have, such as bfloat16 in numpy.
    """
    with safe_open(path, framework) as file:
        header = read_json((file.metadata() or {}).get(_KEY, "null"))
        found = header.get("format") if isinstance(header, dict) else None
        if found != file_format:
            raise ValueError(f"its format is {found!r}, not {file_format!r}")
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
