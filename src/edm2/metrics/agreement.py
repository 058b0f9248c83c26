"""Whether generated images show the class that was asked for, judged by a classifier of another kind.

The judge is a support-vector machine on the pixels, fitted on real images: it shares neither architecture
nor training with the network that makes the Frechet features.
"""

import numpy as np

from edm2.extras import needed

_COST = 10.0  # of a violated margin


def label_agreement(
    train_images: np.ndarray, train_labels: np.ndarray, images: np.ndarray, intended_labels: np.ndarray
) -> float:
    """Share of images whose class is the intended one, by a support-vector classifier with a radial kernel.

    Fitting it takes milliseconds for the 1,438 training digits and grows with the square of their number:
    give some thousands of training images at most.

    Args:
        train_images: `[N, ...]` uint8, real.
        train_labels: `[N]` integers, at least two classes.
        images: `[M, ...]` uint8 of the same shape, to be judged; at least one.
        intended_labels: `[M]` integers.

    Returns:
        In [0, 1].

    Raises:
        ValueError: If images are not uint8, shapes or numbers differ, or there is a single class.
    """
    with needed("this measure"):
        from sklearn.svm import SVC

    for name, array in (("train_images", train_images), ("images", images)):
        if array.dtype != np.uint8:
            raise ValueError(f"{name} must be uint8, not {array.dtype}")
    if len(images) != len(intended_labels) or len(images) == 0:
        raise ValueError(
            f"{len(intended_labels)} intended_labels for {len(images)} images: give one each, at least one"
        )
    judge = SVC(C=_COST, gamma="scale")
    judge.fit(train_images.reshape(len(train_images), -1) / 255.0, train_labels)
    predicted = judge.predict(images.reshape(len(images), -1) / 255.0)
    return float(np.mean(predicted == np.asarray(intended_labels)))
