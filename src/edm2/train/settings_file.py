"""Settings of a run in a file: JSON, TOML or YAML, or the folder of a run."""

import contextlib
import dataclasses
import difflib
import importlib
import json
import reprlib
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from edm2.extras import need
from edm2.train.amounts import parse_amount
from edm2.train.config import TrainConfig
from edm2.train.config_groups import OPTION_NAMES
from edm2.train.run_folder import CONFIG_FILE, read_config

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SettingsFile:
    """What a file of settings holds.

    Attributes:
        preset: Name of the preset that the settings start from; None if the file names none.
        values: Settings, nested, under their names in Python.
        is_complete: Whether they come from a run, which stores every setting.
    """

    preset: str | None
    values: dict[str, Any]
    is_complete: bool

    def apply(self, base: TrainConfig) -> TrainConfig:
        """Return the settings `base` with those of the file in their place.

        Raises:
            ValueError: If a value is of the wrong type or out of range.
        """
        return _replaced(base, self.values, "")


def read_settings(path: str | Path) -> SettingsFile:
    """Read settings from a file.

    Args:
        path: A `.json`, `.toml`, `.yaml` or `.yml` file with settings under their names on the command line or in
            Python, and with `preset` if they start from one; or a run, or its `config.json`.

    Raises:
        ValueError: If the file cannot be read, or names a setting that does not exist.

    Example:
        >>> config = read_settings("run.toml").apply(TrainConfig())
    """
    path = Path(path)
    is_run = path.is_dir() or path.name == CONFIG_FILE
    content = read_config(path if path.is_dir() else path.parent)["settings"] if is_run else _parse(path)
    if is_run and "architecture" in content:  # what earlier versions called it
        content["config"] = content.pop("architecture")
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold names and values of settings, such as images = 8Mi")
    preset = content.get("preset")
    if preset is not None and not isinstance(preset, str):
        raise ValueError(f"{path}: preset {reprlib.repr(preset)} must be a name that `edm2 info` lists")
    values = _named({key: value for key, value in content.items() if key != "preset"}, TrainConfig, path, "")
    return SettingsFile(preset=preset or None, values=values, is_complete=is_run)


def run_settings(run: str | Path) -> TrainConfig:
    """Read the settings of a run; those that the edm2 that began it did not have get their defaults.

    Raises:
        ValueError: If the folder is not a run, or its settings are damaged.
    """
    path = Path(run) / CONFIG_FILE
    settings = read_settings(path)
    try:
        return settings.apply(TrainConfig())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it from a copy") from error


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give a text file with settings, or a run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the settings {path} cannot be read ({error}): give a text file, or a run"
        ) from None
    try:
        match path.suffix.lower():
            case ".json":
                return json.loads(text)
            case ".toml":
                if sys.version_info < (3, 11):
                    raise ValueError("TOML needs Python 3.11 or newer: write the settings as JSON or YAML")
                return importlib.import_module("tomllib").loads(text)
            case ".yaml" | ".yml":
                return need("yaml", "settings in YAML", instead=", or write them as JSON or TOML").safe_load(
                    text
                )
    except ModuleNotFoundError:
        raise
    except Exception as error:  # each parser has errors of its own
        raise ValueError(f"{path} cannot be parsed: {error}") from None
    raise ValueError(f"settings {path} must end in .json, .toml, .yaml or .yml")


def _named(content: dict[str, Any], kind: Any, path: Path, prefix: str) -> dict[str, Any]:
    """Give settings their names in Python."""
    kinds = typing.get_type_hints(kind)
    names = {name: name for name in kinds}
    if not prefix:
        names |= {option: name for name, option in OPTION_NAMES.items()}
    found: dict[str, Any] = {}
    for key, value in content.items():
        option = str(key).replace("-", "_")
        name = names.get(option)
        if name is None:
            near = difflib.get_close_matches(option, names, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
            raise ValueError(f"{path} has an unknown setting {prefix}{key}: {hint}")
        if dataclasses.is_dataclass(kinds[name]):
            if not isinstance(value, dict):
                raise ValueError(
                    f"{path}: {prefix}{key} holds settings of its own, not {reprlib.repr(value)}"
                )
            value = _named(value, kinds[name], path, f"{name}.")
        found[name] = value
    return found


def _replaced(base: T, settings: dict[str, Any], prefix: str) -> T:
    kinds = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        if dataclasses.is_dataclass(kinds[name]):
            changes[name] = _replaced(getattr(base, name), value, f"{name}.")
        else:
            try:
                changes[name] = _converted(value, kinds[name])
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"the setting {prefix}{name} is {reprlib.repr(value)}: it must be {error}"
                ) from None
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def _converted(value: Any, kind: Any) -> Any:
    """A value as JSON, TOML or YAML has it, in the type of a setting; else an error that says what it must be."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _replaced(kind(), value, "")  # type: ignore[operator]
    choices = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _converted(value, next(choice for choice in choices if choice is not type(None)))
    if origin is Literal:
        if value not in choices:
            raise ValueError(f"one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        same = choices[-1] is Ellipsis
        if not isinstance(value, list) or not (same or len(value) == len(choices)):
            raise ValueError("a list of numbers" if same else f"a list of {len(choices)} numbers")
        return tuple(_converted(part, choices[0]) for part in value)
    if kind is int and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return parse_amount(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and type(value) in (int, float):
        return float(value)
    if type(value) is not kind:
        names = {
            int: "a whole number, such as 4096, 128Ki or 8Mi",
            float: "a number",
            str: "a text",
            bool: "true or false",
        }
        raise ValueError(names[kind])
    return value
