"""`edm2 import`."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from edm2.interop.convert import Imported, import_named, import_path, import_preset
from edm2.interop.licence import NOTICE_FILE, NOTICE_LINE
from edm2.interop.released import SAMPLING_PRESETS, sampling_preset
from edm2.progress import show


@dataclass(kw_only=True)
class _Import:
    """Convert official network pickles, snapshot folders and reference statistics without running anything in them."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None
    """A file, a folder of snapshots, the name of a file to fetch, or the name of a published setting. Default: list
    all published settings."""
    out: Path | None = None
    """Folder for the result. A folder of snapshots becomes this folder."""
    source: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Source of the files: a folder, an http(s) address, or hf://OWNER/NAME on the hub. Default: the environment
    variable EDM2_RELEASED_FROM."""
    sha256: tuple[str, ...] = ()
    """Expected sha256 of each file that is fetched, starting with the network."""
    prefix: str | None = None
    """Training run to choose, if a folder holds snapshots of several."""


def run(prog: str, words: Sequence[str]) -> None:
    """`edm2 import`."""
    chosen = tyro.cli(_Import, prog=prog, args=list(words))
    if chosen.name is None:
        return _print_presets()
    if chosen.out is None:
        raise ValueError(f"where should {chosen.name} go? give --out with a folder")
    for imported in _import(chosen, chosen.name, chosen.out):
        show(
            f"found  {imported.found}\nwrote  {imported.path}"
            if imported.is_new
            else f"kept   {imported.path}"
        )
        if imported.path.suffix == ".json":
            show(f"next   edm2 sample {shlex.quote(str(imported.path))} --out samples")
    notice = chosen.out / NOTICE_FILE
    show(f"{NOTICE_LINE}; see {notice}")


def _import(chosen: _Import, name: str, out: Path) -> list[Imported]:
    if Path(name).exists():
        if chosen.source is not None or chosen.sha256:
            raise ValueError(
                f"{name} is a local file: --from and --sha256 are for files that are fetched by name"
            )
        return [import_path(name, out, prefix=chosen.prefix)]
    if chosen.prefix is not None:
        raise ValueError(f"{name} is not a folder: --prefix chooses one of the training runs in a folder")
    if Path(name).suffix in (".pkl", ".npz"):
        if Path(name).name != name:
            raise ValueError(f"{name} does not exist: give a file that does, or a file's name and --from")
        return import_named(name, out, source=chosen.source, sha256=chosen.sha256)
    try:
        preset = sampling_preset(name)
    except ValueError as error:
        raise ValueError(f"no file or folder is called {name!r}, and {error}") from None
    return import_preset(preset, out, source=chosen.source, sha256=chosen.sha256)


def _print_presets() -> None:
    for preset in SAMPLING_PRESETS.values():
        guide = f"guidance {preset.guidance:.2f} by {preset.guide}" if preset.guide else ""
        show(
            f"{preset.name:<34} {preset.metric:>9} {preset.reported:<6g}  {preset.network!s:<40}  {guide}".rstrip()
        )
