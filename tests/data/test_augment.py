import math

import pytest
import torch

from edm2.data import AUGMENT_DIM, Augmentation, mirror
from edm2.data.augment import transform

INDEX = torch.arange(4000)


def images(count=64, height=8, width=6):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def label(**entries):
    names = ("flip_x", "flip_y", "scale", "cos", "sin", "along_x", "along_y", "move_x", "move_y")
    return torch.tensor([[entries.get(name, 0.0) for name in names]])


def waves(size=32):
    """A smooth picture, whose values between pixels are known: cos of 1, 2 and 3 half waves over the side."""
    place = (torch.arange(size) + 0.5) / size
    return torch.stack([torch.cos(math.pi * n * place) for n in (1, 2, 3)])


def test_probability_zero_changes_nothing():
    x = images()
    changed, labels = Augmentation(probability=0)(x, INDEX[:64], seed=3)
    assert torch.equal(changed, x)
    assert torch.equal(labels, torch.zeros(64, AUGMENT_DIM))


def test_what_is_drawn_belongs_to_the_position_and_the_seed():
    x, augmentation = images(), Augmentation(probability=0.5)
    whole, labels = augmentation(x, INDEX[:64], seed=3)
    part, part_labels = augmentation(x[40:], INDEX[40:64], seed=3)
    assert torch.equal(labels[40:], part_labels)
    assert torch.allclose(whole[40:], part, atol=1e-6)
    assert not torch.equal(labels, augmentation.labels(INDEX[:64], seed=4))
    assert torch.equal(mirror(x, INDEX[:64], seed=3)[40:], mirror(x[40:], INDEX[40:64], seed=3))


def test_images_without_a_label_are_untouched_to_the_bit():
    x = images(500)
    changed, labels = Augmentation(probability=0.1)(x, INDEX[:500], seed=0)
    still = (labels == 0).all(1)
    assert 100 < still.sum() < 450
    assert torch.equal(changed[still], x[still])
    assert not any(torch.equal(a, b) for a, b in zip(changed[~still], x[~still], strict=True))


def test_every_transformation_happens_as_often_as_wanted():
    labels = Augmentation(probability=0.3).labels(INDEX, seed=0)
    share = (labels != 0).double().mean(0)
    # A flip that is switched on is a fair coin. Four standard errors are 0.03.
    expected = torch.tensor([0.15, 0.15, *[0.3] * 7], dtype=torch.float64)
    assert (share - expected).abs().max() < 0.03
    always = Augmentation(probability=0, always_flip_x=True).labels(INDEX, seed=0)
    assert abs(always[:, 0].mean() - 0.5) < 0.03
    assert not always[:, 1:].any()


def test_transformations_are_independent_and_of_unit_size():
    labels = Augmentation(probability=1).labels(INDEX, seed=0).double()
    assert labels[:, [2, 7, 8]].std(0).sub(1).abs().max() < 0.06
    assert torch.hypot(labels[:, 5], labels[:, 6]).square().mean().sub(1).abs() < 0.12
    assert torch.allclose(
        (labels[:, 3] + 1).square() + labels[:, 4].square(), torch.ones(1).double(), atol=1e-5
    )
    away_from_mean = torch.corrcoef(labels.T).fill_diagonal_(0)
    assert away_from_mean.abs().max() < 0.08


def test_flips_are_exact():
    x = images(1)
    augmentation = Augmentation()
    assert torch.equal(transform(x, label(flip_x=1), augmentation), x.flip(3))
    assert torch.equal(transform(x, label(flip_y=1), augmentation), x.flip(2))
    assert torch.equal(transform(x, label(flip_x=1, flip_y=1), augmentation), x.flip(2, 3))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_are_clockwise(turns):
    x = images(1, 8, 8)
    angle = turns * math.pi / 2
    found = transform(x, label(cos=math.cos(angle) - 1, sin=math.sin(angle)), Augmentation())
    assert torch.allclose(found, x.rot90(-turns, (2, 3)), atol=1e-4)


def test_moves_by_whole_pixels_bring_in_the_mirror_image():
    x = images(1, 8, 8)
    found = transform(
        x, label(move_x=2), Augmentation(translation=0.125)
    )  # 2 * 0.125 * 8 pixels to the right
    assert torch.allclose(found[..., 2:], x[..., :-2], atol=1e-5)
    assert torch.allclose(found[..., :2], x[..., :2].flip(3), atol=1e-5)
    found = transform(x, label(move_y=-1), Augmentation(translation=0.125))
    assert torch.allclose(found[..., :-1, :], x[..., 1:, :], atol=1e-5)


def test_scale_and_stretch_by_closed_forms():
    wave = waves()
    size = wave.shape[1]
    centred = (torch.arange(size) + 0.5) / size - 0.5
    x = (wave[:, None, :] * torch.ones(1, size, 1))[None]  # varies from left to right
    factors = {
        "scale": (label(scale=1), 2**0.2, 2**0.2),
        "along": (label(along_x=1), 2**0.2, 2**-0.2),
        "other end": (label(along_x=-1), 2**0.2, 2**-0.2),
        "across": (label(along_y=1), 2**-0.2, 2**0.2),
    }
    for wanted, wide, high in factors.values():
        for picture, factor in ((x, wide), (x.transpose(2, 3), high)):
            found = transform(picture, wanted, Augmentation())
            found = found if picture is x else found.transpose(2, 3)
            # Cosines of half waves continue by their mirror image beyond the border, as the augmentation does.
            place = centred / factor + 0.5
            expected = torch.stack([torch.cos(math.pi * n * place) for n in (1, 2, 3)])[None, :, None, :]
            assert (
                found - expected
            ).abs().max() < 0.02  # torch's bicubic is off by that on the shortest wave


def test_the_label_tells_transformations_apart():
    x = images(1, 16, 16)
    wanted = [
        label(),
        *(label(**{name: value}) for name in ("scale", "move_x", "move_y") for value in (-1.0, 1.0)),
    ]
    wanted += [
        label(along_x=1),
        label(along_y=1),
        label(along_x=0.7, along_y=0.7),
        label(along_x=0.7, along_y=-0.7),
    ]
    wanted += [label(cos=math.cos(a) - 1, sin=math.sin(a)) for a in (-1.0, 1.0, 3.0)]
    found = [transform(x, one, Augmentation()) for one in wanted]
    for i, one in enumerate(found):
        assert all((one - other).abs().max() > 0.05 for other in found[:i])


def test_mirror_takes_the_share_wanted_and_keeps_the_rest():
    x = torch.tensor([[[[0.0, 1.0]]]]).expand(4000, 1, 1, 2)
    found = mirror(x, INDEX, seed=0)[:, 0, 0, 0]
    assert abs(found.mean() - 0.5) < 0.03
    assert torch.equal(mirror(x, INDEX, seed=0, probability=0), x)
    assert torch.equal(mirror(x, INDEX, seed=0, probability=1), x.flip(3))
    assert mirror(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), INDEX[:4], seed=0).dtype == torch.uint8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 1.5}, r"probability 1.5 must be in \[0, 1\]"),
        ({"scale": 0.5}, "scale 0.5 and stretch .* must be at least 1"),
        ({"stretch": math.inf}, "all finite"),
        ({"translation": -0.1}, "translation -0.1 at least 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


def test_errors_of_use():
    with pytest.raises(ValueError, match=r"takes float images, not torch.uint8: code them first"):
        Augmentation()(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), INDEX[:1], seed=0)
    with pytest.raises(ValueError, match=r"probability -1 must be in \[0, 1\]"):
        mirror(images(1), INDEX[:1], seed=0, probability=-1)
