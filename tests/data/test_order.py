import numpy as np
import pytest

from edm2.data import epoch_order, indices

PINNED = [0, 2, 1, 5, 4, 3, 6, 7]


def test_every_image_once_an_epoch():
    for epoch in range(3):
        assert np.array_equal(np.sort(epoch_order(5, epoch, 101)), np.arange(101))


@pytest.mark.parametrize("batch", [1, 7, 64, 250])
def test_the_order_does_not_depend_on_the_batch_size(batch):
    whole = indices(0, 500, size=101, seed=5)
    parts = [indices(i, min(batch, 500 - i), size=101, seed=5) for i in range(0, 500, batch)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_positions_are_epochs_after_each_other():
    assert np.array_equal(indices(90, 30, size=101, seed=1)[11:], epoch_order(1, 1, 101)[:19])
    assert len(indices(3, 0, size=101, seed=1)) == 0


def test_seed_and_epoch_each_give_another_order():
    orders = [epoch_order(seed, epoch, 1000) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            # Two random orders of 1000 agree in about one place.
            assert np.count_nonzero(a == b) < 10


def test_the_order_is_uniform_over_places():
    first = np.array([epoch_order(seed, 0, 4)[0] for seed in range(2000)])
    assert np.abs(np.bincount(first, minlength=4) - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_the_order_is_pinned_for_ever():
    # Resuming on another release of NumPy must not shuffle anew.
    assert epoch_order(0, 0, 8).tolist() == PINNED


def test_the_global_random_state_is_left_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    epoch_order(123, 4, 50)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_a_cached_order_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 8)[0] = 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 5), r"seed -1 must be in \[0, 2\^64\)"),
        ((0, -1, 5), r"epoch -1 must be in"),
        ((0, 0, 0), "size 0 must be at least 1"),
    ],
)
def test_errors_of_epoch_order(arguments, message):
    with pytest.raises(ValueError, match=message):
        epoch_order(*arguments)


def test_errors_of_indices():
    with pytest.raises(ValueError, match="position_start -1 and count 3 must not be negative"):
        indices(-1, 3, size=5, seed=0)
    with pytest.raises(ValueError, match="size 0 must be at least 1"):
        indices(0, 3, size=0, seed=0)
