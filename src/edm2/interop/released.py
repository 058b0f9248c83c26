"""The released models and their published settings.

Ref: docs/released_models.md.
"""

import difflib
from dataclasses import dataclass

from edm2.interop.snapshot_folder import SnapshotName, parse_name


@dataclass(frozen=True, kw_only=True)
class SamplingPreset:
    """A released network with the settings of a published result.

    Attributes:
        name: What `edm2 import` calls it.
        network: The network; its text is the name of its file.
        guide: The network that guides it, if any.
        guidance: Guidance weight; 1 without a guide.
        metric: FID, or FD on DINOv2 features.
        reported: Its published value over 50,000 images.
    """

    name: str
    network: SnapshotName
    guide: SnapshotName | None
    guidance: float
    metric: str
    reported: float


def sampling_preset(name: str) -> SamplingPreset:
    """A published setting by name.

    Args:
        name: Such as `edm2-img512-s-guid-fid`.

    Raises:
        ValueError: For a name that is not in `SAMPLING_PRESETS`.
    """
    if name not in SAMPLING_PRESETS:
        near = difflib.get_close_matches(name, SAMPLING_PRESETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(SAMPLING_PRESETS)}"
        raise ValueError(f"no released model is called {name!r}: {hint}")
    return SAMPLING_PRESETS[name]


def _network(name: str) -> SnapshotName:
    parsed = parse_name(f"edm2-{name}.pkl")
    assert parsed is not None
    return parsed


# Name, network, guide, guidance weight, published value.
_ROWS: tuple[tuple[str, str, str | None, float, float], ...] = (
    ("img512-xs-fid", "img512-xs-2147483-0.135", None, 1.00, 3.53),
    ("img512-s-fid", "img512-s-2147483-0.130", None, 1.00, 2.56),
    ("img512-m-fid", "img512-m-2147483-0.100", None, 1.00, 2.25),
    ("img512-l-fid", "img512-l-1879048-0.085", None, 1.00, 2.06),
    ("img512-xl-fid", "img512-xl-1342177-0.085", None, 1.00, 1.96),
    ("img512-xxl-fid", "img512-xxl-0939524-0.070", None, 1.00, 1.91),
    ("img512-xs-dino", "img512-xs-2147483-0.200", None, 1.00, 103.39),
    ("img512-s-dino", "img512-s-2147483-0.190", None, 1.00, 68.64),
    ("img512-m-dino", "img512-m-2147483-0.155", None, 1.00, 58.44),
    ("img512-l-dino", "img512-l-1879048-0.155", None, 1.00, 52.25),
    ("img512-xl-dino", "img512-xl-1342177-0.155", None, 1.00, 45.96),
    ("img512-xxl-dino", "img512-xxl-0939524-0.150", None, 1.00, 42.84),
    ("img64-s-fid", "img64-s-1073741-0.075", None, 1.00, 1.58),
    ("img64-m-fid", "img64-m-2147483-0.060", None, 1.00, 1.43),
    ("img64-l-fid", "img64-l-1073741-0.040", None, 1.00, 1.33),
    ("img64-xl-fid", "img64-xl-0671088-0.040", None, 1.00, 1.33),
    ("img512-xs-guid-fid", "img512-xs-2147483-0.045", "img512-xs-uncond-2147483-0.045", 1.40, 2.91),
    ("img512-s-guid-fid", "img512-s-2147483-0.025", "img512-xs-uncond-2147483-0.025", 1.40, 2.23),
    ("img512-m-guid-fid", "img512-m-2147483-0.030", "img512-xs-uncond-2147483-0.030", 1.20, 2.01),
    ("img512-l-guid-fid", "img512-l-1879048-0.015", "img512-xs-uncond-2147483-0.015", 1.20, 1.88),
    ("img512-xl-guid-fid", "img512-xl-1342177-0.020", "img512-xs-uncond-2147483-0.020", 1.20, 1.85),
    ("img512-xxl-guid-fid", "img512-xxl-0939524-0.015", "img512-xs-uncond-2147483-0.015", 1.20, 1.81),
    ("img512-xs-guid-dino", "img512-xs-2147483-0.150", "img512-xs-uncond-2147483-0.150", 1.70, 79.94),
    ("img512-s-guid-dino", "img512-s-2147483-0.085", "img512-xs-uncond-2147483-0.085", 1.90, 52.32),
    ("img512-m-guid-dino", "img512-m-2147483-0.015", "img512-xs-uncond-2147483-0.015", 2.00, 41.98),
    ("img512-l-guid-dino", "img512-l-1879048-0.035", "img512-xs-uncond-2147483-0.035", 1.70, 38.2),
    ("img512-xl-guid-dino", "img512-xl-1342177-0.030", "img512-xs-uncond-2147483-0.030", 1.70, 35.67),
    ("img512-xxl-guid-dino", "img512-xxl-0939524-0.015", "img512-xs-uncond-2147483-0.015", 1.70, 33.09),
    ("img512-s-autog-fid", "img512-s-2147483-0.070", "img512-xs-0134217-0.125", 2.10, 1.34),
    ("img512-s-autog-dino", "img512-s-2147483-0.120", "img512-xs-0134217-0.165", 2.45, 36.67),
    ("img512-xxl-autog-fid", "img512-xxl-0939524-0.075", "img512-m-0268435-0.155", 2.05, 1.25),
    ("img512-xxl-autog-dino", "img512-xxl-0939524-0.130", "img512-m-0268435-0.205", 2.30, 24.18),
    ("img512-s-uncond-autog-fid", "img512-s-uncond-2147483-0.070", "img512-xs-uncond-0134217-0.110", 2.85, 3.86),
    ("img512-s-uncond-autog-dino", "img512-s-uncond-2147483-0.090", "img512-xs-uncond-0134217-0.125", 2.90, 90.39),
    ("img64-s-autog-fid", "img64-s-1073741-0.045", "img64-xs-0134217-0.110", 1.70, 1.01),
    ("img64-s-autog-dino", "img64-s-1073741-0.105", "img64-xs-0134217-0.175", 2.20, 31.85),
)  # fmt: skip

SAMPLING_PRESETS: dict[str, SamplingPreset] = {
    f"edm2-{name}": SamplingPreset(
        name=f"edm2-{name}",
        network=_network(network),
        guide=None if guide is None else _network(guide),
        guidance=weight,
        metric="FID" if name.endswith("fid") else "FD_DINOv2",
        reported=value,
    )
    for name, network, guide, weight, value in _ROWS
}
