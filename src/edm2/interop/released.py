"""The released models and their published settings.

Ref: docs/released_models.md.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edm2.interop.snapshot_folder import SnapshotName, images_of

_SIX = ("xs", "s", "m", "l", "xl", "xxl")
# Thousands of training images of each model in its final state.
_TRAINED = {
    **dict.fromkeys(("img512-xs", "img512-s", "img512-m", "img64-m"), 2147483),
    **dict.fromkeys(("img512-xs-uncond", "img512-s-uncond"), 2147483),
    "img512-l": 1879048, "img512-xl": 1342177, "img512-xxl": 939524,
    "img64-s": 1073741, "img64-l": 1073741, "img64-xl": 671088,
}  # fmt: skip


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


def _released(model: str, sigma_rel: float, thousands: int | None = None) -> SnapshotName:
    images = images_of(_TRAINED[model] if thousands is None else thousands)
    assert images is not None
    return SnapshotName(prefix=f"edm2-{model}", num_images=images, sigma_rel=sigma_rel)


def _plain(
    data: str, sizes: Sequence[str], goal: str, sigma_rels: Sequence[float], reported: Sequence[float]
) -> Iterator[SamplingPreset]:
    for size, sigma_rel, value in zip(sizes, sigma_rels, reported, strict=True):
        yield SamplingPreset(
            name=f"edm2-{data}-{size}-{goal}",
            network=_released(f"{data}-{size}", sigma_rel),
            guide=None,
            guidance=1.0,
            metric=_METRICS[goal],
            reported=value,
        )


def _guided(
    goal: str, sigma_rels: Sequence[float], weights: Sequence[float], reported: Sequence[float]
) -> Iterator[SamplingPreset]:
    """Guided by the smallest unconditional network, at the same EMA length."""
    for size, sigma_rel, weight, value in zip(_SIX, sigma_rels, weights, reported, strict=True):
        yield SamplingPreset(
            name=f"edm2-img512-{size}-guid-{goal}",
            network=_released(f"img512-{size}", sigma_rel),
            guide=_released("img512-xs-uncond", sigma_rel),
            guidance=weight,
            metric=_METRICS[goal],
            reported=value,
        )


def _autoguided(
    model: str,
    guide: tuple[str, int],
    sigma_rels: Sequence[float],
    guide_sigma_rels: Sequence[float],
    weights: Sequence[float],
    reported: Sequence[float],
) -> Iterator[SamplingPreset]:
    """Guided by a smaller network that was trained less, for each of the two goals."""
    rows = zip(("fid", "dino"), sigma_rels, guide_sigma_rels, weights, reported, strict=True)
    for goal, sigma_rel, guide_sigma_rel, weight, value in rows:
        yield SamplingPreset(
            name=f"edm2-{model}-autog-{goal}",
            network=_released(model, sigma_rel),
            guide=_released(guide[0], guide_sigma_rel, guide[1]),
            guidance=weight,
            metric=_METRICS[goal],
            reported=value,
        )


_METRICS = {"fid": "FID", "dino": "FD_DINOv2"}
_ALL: tuple[Iterator[SamplingPreset], ...] = (
    _plain("img512", _SIX, "fid", (0.135, 0.130, 0.100, 0.085, 0.085, 0.070), (3.53, 2.56, 2.25, 2.06, 1.96, 1.91)),
    _plain(
        "img512", _SIX, "dino",
        (0.200, 0.190, 0.155, 0.155, 0.155, 0.150), (103.39, 68.64, 58.44, 52.25, 45.96, 42.84),
    ),
    _plain("img64", ("s", "m", "l", "xl"), "fid", (0.075, 0.060, 0.040, 0.040), (1.58, 1.43, 1.33, 1.33)),
    _guided(
        "fid",
        (0.045, 0.025, 0.030, 0.015, 0.020, 0.015),
        (1.40, 1.40, 1.20, 1.20, 1.20, 1.20),
        (2.91, 2.23, 2.01, 1.88, 1.85, 1.81),
    ),
    _guided(
        "dino",
        (0.150, 0.085, 0.015, 0.035, 0.030, 0.015),
        (1.70, 1.90, 2.00, 1.70, 1.70, 1.70),
        (79.94, 52.32, 41.98, 38.20, 35.67, 33.09),
    ),
    _autoguided("img512-s", ("img512-xs", 134217), (0.070, 0.120), (0.125, 0.165), (2.10, 2.45), (1.34, 36.67)),
    _autoguided("img512-xxl", ("img512-m", 268435), (0.075, 0.130), (0.155, 0.205), (2.05, 2.30), (1.25, 24.18)),
    _autoguided(
        "img512-s-uncond", ("img512-xs-uncond", 134217), (0.070, 0.090), (0.110, 0.125), (2.85, 2.90), (3.86, 90.39),
    ),
    _autoguided("img64-s", ("img64-xs", 134217), (0.045, 0.105), (0.110, 0.175), (1.70, 2.20), (1.01, 31.85)),
)  # fmt: skip

SAMPLING_PRESETS: dict[str, SamplingPreset] = {preset.name: preset for presets in _ALL for preset in presets}
