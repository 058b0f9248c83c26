"""What pictures need before a network can learn from them, with the command that does it."""

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from edm2.data.files import read_headers
from edm2.data.prepare.survey import Survey
from edm2.data.sources import DatasetStorage, open_catalog
from edm2.train.build import pick_device

_USUAL_SIDE = {"cpu": 32, "cuda": 64}  # what trains in minutes on a CPU, and in hours on a GPU
_SMALLEST = 8
_CLEAR = ("LA", "RGBA")


def check_pictures(source: str, *, labels: bool = True, device: str = "auto") -> None:
    """Refuse images of different sizes or with transparent parts, naming the command that fixes both.

    Args:
        source: Training images, as in `edm2.data.open_dataset`. Arrays and built-in sets pass.
        labels: Whether to read labels.
        device: Where training will be; the size that is named suits it.

    Raises:
        ValueError: If pictures have different sizes or transparent parts, or as in `edm2.data.open_dataset`.
    """
    catalog = open_catalog(source, labels=labels)
    if isinstance(catalog.storage, DatasetStorage):  # already of one size
        return
    headers, _ = read_headers(catalog)
    sizes = Counter((h.height, h.width) for h in headers.values())
    clear = sum(h.mode in _CLEAR for h in headers.values())
    found = []
    if len(sizes) > 1:
        (height, width), count = sizes.most_common(1)[0]
        found.append(f"{len(sizes):,} different sizes (most often {height}x{width}, {count:,} times)")
    if clear:
        found.append(f"transparency in {clear:,} of {len(headers):,} pictures")
    if found:
        raise ValueError(
            f"{source} has {' and '.join(found)}. This command brings the images to one size"
            + (" and lays them on a colour (any name, or #rrggbb)" if clear else "")
            + f":\n  edm2 {mending_words(source, sizes, clear=clear > 0, device=device)}"
        )


def mending_words(
    source: str, sizes: Mapping[tuple[int, int], int], *, clear: bool, device: str = "auto"
) -> str:
    """The words after `edm2` that bring pictures to one size, enlarging none, and lay transparent ones on white.

    Args:
        source: The pictures.
        sizes: (height, width) of each.
        clear: Whether some are transparent.
        device: Where training will be; the size suits it.
    """
    side = max(
        _SMALLEST, min([*map(min, sizes), _USUAL_SIDE.get(pick_device(device).type, _USUAL_SIDE["cpu"])])
    )
    side -= side % 4
    out = f"{Path(source).name.removesuffix('.zip')}-{side}.zip"
    words = f"data convert {shlex.quote(source)} --out {shlex.quote(out)} --size {side}"
    return f"{words} --background white" if clear else words


def words_for(found: Survey) -> str | None:
    """The same for a survey; None if the pictures need nothing."""
    clear = any(found.modes[mode] for mode in _CLEAR)
    return mending_words(found.where, found.sizes, clear=clear) if clear or len(found.sizes) > 1 else None
