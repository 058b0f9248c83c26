"""Options that every command takes, and reading single options before the others."""

import dataclasses
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated

import docstring_parser
import torch
import tyro

from edm2.diffusion import register_network

HELP = """every command also takes
  --threads N                      CPU threads; on a busy machine, 1 can be many times faster
  --network-from MODULE:FUNCTION   function that made a model's network, if it is your own
"""


def take_common(name: str, words: list[str]) -> list[str]:
    """Act on the options of every command.

    Args:
        name: Command, such as `edm2 sample`.
        words: What follows it on the command line.

    Returns:
        The other words.

    Raises:
        ValueError: If a value is missing or does not fit.
    """
    threads, words = take_option("--threads", words)
    if threads is not None:
        if not threads.isdecimal() or int(threads) < 1:
            raise ValueError(f"--threads {threads} must be a whole number of at least 1")
        torch.set_num_threads(int(threads))
    function, rest = take_option("--network-from", words)
    if function is not None:
        register_network(function)
    return words if name == "edm2 train" else rest  # where it is a setting of the run


def take_option(option: str, words: list[str]) -> tuple[str | None, list[str]]:
    """The value of an option, None where it is not given, and the other words.

    Raises:
        ValueError: If it is given several times, or without a value.
    """
    found, rest = [], []
    following = iter(words)
    for word in following:
        if word == option:
            value = next(following, None)
            if value is None:
                raise ValueError(f"{option} needs a value")
            found.append(value)
        elif word.startswith(f"{option}="):
            found.append(word.split("=", 1)[1])
        else:
            rest.append(word)
    if len(found) > 1:
        raise ValueError(f"{option} is given {len(found)} times ({', '.join(found)}): give it once")
    return (found[0] if found else None), rest


@contextmanager
def tidy_help(found: Iterable[object]) -> Iterator[None]:
    """Let tyro wrap the descriptions of options, and leave out "(default: None)", which they say in words.

    Tyro would keep the line breaks of docstrings whose lines are indented.

    Args:
        found: Anything; only dataclasses, and those that are types of their fields, are changed.
    """
    classes = list(dict.fromkeys(base for cls in _with_parts(found) for base in reversed(cls.__mro__)))
    classes = [cls for cls in classes if dataclasses.is_dataclass(cls)]
    before = [dict(cls.__annotations__) for cls in classes]
    for cls in classes:
        for param in docstring_parser.parse_from_object(cls).params:
            if param.arg_name in cls.__annotations__ and param.description:
                text = " ".join(param.description.split())
                described = tyro.conf.arg(help=text, help_behavior_hint=_default_hint)
                cls.__annotations__[param.arg_name] = Annotated[
                    cls.__annotations__[param.arg_name], described
                ]
    try:
        yield
    finally:
        for cls, annotations in zip(classes, before, strict=True):
            cls.__annotations__ = annotations


def _with_parts(found: Iterable[object]) -> Iterator[type]:
    for cls in found:
        if isinstance(cls, type) and dataclasses.is_dataclass(cls):
            yield cls
            yield from _with_parts(typing.get_type_hints(cls).values())


def _default_hint(value: str) -> str:
    return f"(default: {value})" if value not in ("", "None") else ""
