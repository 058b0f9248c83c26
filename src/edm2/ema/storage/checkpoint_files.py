"""Plain checkpoints on disk: which files or folders, of which step, and the tensors in them."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edm2.ema.storage.shards import DISTRIBUTED, INDEX_SUFFIX, StoredModel, open_model, write_safetensors
from edm2.ema.storage.tensorfile import TensorSpec
from edm2.ema.tracking.wrappers import clean_names

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_STEP = re.compile(r"(?:step|iter|iteration|checkpoint|ckpt)[-_=.]*(\d+)", re.IGNORECASE)
_EPOCH = re.compile(r"epoch[-_=.]*(\d+)", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")
_PART = re.compile(r"-\d+-of-\d+$")
# What trainers (Transformers, Accelerate, ours) store with a model.
_NO_MODEL = re.compile(
    r"\.|(lr_)?(optim|sched)|scaler|sampler|rng_state|random_states|training_args|trainer_state|power_ema",
    re.IGNORECASE,
)
_NESTED = ("state_dict", "model", "model_state_dict", "module")


def find_checkpoints(
    source: str | Path | Sequence[str | Path] | Mapping[str | Path, float],
) -> dict[float, Path]:
    """Files by step, in order; steps come from names or from the caller, never from file times.

    In a folder, the state of optimisers, schedules and random numbers is left out, and so are models without a step
    where others lie in folders of their steps (`checkpoint-500/model.safetensors`). A folder with an index of shards,
    or one of `torch.distributed.checkpoint`, is one checkpoint.

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
            f"{folder} is not a folder: give a folder of checkpoints, files, or a mapping of files to steps"
        )
    if is_sharded(folder):
        return [folder]
    above, below = _models(folder.glob("*")), _models(folder.glob("*/*"))
    below = [path for path in below if path.parent not in above]
    if any(_step(path) is not None for path in below):
        above = [path for path in above if path.is_dir() or _step(path) is not None]
    return above + below


def _models(paths: Iterable[Path]) -> list[Path]:
    named = [path for path in paths if not _NO_MODEL.match(path.name)]
    return [
        path for path in named if is_sharded(path) or (path.is_file() and path.suffix.lower() in _SUFFIXES)
    ]


def is_sharded(folder: Path) -> bool:
    """Whether a folder is one model in several files."""
    return folder.is_dir() and ((folder / DISTRIBUTED).is_file() or any(folder.glob(f"*{INDEX_SUFFIX}")))


def _told_step(path: Path) -> int:
    if _PART.search(path.stem):
        raise ValueError(
            f"{path} is one part of a model in several files, and its index ({INDEX_SUFFIX[1:]}) is not next to it:"
            " give the folder of a whole model"
        )
    step = _step(path)
    if step is None:
        raise ValueError(
            f"the step of {path} cannot be read from its name: give a mapping from each file to its step, without"
            " the files to leave out"
        )
    return step


def _step(path: Path) -> int | None:
    """The step in a name or its folder's: `step 400` counts before `epoch 4`, and that before a bare number."""
    texts = (path.name if path.is_dir() else path.stem, path.parent.name)
    for pattern in (_STEP, _EPOCH):
        named = {int(number) for text in texts for number in pattern.findall(text)}
        if named:
            return named.pop() if len(named) == 1 else None
    for text in texts:
        numbers = _NUMBER.findall(text)
        if numbers:
            return int(numbers[0]) if len(numbers) == 1 else None
    return None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose tensors are read one at a time.

    Attributes:
        path: File or folder.
        model: Its tensors under their stored names.
        stored: Name without the traces of wrappers -> stored name.
    """

    path: Path
    model: StoredModel
    stored: dict[str, str]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Type and shape of each tensor, by clean name."""
        return {name: self.model.specs[stored] for name, stored in self.stored.items()}

    def read(self, name: str) -> Tensor:
        """One tensor by its clean name, on the CPU."""
        return self.model.read(self.stored[name])


def open_checkpoint(path: Path, key: str | None) -> Checkpoint:
    """Open a checkpoint by clean names; nothing in it is executed.

    Args:
        path: A safetensors file, a file that torch can load with `weights_only=True`, or a folder of shards.
        key: Where in it the tensors are; None looks for the usual places.

    Raises:
        ValueError: If it is damaged, refused by torch, or its tensors are not found.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: give the paths of checkpoints")
    try:
        model = open_model(path) or _TorchModel(path, key)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): leave it out") from error
    names = [*model.specs]
    prefix = _prefix(model, key) if path.is_dir() else ""
    clean = clean_names(n.removeprefix(prefix) for n in names if n.startswith(prefix))
    if not clean:
        raise ValueError(f"{path} holds no tensor" + (f" under {key!r}" if key else ""))
    return Checkpoint(path=path, model=model, stored={new: prefix + old for old, new in clean.items()})


def _prefix(model: StoredModel, key: str | None) -> str:
    """Where the weights are in a folder that holds the optimiser's state too."""
    tops = {name.partition(".")[0] for name in model.specs}
    nested = [k for k in _NESTED if k in tops] if key is None else [key]
    beside = any(_NO_MODEL.match(top) for top in tops)
    return f"{nested[0]}." if len(nested) == 1 and (beside or key is not None) else ""


class _TorchModel(StoredModel):
    """A file of torch.save."""

    def __init__(self, path: Path, key: str | None) -> None:
        self.path = path
        found = _state(_load(path), path, key)
        self._values = {name: x for name, x in found.items() if isinstance(x, Tensor)}
        self.specs = {
            n: TensorSpec(name=n, dtype=x.dtype, shape=tuple(x.shape)) for n, x in self._values.items()
        }

    def read(self, name: str) -> Tensor:
        return self._values[name]

    def write_like(self, folder: Path, order: Callable[[str], Tensor]) -> list[Path]:
        path = folder / f"{self.path.stem}.safetensors"
        return [write_safetensors(path, self.specs, order, {"format": "pt"})]


def _load(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's format before 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not a checkpoint ({_first_line(error)}): leave it out"
        ) from error
    except Exception as error:
        # torch names every type that it refuses to unpickle in an error of its own, UnpicklingError.
        raise ValueError(
            f"{path} holds more than tensors, and loading it would run code ({_first_line(error)}): save its"
            " weights alone"
        ) from error


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
    raise ValueError(f"{path}: it is unclear where the weights are; give key, one of {_keys(content)}")


def _keys(content: Any) -> str:
    return ", ".join(map(repr, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__
