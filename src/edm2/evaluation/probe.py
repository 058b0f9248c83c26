"""How well a linear classifier reads classes from a network's features, at every block and several noise levels.

Ref: Xiang et al. 2023, denoising diffusion autoencoders (arXiv 2303.09769).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edm2.extras import needed
from edm2.generate import ImageGenerator
from edm2.generate.features import block_names, image_features
from edm2.progress import Progress

NOISE_LEVELS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
_VALIDATION = 0.2
# Inverse strength of the regularisation, scikit-learn's C: everywhere, and those that the best may choose from.
_STRENGTH, _STRENGTHS = 0.1, (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a linear classifier reads at each block and noise level.

    Attributes:
        blocks: Names of the blocks.
        sigmas: Noise levels, in network units.
        validation: `[blocks, sigmas]` accuracy on a fifth of the training images that the classifier was not fitted
            on; it chooses the best.
        block: Block with the best accuracy.
        sigma: Noise level with the best accuracy.
        accuracy: Accuracy on the test images with that block and level, after a fit to all training images.
        num_train: Number of training images.
        num_test: Number of test images.
    """

    blocks: tuple[str, ...]
    sigmas: tuple[float, ...]
    validation: np.ndarray
    block: str
    sigma: float
    accuracy: float
    num_train: int
    num_test: int

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        grid = {b: row.tolist() for b, row in zip(self.blocks, self.validation, strict=True)}
        lists = {"blocks": list(self.blocks), "sigmas": list(self.sigmas), "validation": grid}
        return {**vars(self), **lists}


def run_probe(
    generator: ImageGenerator,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    sigmas: Sequence[float] = NOISE_LEVELS,
    cells: int = 1,
    seed: int = 0,
    quiet: bool = False,
) -> Probe:
    """Fit a linear classifier (logistic regression on standardised features) at every block and noise level.

    Block, noise level and regularisation are chosen on a fifth of the training images; the test images are used once,
    at the end. The network is given no labels.

    Args:
        generator: Model whose features are read.
        train: Stored images `[N, C, H, W]` and their classes `[N]`.
        test: The same, of other images.
        sigmas: Noise levels, in network units.
        cells: Parts of each side of the image over which features are averaged; more of them keep places.
        seed: Seed of the noise and of the choice of the fifth.
        quiet: Whether to show no progress.

    Raises:
        ValueError: If there are fewer than two classes, too few images, or the network has no blocks.
    """
    images, labels = train
    _check(labels, test[1], sigmas)
    names = block_names(generator.denoiser)
    held = np.zeros(len(images), bool)
    held[np.random.default_rng(seed).permutation(len(images))[: max(1, round(_VALIDATION * len(images)))]] = (
        True
    )
    grid = np.zeros((len(names), len(sigmas)))
    chosen, block, sigma_best = np.empty(0), names[0], sigmas[0]
    with Progress("probing", len(names) * len(sigmas), "classifiers", quiet=quiet) as progress:
        for j, sigma in enumerate(sigmas):
            found = image_features(
                generator.denoiser, generator.coding, images, sigma, names, cells=cells, seed=seed
            )
            for i, name in enumerate(names):
                grid[i, j] = _score(found[name], labels, held, _STRENGTH)
                if grid[i, j] == grid.max():
                    chosen, block, sigma_best = found[name], name, sigma
                progress.advance(1, best=100 * grid.max())
    strength = max(_STRENGTHS, key=lambda value: _score(chosen, labels, held, value))
    fit, unseen = (
        image_features(
            generator.denoiser, generator.coding, some, sigma_best, [block], cells=cells, seed=seed + k
        )[block]
        for k, some in enumerate((images, test[0]))
    )
    accuracy = float((fit_linear(fit, labels, strength)(unseen) == test[1]).mean())
    return Probe(
        blocks=tuple(names),
        sigmas=tuple(sigmas),
        validation=grid,
        block=block,
        sigma=sigma_best,
        accuracy=accuracy,
        num_train=len(images),
        num_test=len(test[0]),
    )


def _score(features: np.ndarray, labels: np.ndarray, held: np.ndarray, strength: float) -> float:
    classify = fit_linear(features[~held], labels[~held], strength)
    return float((classify(features[held]) == labels[held]).mean())


def fit_linear(
    features: np.ndarray, labels: np.ndarray, strength: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Logistic regression on standardised features; returns a function from features to classes."""
    with needed("a probe"):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the accuracy settles long before
        model.fit(features, labels)
    return lambda x: np.asarray(model.predict(x))


def _check(labels: np.ndarray, test_labels: np.ndarray, sigmas: Sequence[float]) -> None:
    if len(np.unique(labels)) < 2:
        raise ValueError("a probe reads classes, and these images have fewer than two: give data with labels")
    if len(labels) < 10 or not len(test_labels):
        raise ValueError(f"{len(labels)} training and {len(test_labels)} test images are too few for a probe")
    if not sigmas:
        raise ValueError("no noise level was given: give at least one")
