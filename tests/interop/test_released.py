"""Published settings by name."""

import pytest

from edm2.interop.released import SAMPLING_PRESETS, sampling_preset


def test_rows_of_the_published_table() -> None:
    assert len(SAMPLING_PRESETS) == 36
    for name, network, guide, guidance, metric, value in (
        ("edm2-img512-xs-fid", "edm2-img512-xs-2147483-0.135.pkl", None, 1.0, "FID", 3.53),
        ("edm2-img512-xxl-dino", "edm2-img512-xxl-0939524-0.150.pkl", None, 1.0, "FD_DINOv2", 42.84),
        ("edm2-img64-xl-fid", "edm2-img64-xl-0671088-0.040.pkl", None, 1.0, "FID", 1.33),
        (
            "edm2-img512-l-guid-fid", "edm2-img512-l-1879048-0.015.pkl", "edm2-img512-xs-uncond-2147483-0.015.pkl",
            1.2, "FID", 1.88,
        ),
        (
            "edm2-img512-s-guid-dino", "edm2-img512-s-2147483-0.085.pkl", "edm2-img512-xs-uncond-2147483-0.085.pkl",
            1.9, "FD_DINOv2", 52.32,
        ),
        (
            "edm2-img512-xxl-autog-dino", "edm2-img512-xxl-0939524-0.130.pkl", "edm2-img512-m-0268435-0.205.pkl",
            2.3, "FD_DINOv2", 24.18,
        ),
        (
            "edm2-img512-s-uncond-autog-fid", "edm2-img512-s-uncond-2147483-0.070.pkl",
            "edm2-img512-xs-uncond-0134217-0.110.pkl", 2.85, "FID", 3.86,
        ),
        (
            "edm2-img64-s-autog-fid", "edm2-img64-s-1073741-0.045.pkl", "edm2-img64-xs-0134217-0.110.pkl",
            1.7, "FID", 1.01,
        ),
    ):  # fmt: skip
        preset = sampling_preset(name)
        assert (str(preset.network), preset.guide and str(preset.guide)) == (network, guide)
        assert (preset.guidance, preset.metric, preset.reported) == (guidance, metric, value)


def test_networks_that_are_trained_to_the_end_stand_at_their_preset_count() -> None:
    from edm2.presets import get_preset

    for preset in SAMPLING_PRESETS.values():
        if "uncond" not in preset.name:
            assert preset.network.num_images == get_preset(preset.network.prefix).num_images, preset.name


def test_unknown_names_come_with_near_ones() -> None:
    with pytest.raises(
        ValueError, match=r"no released model is called 'edm2-img512-s-guid': did you mean .*guid-fid"
    ):
        sampling_preset("edm2-img512-s-guid")
    with pytest.raises(ValueError, match="no released model is called 'zzz': there are edm2-img512-xs-fid, "):
        sampling_preset("zzz")
