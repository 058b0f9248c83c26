"""Files in the format of the authors' release: network pickles, snapshots and reference statistics.

Nothing in them is run; see `edm2.interop.pickle_reader`.
"""

import logging
from pathlib import Path

import torch

from edm2.diffusion import Denoiser, build_denoiser
from edm2.interop.licence import NOTICE_LINE
from edm2.interop.network_file import NetworkFile, read_network
from edm2.interop.reference import ReferenceStatistics, read_reference_statistics
from edm2.interop.snapshot_folder import open_snapshots

__all__ = [
    "NetworkFile",
    "ReferenceStatistics",
    "load_network",
    "open_snapshots",
    "read_network",
    "read_reference_statistics",
]

_log = logging.getLogger(__name__)


def load_network(path: str | Path) -> Denoiser:
    """Rebuild the network of an official pickle from its description and its tensors.

    Args:
        path: `.pkl` file of a released network or of a snapshot of the official training code.

    Returns:
        The denoiser in eval mode, float32, without gradients.

    Raises:
        ValueError: If the file holds anything but such a network; nothing in it is run in any case.
    """
    found = read_network(path)
    with torch.device("meta"):
        denoiser = build_denoiser(**found.options)
    denoiser.load_state_dict({name: x.float() for name, x in found.read_tensors().items()}, assign=True)
    _log.warning("%s: %s", path, NOTICE_LINE)
    return denoiser.eval().requires_grad_(False)
