import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from edm2.metrics import ClassifierFeatures, FeatureStatistics, fit_classifier, frechet_distance

BUNCH = load_digits()
PIXELS = np.rint(BUNCH.images * (255 / 16)).astype(np.uint8)[:, None]
TEST = np.arange(len(PIXELS)) % 5 == 0
TOY = np.random.default_rng(0).integers(0, 256, (40, 2, 6, 9), dtype=np.uint8)
TOY_LABELS = np.arange(40) % 2


@pytest.fixture(scope="module")
def digits():
    return fit_classifier(PIXELS[~TEST], BUNCH.target[~TEST], num_classes=10)


def toy(**options):
    return fit_classifier(TOY, TOY_LABELS, num_classes=2, num_steps=3, **options)


def test_real_digits_are_told_apart(digits):
    assert (digits.predict(PIXELS[TEST]).numpy() == BUNCH.target[TEST]).mean() >= 0.975


def test_features_are_the_last_layer_but_one(digits):
    features = digits.features(PIXELS[:50])
    assert features.shape == (50, 64)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    # Batch statistics would make an image's features depend on its neighbours.
    assert torch.allclose(digits.features(PIXELS[7:8]), features[7:8], atol=1e-4)
    assert digits.features(PIXELS[:0]).shape == (0, 64)


def test_the_distance_tells_a_set_apart_from_a_worse_one(digits):
    def distance(images, others):
        pair = []
        for part in (images, others):
            pair.append(FeatureStatistics())
            pair[-1].update(digits.features(part))
        return frechet_distance(*pair)

    train, test = PIXELS[~TEST], PIXELS[TEST]
    noise = np.random.default_rng(0).normal(0, 1, test.shape)
    noisy = [np.clip(test + scale * noise, 0, 255).astype(np.uint8) for scale in (0, 20, 60)]
    near, far, farther = (distance(train, images) for images in noisy)
    assert 0 < near < far < farther
    one_class_missing = test[BUNCH.target[TEST] != 3]
    assert distance(train, one_class_missing) > 1.3 * near


def test_the_seed_decides():
    a, b, c = (toy(seed=seed).features(TOY) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c, atol=1e-2)


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    toy()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_thread_setting_neither_matters_nor_changes():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(toy())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    a, b = (network.features(TOY) for network in results)
    assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 17, 32), (4, 1, 5), (2, 3, 3)])
def test_any_shape(shape):
    images = np.random.default_rng(0).integers(0, 256, (12, *shape), dtype=np.uint8)
    network = fit_classifier(images, np.arange(12) % 3, num_classes=5, num_steps=2)
    assert network.features(images).shape == (12, 64)
    assert network.predict(images).shape == (12,)


def test_a_classifier_comes_back_and_is_always_the_same_bytes(tmp_path):
    network = toy()
    for i in range(8):
        network.save(tmp_path / str(i))
    assert len({(tmp_path / str(i)).read_bytes() for i in range(8)}) == 1
    again = ClassifierFeatures.load(tmp_path / "0")
    assert again.sha256 == network.sha256
    assert torch.equal(again.features(TOY), network.features(TOY))


def test_a_damaged_classifier_is_refused(tmp_path):
    network = toy()
    with torch.no_grad():
        network._network.neck.weight[0, 0] = torch.nan
    network.save(tmp_path / "c")
    with pytest.raises(
        ValueError, match=r"is not a classifier .*neck\.weight holds values that are not finite"
    ):
        ClassifierFeatures.load(tmp_path / "c")


def test_a_file_that_claims_a_huge_network_costs_nothing(tmp_path):
    network = toy()
    network._network.settings["width"] = 1 << 18  # some terabytes
    network.save(tmp_path / "c")
    with pytest.raises(ValueError, match=r"(?s)is not a classifier .*size mismatch"):
        ClassifierFeatures.load(tmp_path / "c")


def test_errors():
    with pytest.raises(ValueError, match=r"must be \[N, C, H, W\] uint8, not \[40, 2, 6, 9\] torch\.float32"):
        fit_classifier(TOY.astype(np.float32), TOY_LABELS, num_classes=2)
    with pytest.raises(ValueError, match=r"\[39\] labels do not fit 40 images"):
        fit_classifier(TOY, TOY_LABELS[1:], num_classes=2)
    with pytest.raises(ValueError, match="labels 0 to 1 do not fit num_classes 1"):
        fit_classifier(TOY, TOY_LABELS, num_classes=1)
    with pytest.raises(ValueError, match="labels -1 to 0 do not fit num_classes 2"):
        fit_classifier(TOY, TOY_LABELS - 1, num_classes=2)
    network = toy()
    with pytest.raises(
        ValueError, match=r"trained on \[2, 6, 9\]: score with images of the training set's shape"
    ):
        network.features(PIXELS)
