"""How good generated images are: Frechet distance in float64, a feature extractor, agreement and copying.

Heavy packages are imported inside the functions that need them.
"""

from edm2.metrics.agreement import label_agreement, predict_labels
from edm2.metrics.classifier import ClassifierFeatures, fit_classifier
from edm2.metrics.frechet import FeatureStatistics, frechet_distance
from edm2.metrics.neighbours import Nearest, nearest_distances

__all__ = [
    "ClassifierFeatures",
    "FeatureStatistics",
    "Nearest",
    "fit_classifier",
    "frechet_distance",
    "label_agreement",
    "nearest_distances",
    "predict_labels",
]
