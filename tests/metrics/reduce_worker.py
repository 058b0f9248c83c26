"""One of several processes: sees its share of the features, then all hold the statistics of the whole."""

import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from edm2.metrics import CallableFeatures, FeatureStatistics, measure


def main(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    features = np.random.default_rng(0).normal(size=(50, 6)) + 1000
    whole = FeatureStatistics()
    whole.update(features)
    # The last process sees nothing, as where there are more processes than batches.
    shares = [features[:13], features[13:], features[:0]]
    mine = FeatureStatistics()
    mine.update(shares[rank])
    mine.all_reduce()
    assert mine.num_images == 50
    assert np.allclose(mine.mean, whole.mean, rtol=1e-14)
    assert np.allclose(mine.cov, whole.cov, rtol=1e-10, atol=1e-12)
    first = torch.from_numpy(mine.cov)
    dist.broadcast(first, 0)
    assert np.array_equal(first.numpy(), mine.cov)
    check_measure(rank, shares)
    other = FeatureStatistics()
    other.update(np.zeros((3, 2 + rank)))
    with pytest.raises(ValueError, match="cannot mix 2 and 3 features"):
        other.all_reduce()
    dist.destroy_process_group()


def check_measure(rank: int, shares: list[np.ndarray]) -> None:
    """Images whose one feature is the pixel: what is kept comes back in the order of the ranks."""
    pixel = CallableFeatures(lambda x: x.flatten(1).float(), name="pixel", num_features=1)
    starts = np.cumsum([0, *map(len, shares)])
    indices = np.arange(starts[rank], starts[rank + 1])
    images = indices.astype(np.uint8)[:, None, None, None]
    found = measure(pixel, [(indices, images)] if len(indices) else [], rows=np.array([2, 12, 13, 49]))
    assert found.features is not None
    assert found.features[:, 0].tolist() == [2, 12, 13, 49]
    assert found.statistics.num_images == 50
    assert np.isclose(found.statistics.mean[0], 24.5)


main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
