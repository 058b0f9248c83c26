"""Whether generated images show the class that was asked for, judged by a classifier of another kind.

The judge is a support-vector machine on the pixels, fitted on real images: it shares neither architecture
nor training with the network that makes the Frechet features.
"""

import numpy as np

from edm2.extras import needed


def predict_labels(
    train_images: np.ndarray, train_labels: np.ndarray, images: np.ndarray, *, c: float = 10.0
) -> np.ndarray:
    """Classes of images by a support-vector classifier with a radial kernel, fitted on real ones.

    Fitting takes milliseconds for the 1,438 training digits and grows with the square of their number:
    give some thousands of images at most.

    Args:
        train_images: `[N, ...]` uint8, real.
        train_labels: `[N]` integers, at least two classes.
        images: `[M, ...]` uint8 of the same shape.
        c: Cost of a violated margin, above 0.

    Returns:
        `[M]` int64.

    Raises:
        ValueError: For another type, shapes or numbers that differ, or a single class.
    """
    with needed("this measure"):
        from sklearn.svm import SVC

    for name, array in (("train_images", train_images), ("images", images)):
        if array.dtype != np.uint8:
            raise ValueError(f"{name} must be uint8, not {array.dtype}")
    if train_images.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"train_images {list(train_images.shape[1:])} and images {list(images.shape[1:])} differ in shape"
        )
    if len(train_images) != len(train_labels):
        raise ValueError(f"{len(train_labels)} train_labels do not fit {len(train_images)} train_images")
    if len(np.unique(train_labels)) < 2:
        raise ValueError("train_labels must hold at least two classes for a classifier to tell apart")
    if len(images) == 0:
        return np.empty(0, np.int64)
    judge = SVC(C=c, gamma="scale")
    judge.fit(train_images.reshape(len(train_images), -1) / 255.0, train_labels)
    return np.asarray(judge.predict(images.reshape(len(images), -1) / 255.0), np.int64)


def label_agreement(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    images: np.ndarray,
    intended_labels: np.ndarray,
    *,
    c: float = 10.0,
) -> float:
    """Share of images whose class, by an independent classifier, is the intended one.

    Args:
        train_images: `[N, ...]` uint8, real.
        train_labels: `[N]` integers.
        images: `[M, ...]` uint8, to be judged.
        intended_labels: `[M]` integers.
        c: As in `predict_labels`.

    Returns:
        In [0, 1].

    Raises:
        ValueError: As in `predict_labels`, or for no images or numbers that differ.
    """
    if len(images) != len(intended_labels) or len(images) == 0:
        raise ValueError(
            f"{len(intended_labels)} intended_labels for {len(images)} images: give one each, at least one"
        )
    predicted = predict_labels(train_images, train_labels, images, c=c)
    return float(np.mean(predicted == np.asarray(intended_labels)))
