"""`edm2 studio`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from edm2.progress import show, tell
from edm2.studio.workbench import Workbench
from edm2.train.build import pick_device

_DEMO = Path("runs/demo/run")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(kw_only=True)
class _Studio:
    """Open a page in the browser on which a run's images change with EMA length, guide, weight, interval and sampler.

    The page is visible only from this machine, unless you give another --host. Nothing outside the run is served, and
    nothing is sent anywhere. Stop it with Ctrl-C.
    """

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of a run, finished or under way. Default: that of the demo, runs/demo/run."""
    guide: Path | None = None
    """Another model to offer as guide: a file or a run."""
    vae: str | None = None
    """AutoencoderKL that decodes a latent model's latents: a name on the hub, or a folder.
    Default: stabilityai/sd-vae-ft-mse."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 shows the page to everyone who can reach this machine."""
    port: int | None = None
    """Port. Default: the first free one from 7860."""


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 studio`."""
    chosen = tyro.cli(_Studio, prog=prog, args=list(words))
    if chosen.port is not None and not 1 <= chosen.port <= 65535:
        raise ValueError(f"--port {chosen.port} must be from 1 to 65535")
    if chosen.run is None and not _DEMO.is_dir():
        raise ValueError(
            f"which run? there is no demo in {_DEMO}: name a run's folder, or run `edm2 demo` first"
        )
    from edm2.studio.page import build, serve

    bench = Workbench(chosen.run or _DEMO, chosen.guide, vae=chosen.vae, device=pick_device(chosen.device))
    alone = chosen.host in _LOOPBACK
    told = (
        "This page is visible only from this machine."
        if alone
        else "Everyone who can reach this machine sees this page."
    )
    page = build(bench, may_save=alone, told=told)
    try:
        address = serve(page, host=chosen.host, port=chosen.port, wait=False)
    except OSError as error:
        wanted = "no --port" if chosen.port is None else f"--port {chosen.port}"
        raise ValueError(
            f"--host {chosen.host} and {wanted} cannot be listened on ({error}): choose another port or host"
        ) from error
    show(f"{bench.run}, {bench.status}: {address}")
    tell(
        "edm2: visible only from this machine; stop with Ctrl-C" if alone else f"edm2: {told} Saving is off."
    )
    page.block_thread()
