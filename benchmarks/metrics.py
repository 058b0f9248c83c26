"""Speed of metrics on given features: kernel distance beside others, running moments beside one np.cov.

    python benchmarks/metrics.py

The plain formula computes three whole kernel matrices for each subset, in the features' own precision and in float64.
So does torch-fidelity, if it is installed. Ours is float64 throughout. The moments arrive in batches of 50, and are to
be those of np.mean and np.cov on the whole float64 array.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from common import in_turns, machine, options

from edm2.metrics import FeatureStatistics, kernel_distance

try:
    from torch_fidelity.metric_kid import kid_features_to_metric
except ImportError:
    kid_features_to_metric = None


def main() -> None:
    arguments = options(
        __doc__, features=2048, images=5000, subset=1000, subsets=20, moments=10_000, rounds=5
    )
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(arguments.images, arguments.features)).astype(np.float32) for _ in range(2))
    many = rng.normal(size=(arguments.moments, arguments.features)).astype(np.float32)
    print(machine(torch.device("cpu")))
    size, count = arguments.subset, arguments.subsets
    kinds = {"float32": np.float32, "float64": np.float64}
    ways: dict[str, Callable[[], object]] = {
        "edm2": lambda: kernel_distance(a, b, subset_size=size, num_subsets=count)
    }
    for name, kind in kinds.items():
        ways[f"plain formula, {name}"] = partial(plain_distance, a, b, size, count, kind)
    if kid_features_to_metric is not None:
        exact = kernel_distance(a[:size], b[:size], subset_size=size).value
        for name, kind in kinds.items():
            ways[f"torch-fidelity, {name}"] = partial(fidelity, a.astype(kind), b.astype(kind), size, count)
            value = fidelity(a[:size].astype(kind), b[:size].astype(kind), size, 1)
            print(f"{size} images, torch-fidelity, {name}: {value:.9g}, edm2: {exact:.9g}")
    title = f"kernel distance, {count} subsets of {size} images, {arguments.features} features"
    compare(title, ways, arguments.rounds)
    compare(
        f"mean and covariance of {arguments.moments} images, {arguments.features} features",
        {"edm2, batches of 50": lambda: running(many), "np.mean and np.cov": lambda: at_once(many)},
        arguments.rounds,
    )
    difference = np.abs(running(many).cov - at_once(many)[1]).max()
    print(f"largest difference of covariances {difference:.1e}")


def plain_distance(a: np.ndarray, b: np.ndarray, size: int, count: int, dtype: type) -> float:
    """Mean over subsets of the unbiased squared maximum mean discrepancy (arXiv 1801.01401)."""
    rng = np.random.default_rng(0)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    values = []
    for _ in range(count):
        x, y = (f[rng.choice(len(f), size, replace=False)].astype(dtype) for f in (a, b))
        own = [(k.sum() - np.trace(k)) / (size * (size - 1)) for k in (kernel(x, x), kernel(y, y))]
        values.append(sum(own) - 2 * kernel(x, y).mean())
    return float(np.mean(values))


def fidelity(a: np.ndarray, b: np.ndarray, size: int, count: int) -> float:
    """The kernel distance of torch-fidelity."""
    sets = map(torch.from_numpy, (a, b))
    found = kid_features_to_metric(*sets, kid_subsets=count, kid_subset_size=size, verbose=False)
    return found["kernel_inception_distance_mean"]


def running(features: np.ndarray) -> FeatureStatistics:
    """Moments in batches."""
    found = FeatureStatistics()
    for start in range(0, len(features), 50):
        found.update(features[start : start + 50])
    found.cov  # noqa: B018 - the last batches are added when it is asked for
    return found


def at_once(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moments of the whole array."""
    whole = features.astype(np.float64)
    return whole.mean(axis=0), np.cov(whole, rowvar=False)


def compare(title: str, functions: dict, rounds: int) -> None:
    """Print seconds of processor time, and ratios to the first, taken round by round."""
    times = in_turns(functions, torch.device("cpu"), rounds, time.process_time)
    first = next(iter(times.values()))
    print(title)
    for name, seconds in times.items():
        ratio = statistics.median(x / y for x, y in zip(seconds, first, strict=True))
        print(f"  {name:<26} {statistics.median(seconds):>7.2f} s  {ratio:>5.2f} times ours")


if __name__ == "__main__":
    main()
