"""Networks of the user's own: made by a function that the user names, never by a name in a file.

A model file says which function made its network. Opening it does not import that function: a file from elsewhere
could name anything. The user names the function again, with `--network-from` on the command line or
`register_network` in Python.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from edm2.diffusion.denoiser import Denoiser
from edm2.diffusion.uncertainty import LearnedUncertainty
from edm2.nn import get_features

NetworkFunction = Callable[[int | tuple[int, int], int, int], nn.Module]
"""Called as `f(img_resolution, img_channels, label_dim)`; the network is called as `Denoiser` describes."""

_registered: dict[str, NetworkFunction] = {}


class UnregisteredNetworkError(ValueError):
    """A model file names a function that was not registered."""


def register_network(function: NetworkFunction | str) -> str:
    """Allow this process to build networks with a function that model files name.

    Args:
        function: Function of (img_resolution, img_channels, label_dim) that returns a network, or its name as
            `module:function`, which is imported; the working directory is searched first.

    Returns:
        The function's name.

    Raises:
        ValueError: If there is no function of that name.
    """
    if isinstance(function, str):
        name, function = function, _registered.get(function) or _import(function)
    else:
        name = f"{function.__module__}:{function.__qualname__}"
    _registered[name] = function
    return name


def build_own_denoiser(
    img_resolution: int | Sequence[int],
    img_channels: int,
    label_dim: int,
    *,
    network_from: str,
    config: str = "G",
    sigma_data: float = 0.5,
    dtype: torch.dtype | str = torch.float32,
) -> Denoiser:
    """Put the network of a registered function behind the preconditioning.

    Args:
        img_resolution: Side of square images, or (height, width).
        img_channels: Channels of the images.
        label_dim: Number of classes; 0 for an unconditional denoiser.
        network_from: Name of the function, as `register_network` returned it.
        config: Configuration whose learned uncertainty the denoiser has; none for `A`.
        sigma_data: Standard deviation of the data.
        dtype: Precision of the network.

    Raises:
        UnregisteredNetworkError: If the function was not registered.
        ValueError: If it returns something other than a module.
    """
    module, _, function_name = network_from.partition(":")
    function = _registered.get(network_from)
    if function is None and module == "__main__":  # the script of the training run, imported by its name now
        same = [f for name, f in _registered.items() if name.partition(":")[2] == function_name]
        function = same[0] if same else None
    if function is None:
        raise UnregisteredNetworkError(
            f"the network was made by the function {network_from}, which a file cannot make edm2 import: if you know "
            f"it, give --network-from {network_from}, or call edm2.diffusion.register_network with it in Python"
        )
    if not isinstance(img_resolution, int):
        img_resolution = (img_resolution[0], img_resolution[1])
    network = function(img_resolution, img_channels, label_dim)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{network_from} returned a {type(network).__name__}: it must return a torch.nn.Module"
        )
    return Denoiser(
        network,
        sigma_data=sigma_data,
        uncertainty=LearnedUncertainty(config=config) if get_features(config).uncertainty else None,
        dtype=dtype,
        img_resolution=img_resolution,
        img_channels=img_channels,
        label_dim=label_dim,
        options={
            "network_from": network_from,
            "img_resolution": list(img_resolution) if isinstance(img_resolution, tuple) else img_resolution,
            "img_channels": img_channels,
            "label_dim": label_dim,
            "config": config,
            "sigma_data": sigma_data,
        },
    )


def _import(name: str) -> NetworkFunction:
    module, _, path = name.partition(":")
    if not (module and path):
        raise ValueError(f"{name!r} must be MODULE:FUNCTION, such as my_network:make")
    if (
        here := str(Path.cwd())
    ) not in sys.path:  # where the `edm2` script, unlike `python -m`, does not look
        sys.path.insert(0, here)
    found: object
    try:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"the function {name} was not found ({error}): give MODULE:FUNCTION of a module that Python can import "
            "from here"
        ) from error
    if not callable(found):
        raise ValueError(f"{name} is a {type(found).__name__}, not a function")
    return found
