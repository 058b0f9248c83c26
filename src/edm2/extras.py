"""What the optional packages are for, and what to install when one is missing.

The base install brings torch, numpy and safetensors, which is enough for `edm2.ema`, `edm2.nn` and
`edm2.diffusion`. Every other package comes with an extra of pyproject.toml.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Module as it is imported -> the extra that installs it.
EXTRAS = {
    "PIL": "cli",
    "docstring_parser": "cli",
    "jinja2": "cli",
    "matplotlib": "cli",
    "rich": "cli",
    "scipy": "cli",
    "scoringrules": "cli",
    "sklearn": "cli",
    "tyro": "cli",
    "yaml": "cli",
    "datasets": "data",
    "transformers": "metrics",
    "diffusers": "latent",
    "huggingface_hub": "hub",
    "zarr": "science",
    "xarray": "science",
    "h5netcdf": "science",
    "h5py": "science",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "gradio": "studio",
    "tensorboard": "log",
    "trackio": "log",
    "wandb": "log",
    "pynvml": "log",
    "accelerate": "integrations",
    "lightning": "integrations",
    "peft": "integrations",
}
_CALLED = {
    "PIL": "pillow",
    "docstring_parser": "docstring-parser",
    "pynvml": "nvidia-ml-py",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


class MissingExtra(ModuleNotFoundError):
    """A package of an extra is not installed; the message says how to install it."""


def need(module: str, purpose: str = "this", *, instead: str = "") -> Any:
    """Import a module that an extra installs.

    Args:
        module: Dotted name of the module.
        purpose: What needs it; the message starts with this.
        instead: What works without it; the message ends with this.

    Returns:
        The module.

    Raises:
        MissingExtra: If the package is not installed.
    """
    with needed(purpose, instead=instead):
        return importlib.import_module(module)


@contextmanager
def needed(purpose: str = "this", *, instead: str = "") -> Iterator[None]:
    """Answer imports inside the block as `need` does, where they keep their types.

    Args:
        purpose: What needs them; the message starts with this.
        instead: What works without them; the message ends with this.

    Raises:
        MissingExtra: If a package of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        told = advice(error, purpose, instead=instead)
        if told is None or isinstance(error, MissingExtra):
            raise
        raise MissingExtra(told, name=error.name) from error


def advice(error: ModuleNotFoundError, purpose: str = "this", *, instead: str = "") -> str | None:
    """One line that says what to install, or None if the missing module belongs to no extra."""
    if isinstance(error, MissingExtra):
        return str(error)
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    extra = EXTRAS[module]
    return (
        f"{purpose} needs the package '{_CALLED.get(module, module)}', which the extra '{extra}' installs: run "
        f"`pip install -e '.[{extra}]'` in a clone of the repository, or "
        f"`pip install 'edm2[{extra}] @ git+ADDRESS'` with its address{instead}"
    )
