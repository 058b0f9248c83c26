import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from edm2.data import (
    ArrayDataset,
    Batches,
    PairedDataset,
    Subset,
    TransformedDataset,
    indices,
    open_dataset,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (23, 2, 4, 3), dtype=np.uint8)
DATA = ArrayDataset(IMAGES, np.arange(23) % 5)


class Slow(ArrayDataset):
    """Images that take different times to read."""

    decodes = True

    def images(self, indices):
        time.sleep(0.02 * (indices[0] % 3))
        return super().images(indices)


@pytest.fixture
def folder(tmp_path):
    for i, image in enumerate(IMAGES):
        Image.fromarray(image[0]).save(tmp_path / f"{i:02d}.png")
    return tmp_path


def numbers(batches):
    """Positions and image numbers of what is left, checked against the data."""
    found = []
    for position, images, labels, *_ in batches:
        chosen = indices(position, len(images), size=23, seed=7)
        assert np.array_equal(images.numpy(), IMAGES[chosen])
        assert labels.tolist() == (chosen % 5).tolist()
        found.append((position, chosen.tolist()))
    return found


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_do_not_change_what_comes_when(workers):
    with Batches(DATA, 8, seed=7, stop=64, workers=workers) as batches:
        assert [position for position, _ in numbers(batches)] == list(range(0, 64, 8))
        with pytest.raises(StopIteration):
            next(batches)


def test_slow_reads_do_not_change_the_order():
    with Batches(Slow(IMAGES, np.arange(23) % 5), 4, seed=7, stop=80, workers=4) as batches:
        assert [position for position, _ in numbers(batches)] == list(range(0, 80, 4))


@pytest.mark.parametrize(("file", "threads"), [("images.npy", 1), ("", 3)])
def test_arrays_get_one_thread_and_pictures_all(folder, file, threads):
    if file:
        np.save(folder / file, IMAGES)
    data = open_dataset(str(folder / file))
    for one in (data, Subset(data, np.arange(20)), PairedDataset(DATA, data)):
        with Batches(one, 4, seed=7, workers=3) as batches:
            next(batches)
            assert sum(t.name.startswith("edm2-loader") for t in threading.enumerate()) == threads
    assert TransformedDataset(data, lambda image, condition, random: (image, condition), tag="x").decodes


def test_a_later_start_continues_the_same_run():
    with Batches(DATA, 8, seed=7, stop=80) as batches:
        whole = numbers(batches)
    with Batches(DATA, 8, seed=7, start=32, stop=80, workers=1) as batches:
        assert numbers(batches) == whole[4:]


@pytest.mark.parametrize("microbatch", [None, 1, 2])
def test_shares_and_pieces_make_up_the_step(microbatch):
    shares = []
    for rank in range(3):
        with Batches(DATA, 12, seed=7, stop=36, microbatch=microbatch, rank=rank, world_size=3) as batches:
            found = numbers(batches)
        assert found[0][0] == 4 * rank
        shares.append(np.concatenate([chosen for _, chosen in found]).reshape(3, 4))
    assert np.concatenate(shares, axis=1).ravel().tolist() == indices(0, 36, size=23, seed=7).tolist()


def test_the_last_step_is_whole_and_no_stop_is_endless():
    with Batches(DATA, 8, seed=7, stop=17) as batches:
        assert len(numbers(batches)) == 3
    with Batches(DATA, 8, seed=7) as batches:
        assert [next(batches).position for _ in range(20)][-1] == 152


def test_images_without_labels_and_floats():
    data = ArrayDataset(IMAGES.astype(np.float32))
    with Batches(data, 4, seed=0) as batches:
        batch = next(batches)
    assert batch.labels is None
    assert batch.images.dtype == torch.float32


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_names_the_file_and_ends_the_workers(folder, workers):
    data = open_dataset(folder)
    chosen = indices(0, 23, size=23, seed=0)
    bad = folder / f"{chosen[9]:02d}.png"
    bad.write_bytes(b"x")
    before = threading.active_count()
    batches = Batches(data, 4, seed=0, workers=workers)
    assert [next(batches).position for _ in range(2)] == [0, 4]
    with pytest.raises(ValueError, match=f"image '{bad.name}' in .* cannot be read"):
        next(batches)
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="these batches are closed"):
        next(batches)


def test_closing_early_ends_the_threads():
    before = threading.active_count()
    with Batches(DATA, 8, seed=0, workers=3) as batches:
        next(batches)
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_the_time_spent_waiting_is_counted():
    class Slow(ArrayDataset):
        def images(self, indices):
            time.sleep(0.05)
            return super().images(indices)

    with Batches(Slow(IMAGES), 8, seed=0, workers=0) as batches:
        next(batches)
        next(batches)
        assert batches.wait_seconds >= 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_memory_is_pinned_for_cuda():
    with Batches(DATA, 8, seed=0) as batches:
        batch = next(batches)
    assert batch.images.is_pinned()
    assert batch.labels.is_pinned()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size 0 must be a positive multiple of world_size 1"),
        ({"world_size": 3}, "batch_size 8 must be a positive multiple of world_size 3"),
        ({"world_size": 2, "rank": 2}, r"rank 2 must be in \[0, 2\)"),
        ({"microbatch": 3}, "microbatch 3 must be a divisor of the 8 images of a process"),
        ({"start": -1}, "start -1 and workers 2 must not be negative"),
        ({"workers": -1}, "start 0 and workers -1 must not be negative"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(DATA, **{"batch_size": 8, "seed": 0, **arguments})
