"""Plain checkpoints on disk: which files, of which step, and the tensors in them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from edm2.ema.tracking.wrappers import clean_names

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_NAMED_STEP = re.compile(r"(?:step|iter|iteration|checkpoint|ckpt|epoch)s?[-_=.]*(\d+)", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")
_PART = re.compile(r"-\d+-of-\d+$")
# What trainers (Transformers, Accelerate, ours) put beside a model.
_NO_MODEL = re.compile(
    r"\.|(lr_)?(optim|sched)|scaler|sampler|rng_state|random_states|training_args|power_ema", re.IGNORECASE
)
_NESTED = ("state_dict", "model", "model_state_dict", "module")


def find_checkpoints(
    source: str | Path | Sequence[str | Path] | Mapping[str | Path, float],
) -> dict[float, Path]:
    """Files by step, in order; steps come from names or from the caller, never from file times.

    In a folder, the state of optimisers, schedules and random numbers is passed over, and so are models without a
    step where others lie in folders of their steps (`checkpoint-500/model.safetensors`).

    Args:
        source: A folder, some files, or a mapping from file to step.

    Returns:
        Step -> file.

    Raises:
        ValueError: If there are none, a step cannot be told, or two files have the same.
    """
    if isinstance(source, Mapping):
        pairs = [(float(step), Path(path)) for path, step in source.items()]
    else:
        files = _in_folder(Path(source)) if isinstance(source, str | Path) else [Path(p) for p in source]
        pairs = [(float(_told_step(path)), path) for path in files]
    found: dict[float, Path] = {}
    for step, path in sorted(pairs):
        if step in found:
            raise ValueError(
                f"{found[step]} and {path} both seem to be of step {step:g}: give a mapping from each file to its step"
            )
        found[step] = path
    if not found:
        raise ValueError(
            f"{source} holds no checkpoint: looked for models in files ending in {', '.join(_SUFFIXES)}, there and"
            " one folder below"
        )
    return found


def _in_folder(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder: give a folder of checkpoints, files, or a mapping of files to steps"
        )
    above, below = ([p for p in folder.glob(x) if _is_model(p)] for x in ("*", "*/*"))
    if any(_step(path) is not None for path in below):
        above = [path for path in above if _step(path) is not None]
    return above + below


def _is_model(path: Path) -> bool:
    return path.suffix in _SUFFIXES and not _NO_MODEL.match(path.name) and path.is_file()


def _told_step(path: Path) -> int:
    if _PART.search(path.stem):
        raise ValueError(
            f"{path} is one part of a model in several files, which cannot be read: save each checkpoint as one file"
        )
    step = _step(path)
    if step is None:
        raise ValueError(
            f"the step of {path} cannot be told from its name: give a mapping from each file to its step"
        )
    return step


def _step(path: Path) -> int | None:
    for text in (path.stem, path.parent.name):
        named, numbers = _NAMED_STEP.findall(text), _NUMBER.findall(text)
        if len(named) == 1 or len(numbers) == 1:
            return int((named if len(named) == 1 else numbers)[0])
        if numbers:
            break
    return None


def load_checkpoint(path: Path, key: str | None) -> dict[str, Tensor]:
    """Tensors of a checkpoint by clean name; nothing in it is executed.

    Args:
        path: A safetensors file, or one that torch can load with `weights_only=True`.
        key: Where in it the tensors are; None looks for the usual places.

    Raises:
        ValueError: If it is damaged, refused by torch, or its tensors are not found.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give the paths of checkpoints") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or no checkpoint ({_first_line(error)}): leave it out"
        ) from error
    except Exception as error:
        # torch names every type that it refuses to unpickle in an error of its own, UnpicklingError.
        raise ValueError(
            f"{path} holds more than tensors, and loading it would run code ({_first_line(error)}): save its"
            " weights alone"
        ) from error
    found = {n: x for n, x in _state(content, path, key).items() if isinstance(x, Tensor)}
    names = clean_names(found)
    tensors = {names[n]: x for n, x in found.items()}
    if not tensors:
        raise ValueError(f"{path} holds no tensor")
    return tensors


def _state(content: Any, path: Path, key: str | None) -> Mapping[str, Any]:
    if key is not None:
        if not isinstance(content, Mapping) or not isinstance(content.get(key), Mapping):
            raise ValueError(f"{path} has no tensors under {key!r}: it has {_keys(content)}")
        inner: Mapping[str, Any] = content[key]
        return inner
    if isinstance(content, Mapping):
        nested = [k for k in _NESTED if isinstance(content.get(k), Mapping)]
        if len(nested) == 1:
            return content[nested[0]]  # type: ignore[no-any-return]
        if content and not nested and all(isinstance(v, Tensor) for v in content.values()):
            return content
    raise ValueError(f"{path}: where the weights are is unclear; give key, one of {_keys(content)}")


def _keys(content: Any) -> str:
    return ", ".join(map(repr, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__
