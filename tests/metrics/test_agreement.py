import numpy as np
import pytest
from sklearn.datasets import load_digits

from edm2.metrics import label_agreement

BUNCH = load_digits()
PIXELS = np.rint(BUNCH.images * (255 / 16)).astype(np.uint8)[:, None]
LABELS = BUNCH.target
TEST = np.arange(len(PIXELS)) % 5 == 0


def test_real_digits_agree():
    assert label_agreement(PIXELS[~TEST], LABELS[~TEST], PIXELS[TEST], LABELS[TEST]) > 0.98


def test_wrong_intentions_and_noise_do_not():
    wrong = (LABELS[TEST] + 1) % 10
    assert label_agreement(PIXELS[~TEST], LABELS[~TEST], PIXELS[TEST], wrong) < 0.02
    noise = np.random.default_rng(0).integers(0, 256, (500, 1, 8, 8), dtype=np.uint8)
    assert label_agreement(PIXELS, LABELS, noise, np.arange(500) % 10) < 0.2


def test_agreement_is_the_share_of_images():
    # Two classes that nobody confuses.
    black, white = np.zeros((4, 1, 2, 2), np.uint8), np.full((4, 1, 2, 2), 255, np.uint8)
    images, labels = np.concatenate([black, white]), np.repeat([0, 1], 4)
    assert label_agreement(images, labels, images, labels) == 1
    assert label_agreement(images, labels, images, np.array([1, 0, 0, 0, 1, 1, 1, 1])) == 7 / 8


def test_errors():
    with pytest.raises(ValueError, match=r"^images must be uint8, not float64"):
        label_agreement(PIXELS, LABELS, PIXELS / 255, LABELS)
    with pytest.raises(ValueError, match="train_images must be uint8"):
        label_agreement(PIXELS / 255, LABELS, PIXELS, LABELS)
    with pytest.raises(ValueError, match="56 features, but SVC is expecting 64 features"):
        label_agreement(PIXELS, LABELS, PIXELS[..., 1:], LABELS)
    with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[1797, 5\]"):
        label_agreement(PIXELS, LABELS[:5], PIXELS, LABELS)
    with pytest.raises(ValueError, match="number of classes has to be greater than one; got 1 class"):
        label_agreement(PIXELS, LABELS * 0, PIXELS, LABELS)
    with pytest.raises(ValueError, match="3 intended_labels for 1797 images"):
        label_agreement(PIXELS, LABELS, PIXELS, LABELS[:3])
    with pytest.raises(ValueError, match="0 intended_labels for 0 images"):
        label_agreement(PIXELS, LABELS, PIXELS[:0], LABELS[:0])
