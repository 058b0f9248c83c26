import numpy as np
import pytest
from sklearn.datasets import load_digits

from edm2.metrics import label_agreement, predict_labels

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


def test_agreement_is_the_share_of_predictions():
    predicted = predict_labels(PIXELS[~TEST], LABELS[~TEST], PIXELS[TEST])
    assert predicted.dtype == np.int64
    half = np.where(np.arange(len(predicted)) < 90, predicted, -1)
    assert label_agreement(PIXELS[~TEST], LABELS[~TEST], PIXELS[TEST], half) == 90 / len(predicted)
    assert predict_labels(PIXELS, LABELS, PIXELS[:0]).shape == (0,)


def test_errors():
    with pytest.raises(ValueError, match="images must be uint8, not float64"):
        predict_labels(PIXELS, LABELS, PIXELS / 255)
    with pytest.raises(ValueError, match="train_images must be uint8"):
        predict_labels(PIXELS / 255, LABELS, PIXELS)
    with pytest.raises(ValueError, match=r"train_images \[1, 8, 8\] and images \[1, 8, 7\] differ in shape"):
        predict_labels(PIXELS, LABELS, PIXELS[..., 1:])
    with pytest.raises(ValueError, match="5 train_labels do not fit 1797 train_images"):
        predict_labels(PIXELS, LABELS[:5], PIXELS)
    with pytest.raises(ValueError, match="at least two classes"):
        predict_labels(PIXELS, LABELS * 0, PIXELS)
    with pytest.raises(ValueError, match="3 intended_labels for 1797 images"):
        label_agreement(PIXELS, LABELS, PIXELS, LABELS[:3])
    with pytest.raises(ValueError, match="0 intended_labels for 0 images"):
        label_agreement(PIXELS, LABELS, PIXELS[:0], LABELS[:0])
